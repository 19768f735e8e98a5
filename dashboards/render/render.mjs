// node render.mjs --prometheus URL --out DIR [--minutes 5] [--interval 2] [--theme dark] [--instance RE] DASHBOARD.json...
// Draws dashboards in headless Chromium (or the browser in CHROMIUM) and prints a JSON row for each panel: the results of its
// queries, the number of points, its canvases and its text. Run `npx vite build` first.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { parseArgs } from 'node:util';
import puppeteer from 'puppeteer-core';

const { values: options, positionals: files } = parseArgs({
  allowPositionals: true,
  options: {
    prometheus: { type: 'string', default: 'http://127.0.0.1:9090' }, out: { type: 'string', default: '.' },
    minutes: { type: 'string', default: '5' }, interval: { type: 'string', default: '2' },
    theme: { type: 'string', default: 'dark' }, instance: { type: 'string', default: '.*' },
  },
});
const TYPES = { '.js': 'text/javascript', '.html': 'text/html', '.css': 'text/css', '.json': 'application/json' };
const known = Object.fromEntries(files.map((file) => [path.basename(file), path.resolve(file)]));

const server = http.createServer((request, response) => {
  const name = decodeURIComponent(new URL(request.url, 'http://x').pathname);
  const file = name.startsWith('/dashboards/') ? known[path.basename(name)] ?? '' :
    path.join(import.meta.dirname, 'out', path.normalize(name === '/' ? 'index.html' : name));
  fs.readFile(file, (error, data) => {
    response.writeHead(error ? 404 : 200, { 'content-type': TYPES[path.extname(file)] ?? 'application/octet-stream' });
    response.end(error ? undefined : data);
  });
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--lang=en-US'],
  env: { ...process.env, LANG: 'en_US.UTF-8', LC_ALL: 'en_US.UTF-8', LANGUAGE: 'en_US' },
});
try {
  const drawn = [];
  for (const name of Object.keys(known)) {
    const page = await browser.newPage();
    const errors = [];
    page.on('pageerror', (error) => errors.push(String(error).slice(0, 500)));
    await page.setViewport({ width: 1280, height: 800 });
    const query = new URLSearchParams({ dashboard: name, ...options });
    await page.goto(`http://127.0.0.1:${server.address().port}/?${query}`);
    const ready = () => {
      const panels = [...document.querySelectorAll('.panel')];
      return panels.length > 0 && panels.every((panel) => panel.dataset.ready === '1');
    };
    await page.waitForFunction(ready, { timeout: 60000 }).catch((error) => errors.push(String(error)));
    await new Promise((resolve) => setTimeout(resolve, 1500)); // the canvases are drawn after the data is there
    const panels = await page.evaluate(() => [...document.querySelectorAll('.panel')].map((panel) => ({
      title: panel.dataset.title, type: panel.dataset.type, points: Number(panel.dataset.points), counts: JSON.parse(panel.dataset.counts),
      error: panel.dataset.error, canvases: panel.querySelectorAll('canvas').length, text: panel.innerText,
      clipped: [...panel.querySelectorAll('h2')].some((h) => h.scrollWidth > h.clientWidth + 1),
    })));
    const screenshot = path.join(options.out, name.replace(/\.json$/, '.png'));
    await page.screenshot({ path: screenshot, fullPage: true });
    await page.close();
    drawn.push({ dashboard: name, screenshot, errors, panels });
  }
  console.log(JSON.stringify(drawn, null, 1));
} finally {
  await browser.close();
  server.close();
}
