// node types.mjs DASHBOARD.json... : checks dashboards against the types of @grafana/schema. Exit status 1 with tsc's errors.
// The document is checked as a Dashboard; each panel's options and custom field config as those of its panel type. Keys that the
// schema does not list are allowed (an annotation's expr, for example), because the schema is not complete.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

const folder = path.join(import.meta.dirname, 'typecheck');
const panelTypes = ['timeseries', 'stat', 'trend', 'table'];
// In JSON an enumeration is its values, so the types are compared with enumerations opened up.
const lines = [
  "import type { Dashboard } from '@grafana/schema';",
  ...panelTypes.map((type) => `import type * as ${type} from '../node_modules/@grafana/schema/dist/types/raw/composable/${type}/panelcfg/x/types.gen';`),
  'type Json<T> = unknown extends T ? unknown : T extends string ? `${T}` : T extends number ? (`${T}` extends `${infer N extends number}` ? N : number)',
  '  : T extends boolean | null | undefined ? T : T extends Array<infer U> ? Json<U>[] : T extends object ? { [K in keyof T]: Json<T[K]> } : T;',
  'declare function dashboard<T extends Json<Dashboard>>(document: T): T;',
  ...panelTypes.map((type) => `declare function ${type}Options<T extends Partial<Json<${type}.Options>>>(options: T): T;`),
];
for (const [i, file] of process.argv.slice(2).entries()) {
  const document = JSON.parse(fs.readFileSync(file, 'utf8'));
  lines.push(`// ${path.basename(file)}`, `export const dashboard${i} = dashboard(${JSON.stringify(document, null, 1)});`);
  for (const panel of document.panels) {
    if (!panelTypes.includes(panel.type)) throw new Error(`${file}: panel type ${panel.type} is not known here`);
    const custom = panel.fieldConfig.defaults.custom ?? {};
    const hasCustom = panel.type !== 'stat';
    lines.push(
      `// ${path.basename(file)}: ${panel.title}`,
      `export const options${i}_${panel.id} = ${panel.type}Options(${JSON.stringify(panel.options, null, 1)});`,
      `export const custom${i}_${panel.id}: Partial<${hasCustom ? `Json<${panel.type}.FieldConfig>` : 'Record<string, never>'}> = ${JSON.stringify(custom, null, 1)};`
    );
  }
}
fs.rmSync(folder, { recursive: true, force: true });
fs.mkdirSync(folder);
fs.writeFileSync(path.join(folder, 'dashboards.ts'), lines.join('\n') + '\n');
const compiler = path.join(import.meta.dirname, 'node_modules', 'typescript', 'bin', 'tsc');
const flags = ['--noEmit', '--strict', '--skipLibCheck', '--target', 'es2022', '--module', 'esnext', '--moduleResolution', 'bundler'];
const done = spawnSync(process.execPath, [compiler, ...flags, path.join(folder, 'dashboards.ts')], { encoding: 'utf8' });
if (done.error) throw done.error;
const faults = done.stdout.split('\n').filter((line) => line && !line.includes(': error TS2353: ')); // TS2353: a key it does not know
console.log(faults.join('\n'));
process.exit(faults.length || ![0, 1, 2].includes(done.status) ? 1 : 0);
