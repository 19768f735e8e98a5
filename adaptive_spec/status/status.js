"use strict";
// Shows status.json, once a second. Everything from outside enters as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const put = (id, text) => { byId(id).textContent = text; };
const number = (value, digits = 0, unit = "") =>
  value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }) + unit;
const sum = (values) => (values || []).reduce((a, b) => a + b, 0);

function node(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// 1, 2 or 5 times a power of ten, so that an axis has about five marks.
function tick(max) {
  const power = 10 ** Math.floor(Math.log10(max / 5));
  return power * [1, 2, 5, 10].find((factor) => (factor * power * 5) >= max);
}

// A frame with axes; returns functions from data to picture coordinates.
function frame(svg, xMax, yMax) {
  svg.replaceChildren();
  const box = { left: 44, right: 548, top: 10, bottom: 240 };
  const x = (v) => box.left + (v / xMax) * (box.right - box.left);
  const y = (v) => box.bottom - (v / yMax) * (box.bottom - box.top);
  const label = (v) => v.toLocaleString("en", { maximumFractionDigits: 3 });
  for (let v = 0; v <= yMax * 1.001; v += tick(yMax)) {
    node(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y(v), y2: y(v) });
    node(svg, "text", { x: box.left - 6, y: y(v) + 4, "text-anchor": "end" }, label(v));
  }
  for (let v = 0; v <= xMax * 1.001; v += tick(xMax)) {
    node(svg, "text", { x: x(v), y: box.bottom + 16, "text-anchor": "middle" }, label(v));
  }
  return { x, y, box };
}

function drawStaircase(status) {
  const points = status.latency_points || [];
  const svg = byId("staircase");
  if (!points.length) { svg.replaceChildren(); return; }
  const xMax = points[points.length - 1][0] * 1.03;
  const yMax = Math.max(...points.map((p) => p[1])) * 1.15;
  const { x, y, box } = frame(svg, xMax, yMax);
  for (const tokens of status.boundaries) {
    node(svg, "line", { class: "boundary", x1: x(tokens + 0.5), x2: x(tokens + 0.5), y1: box.top, y2: box.bottom });
  }
  for (const [tokens, ms] of points) node(svg, "circle", { class: "point", cx: x(tokens), cy: y(ms), r: 3 });
  for (const s of status.segments || []) {
    const at = (tokens) => y(s.intercept_ms + s.slope_ms_per_token * tokens);
    const wide = s.last === s.first ? 0.4 : 0;
    node(svg, "line", { class: "fit", x1: x(s.first - wide), x2: x(s.last + wide), y1: at(s.first - wide), y2: at(s.last + wide) });
  }
}

function drawCalibration(curve) {
  const svg = byId("calibration");
  if (!curve || !curve.length) { svg.replaceChildren(); return; }
  const { x, y } = frame(svg, 1, 1);
  node(svg, "line", { class: "diagonal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) });
  const most = Math.max(...curve.map((row) => row[3]));
  for (const [centre, , observed, samples] of curve) {
    node(svg, "circle", { class: "point", cx: x(centre), cy: y(observed), r: 2 + 5 * Math.sqrt(samples / most) });
  }
  node(svg, "polyline", { class: "fit", points: curve.map((row) => `${x(row[0])},${y(row[1])}`).join(" ") });
}

function list(parent, rows, make) {
  parent.replaceChildren(...rows.map(make));
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function show(status) {
  const engine = status.engine;
  put("engine", engine ? `${engine.name} · ${engine.model} · ${engine.gpu} · tp${engine.tp}` : "waiting for an engine");
  const gone = engine && !status.engine_attached;
  put("mode", gone ? "engine gone" : status.mode);
  byId("mode").className = `badge ${gone ? "gone" : status.mode}`;
  put("reason", status.reason);
  put("goodput", number(status.goodput_tokens_per_s));
  put("gain", number(status.measured_gain == null ? null : 100 * status.measured_gain, 1, " %"));
  const verified = sum(status.verified_tokens);
  put("accepted", number(verified ? sum(status.accepted_tokens) / verified : null, 2));
  put("ece", number(status.calibration && status.calibration.ece, 3));
  put("version", number(status.policy_version));
  put("steps", number(status.decode_steps));
  list(byId("k"), Object.entries(status.k_by_batch_size), ([batch, k]) => {
    const cell = document.createElement("div");
    cell.append(element("b", k), element("span", `b ${batch}`));
    return cell;
  });
  byId("sweep").hidden = status.mode !== "sweep";
  if (status.sweep) {
    byId("progress").value = status.sweep.progress;
    put("sweep-steps", `${status.sweep.steps} steps`);
  }
  drawStaircase(status);
  put("boundaries", status.boundaries.length ? `tile boundaries: ${status.boundaries.join(", ")}` : "no tile boundaries yet");
  drawCalibration(status.calibration && status.calibration.curve);
  put("kind", status.calibration ? `(${status.calibration.kind})` : "");
  list(byId("events"), [...(status.events || [])].reverse(), (event) => {
    const item = document.createElement("li");
    item.append(element("time", `${number(event.age_s)} s ago`), ` ${event.text}`);
    return item;
  });
  put("pids", `sidecar ${status.sidecar_pid}${status.engine_pid ? `, engine ${status.engine_pid}` : ""}, version ${status.version}`);
}

async function refresh() {
  try {
    const answer = await fetch("status.json", { cache: "no-store" });
    show(await answer.json());
  } catch {
    put("mode", "no answer");
    byId("mode").className = "badge gone";
  }
  setTimeout(refresh, 1000);
}

refresh();
