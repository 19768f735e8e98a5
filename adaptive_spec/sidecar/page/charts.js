// The three plots, drawn with uPlot (vendor/). Colours come from the page's style, light or dark.
/* global uPlot */

const HEIGHT = 240;
const LIVE_MS = 5000;
const SHORTEST_S = 60;
const APART = 0.002;
const dark = matchMedia("(prefers-color-scheme: dark)");
const pixels = (value) => value * devicePixelRatio;

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["ink", "dim", "rule", "blue", "faint", "red", "amber"].map((name) =>
    [name, style.getPropertyValue(`--${name}`).trim()]));
}

// Returns a function that shows data: the plot is created at the first call, resized with its container, and recreated when the
// colour scheme changes.
function plot(id, options) {
  const target = document.getElementById(id);
  let chart = null;
  let data = null;
  const build = () => {
    chart?.destroy();
    chart = new uPlot({ width: target.clientWidth, height: HEIGHT, ...options(colours()) }, data, target);
  };
  new ResizeObserver(() => chart?.setSize({ width: target.clientWidth, height: HEIGHT })).observe(target);
  dark.addEventListener("change", () => { if (chart) build(); });
  return (columns) => {
    data = columns;
    if (chart) chart.setData(data); else build();
  };
}

const axis = (c, more = {}) => ({
  stroke: c.dim, font: "11px system-ui, sans-serif", grid: { stroke: c.rule, width: 1 }, ticks: { stroke: c.rule, size: 4 },
  size: 46, gap: 4, ...more,
});
const figure = (digits, unit = "") => (_, value) => (value == null ? "–" : value.toFixed(digits) + unit);
const clock = (time_s) => new Date(1000 * time_s).toLocaleTimeString([], { hour12: false });
const hover = (c) => ({ drag: { x: false, y: false }, points: { size: 7, fill: c.blue } });

function inside(u, draw) {
  u.ctx.save();
  u.ctx.beginPath();
  u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
  u.ctx.clip();
  draw(u.ctx);
  u.ctx.restore();
}

function verticals(u, colour, values, labels = []) {
  inside(u, (ctx) => {
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = pixels(1.5);
    ctx.setLineDash([pixels(2), pixels(4)]);
    ctx.font = `${pixels(10)}px system-ui, sans-serif`;
    let free = -Infinity;
    values.forEach((value, i) => {
      const x = u.valToPos(value, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, u.bbox.top);
      ctx.lineTo(x, u.bbox.top + u.bbox.height);
      ctx.stroke();
      if (labels[i] !== undefined && x > free) {
        ctx.fillText(labels[i], x + pixels(3), u.bbox.top + pixels(10));
        free = x + pixels(10) + ctx.measureText(labels[i]).width;
      }
    });
  });
}

function dots(u, series, colour, radius) {
  inside(u, (ctx) => {
    ctx.fillStyle = colour;
    u.data[series].forEach((y, i) => {
      if (y == null) return;
      ctx.beginPath();
      ctx.arc(u.valToPos(u.data[0][i], "x", true), u.valToPos(y, "y", true), pixels(radius(i)), 0, 2 * Math.PI);
      ctx.fill();
    });
  });
}

function steps(u, colour, segments) {
  inside(u, (ctx) => {
    ctx.strokeStyle = colour;
    ctx.lineWidth = pixels(2);
    for (const s of segments) {
      const at = (tokens) => u.valToPos(s.intercept_ms + s.slope_ms_per_token * tokens, "y", true);
      ctx.beginPath();
      ctx.moveTo(u.valToPos(s.first - 0.4, "x", true), at(s.first - 0.4));
      ctx.lineTo(u.valToPos(s.last + 0.4, "x", true), at(s.last + 0.4));
      ctx.stroke();
    }
  });
}

const unlined = { paths: () => null, points: { show: false } };

function staircasePlot() {
  let boundaries = [];
  let segments = [];
  const seen = new Map();  // tokens -> {ms, weight, at}
  // A point counts as just measured if its weight grew (which has a limit) or if it moved relative to the others: the speed
  // factor and the context term move all points together.
  const note = (points, now) => {
    const factors = points.map(([tokens, ms]) => ms / seen.get(tokens)?.ms).filter(Number.isFinite).sort((a, b) => a - b);
    const common = factors[factors.length >> 1] ?? 1;
    const first = !seen.size;
    for (const [tokens, ms, weight] of points) {
      const before = seen.get(tokens);
      const measured = !before || weight > before.weight || Math.abs(ms / before.ms / common - 1) > APART;
      seen.set(tokens, { ms, weight, at: measured && !first ? now : before?.at ?? -LIVE_MS });
    }
  };
  const show = plot("staircase", (c) => ({
    scales: { x: { time: false, range: (_, low, high) => [0, high * 1.03] }, y: { range: (_, low, high) => [0, high * 1.15] } },
    cursor: hover(c),
    axes: [axis(c, { size: 30 }), axis(c)],
    series: [
      { label: "tokens", value: figure(0) },
      { label: "fit", stroke: c.ink, value: figure(3, " ms"), ...unlined },
      { label: "measured", stroke: c.faint, fill: c.faint, value: figure(3, " ms"), ...unlined },
      { label: "measured just now", stroke: c.blue, fill: c.blue, value: figure(3, " ms"), ...unlined },
    ],
    hooks: {
      draw: [(u) => {
        verticals(u, c.red, boundaries.map((tokens) => tokens + 0.5), boundaries.map(String));
        dots(u, 2, c.faint, () => 3);
        dots(u, 3, c.blue, () => 3.5);
        steps(u, c.ink, segments);
      }],
    },
  }));
  return (status) => {
    const points = status.latency_points || [];
    if (!points.length) return;
    ({ boundaries, segments = [] } = status);
    const now = performance.now();
    note(points, now);
    const live = points.map(([tokens]) => now - seen.get(tokens).at < LIVE_MS);
    const fit = ([tokens]) => {
      const s = segments.find(({ first: from, last }) => from <= tokens && tokens <= last);
      return s ? s.intercept_ms + s.slope_ms_per_token * tokens : null;
    };
    show([
      points.map((p) => p[0]), points.map(fit), points.map((p, i) => (live[i] ? null : p[1])),
      points.map((p, i) => (live[i] ? p[1] : null)),
    ]);
  };
}

function reliabilityPlot() {
  let samples = [];
  const show = plot("reliability", (c) => ({
    scales: { x: { time: false, range: [0, 1] }, y: { range: [0, 1] } },
    cursor: hover(c),
    axes: [axis(c, { size: 30 }), axis(c)],
    series: [
      { label: "score", value: figure(2) },
      { label: "perfect", stroke: c.dim, dash: [5, 5], spanGaps: true, points: { show: false }, value: () => "" },
      { label: "calibrated", stroke: c.ink, width: 2, spanGaps: true, points: { show: false }, value: figure(3) },
      { label: "observed", stroke: c.blue, fill: c.blue, value: figure(3), ...unlined },
    ],
    hooks: {
      draw: [(u) => {
        const most = Math.max(1, ...samples);
        dots(u, 3, c.blue, (i) => 2 + 5 * Math.sqrt(samples[i] / most));
      }],
    },
  }));
  return (curve) => {
    if (!curve || !curve.length) return;
    samples = [0, ...curve.map((r) => r[3]), 0];
    show([
      [0, ...curve.map((r) => r[0]), 1], [0, ...curve.map(() => null), 1],
      [null, ...curve.map((r) => r[1]), null], [null, ...curve.map((r) => r[2]), null],
    ]);
  };
}

function goodputPlot() {
  let marks = { swap: [], drift: [] };
  const show = plot("goodput-plot", (c) => ({
    scales: {
      x: { range: (_, low, high) => [Math.min(low, high - SHORTEST_S), high] },
      y: { range: (_, low, high) => [0, (high || 1) * 1.1] },
      k: { range: (_, low, high) => [0, (high || 1) + 1] },
    },
    cursor: hover(c),
    axes: [
      axis(c, { size: 30, space: 90, values: (_, at) => at.map(clock) }),
      axis(c),
      axis(c, { scale: "k", side: 1, size: 30, grid: { show: false }, incrs: [1, 2, 5, 10], values: (_, ks) => ks.map((k) => `K ${k}`) }),
    ],
    series: [
      { label: "at", value: (_, s) => (s == null ? "–" : clock(s)) },
      { label: "goodput", stroke: c.blue, width: 2, points: { show: false }, value: figure(0) },
      { label: "launch K, estimated", stroke: c.dim, dash: [6, 4], points: { show: false }, value: figure(0) },
      {
        label: "K", scale: "k", stroke: c.amber, width: 1, points: { show: false }, value: figure(0),
        paths: uPlot.paths.stepped({ align: 1 }),
      },
    ],
    hooks: {
      draw: [(u) => {
        verticals(u, c.blue, marks.swap);
        verticals(u, c.red, marks.drift);
      }],
    },
  }));
  return (history, events) => {
    if (!history.age_s.length) return;
    const now = Date.now() / 1000;
    const times = (kind) => events.filter((event) => event.kind === kind).map((event) => now - event.age_s);
    marks = { swap: times("swap"), drift: times("drift") };
    show([
      history.age_s.map((age) => now - age), history.goodput_tokens_per_s, history.launch_k_goodput_tokens_per_s,
      history.draft_tokens,
    ]);
  };
}

export { goodputPlot, reliabilityPlot, staircasePlot };
