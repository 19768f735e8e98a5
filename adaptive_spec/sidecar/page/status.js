// Shows status.json every second and history.json every other second. All data is inserted as text, never as markup.
import { goodputPlot, reliabilityPlot, staircasePlot } from "./charts.js";

const LOOK_MS = 1000;
const TOKEN_KEY = "adaptive-spec control token";
const byId = (id) => document.getElementById(id);
const put = (id, text) => { if (byId(id).textContent !== text) byId(id).textContent = text; };
const number = (value, digits = 0, unit = "") =>
  value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }) + unit;
const sum = (values) => (values || []).reduce((a, b) => a + b, 0);
const signed = (ratio) => (ratio == null ? "–" : `${ratio < 0 ? "" : "+"}${number(100 * ratio, 1, " %")}`);
const ago = (seconds) => (seconds < 100 ? `${number(seconds)} s ago` : seconds < 6000 ? `${number(seconds / 60)} min ago`
  : `${number(seconds / 3600, 1)} h ago`);

const showStaircase = staircasePlot();
const showReliability = reliabilityPlot();
const showGoodput = goodputPlot();
let looks = 0;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Adjacent batch sizes with the same K share a cell.
function ranges(kByBatch) {
  const found = [];
  for (const [batch, k] of Object.entries(kByBatch).map(([b, k]) => [Number(b), k]).sort((a, b) => a[0] - b[0])) {
    const last = found[found.length - 1];
    if (last && last.k === k && last.to === batch - 1) last.to = batch; else found.push({ from: batch, to: batch, k });
  }
  return found;
}

function showK(status) {
  const table = status.k_by_batch_size;
  const batch = status.batch_size;
  const engine = status.engine;
  const own = engine && ["shadow", "fallback"].includes(status.mode);  // K comes from the server's own policy or its launch K
  const k = own ? status.last_k : table[batch];
  put("k-now", k == null ? "–" : `K ${k}`);
  put("k-now-words", own ? `the server's own; the policy would use ${table[batch] ?? "–"}` : batch ? `at batch size ${batch}` : "current K");
  byId("k").replaceChildren(...ranges(table).map(({ from, to, k: value }) => {
    const inside = batch >= from && batch <= to;
    const cell = element("button", "", { type: "button", "data-from": from, "data-to": to, "data-k": value, title: "Why this K?" });
    if (inside) cell.className = "now";
    cell.addEventListener("click", () => explain(inside ? batch : from));
    cell.append(element("b", value), element("span", from === to ? `batch ${from}` : `batch ${from}–${to}`));
    return cell;
  }));
}

// The explained batch size follows the page's refresh until the section is closed.
let explained = null;
const PLAN_COLUMNS = [
  ["K", (p) => p.k], ["tokens", (p) => number(p.expected_tokens, 2)], ["step ms", (p) => number(p.step_ms, 2)],
  ["tokens/s", (p) => `${number(p.goodput_tokens_per_s)} ± ${number(p.goodput_error_tokens_per_s)}`],
  ["K changes", (p) => number(-p.k_switches_tokens_per_s, 1)], ["gain", (p) => signed(p.gain)],
  ["hurdle", (p) => number(100 * p.hurdle, 1, " %")], ["decided by", (p) => p.verdict],
  ["step ms by stage", (p) => Object.entries(p.stage_ms).map(([name, ms]) => `${name} ${number(ms, 2)}`).join(", ")],
];

async function explain(batch) {
  explained = batch;
  await showExplained();
  byId("explain").scrollIntoView({ block: "nearest" });
}

async function showExplained() {
  byId("explain").hidden = explained == null;
  if (explained == null) return;
  const answer = await ask(`explain.json?batch=${explained}`);
  put("explain-title", `Why this K at batch size ${explained}?`);
  if (answer.error) { put("explain-note", answer.error); byId("explain-plans").replaceChildren(); return; }
  const cost = answer.k_switch_ms == null ? "not measured yet" : number(answer.k_switch_ms, 2, " ms");
  put("explain-note", `${answer.note ? `${answer.note}. ` : ""}Decided ${ago(answer.decided_age_s)} for ${number(answer.kv_tokens_per_request)} KV tokens `
    + `per request; K was ${answer.k_before}. A change of K costs ${cost}. All figures are forecasts; ± is one standard error.`);
  const head = element("tr", "");
  head.append(...PLAN_COLUMNS.map(([title]) => element("th", title, { scope: "col" })));
  byId("explain-plans").replaceChildren(head, ...answer.plans.map((plan) => {
    const row = element("tr", "", plan.k === answer.k ? { class: "now" } : {});
    row.append(...PLAN_COLUMNS.map(([, text]) => element("td", text(plan))));
    return row;
  }));
}

function showControl(status) {
  const candidates = status.engine ? status.engine.candidates : [];
  const select = byId("pin-k");
  if ([...select.options].map((option) => option.value).join() !== candidates.join()) {
    select.replaceChildren(...candidates.map((k) => element("option", k)));
    if (status.engine) select.value = status.engine.launch_k;
  }
  for (const control of byId("control").querySelectorAll("button, select")) control.disabled = !status.engine;
}

// Numbers of the server itself, shown while the plugin gives none.
function showServer(server) {
  byId("server").hidden = server == null;
  if (server == null) return;
  put("server", server.failure ? `The server's own numbers: none: ${server.url}: ${server.failure}`
    : `The server's own numbers, ${ago(server.age_s)}: ${number(server.tokens_per_s)} tokens/s, ${number(server.running_requests)} requests, `
      + `accept length ${number(server.accept_length, 2)}, accept rate ${number(server.accept_rate, 2)}`);
}

function show(status) {
  const engine = status.engine;
  put("engine", engine ? `${engine.name} · ${engine.model} · ${engine.gpu} · tp${engine.tp}` : "waiting for an engine");
  const gone = engine && !status.engine_attached;
  put("mode", gone ? "engine stopped" : status.mode);
  byId("mode").className = `badge ${gone ? "gone" : status.mode}`;
  put("reason", status.reason);
  showServer(status.server_reported);
  document.title = `${gone ? "engine stopped" : status.mode} · adaptive-spec`;
  showK(status);
  put("goodput", number(status.goodput_tokens_per_s));
  put("gain", signed(status.measured_gain));
  put("predicted", status.predicted_gain == null ? "" : `; ${signed(status.predicted_gain)} predicted`);
  const verified = sum(status.verified_tokens);
  put("accepted", number(verified ? sum(status.accepted_tokens) / verified : null, 2));
  put("ece", number(status.calibration && status.calibration.ece, 3));
  const drift = status.drift_events;
  put("drift", drift ? `${number(drift.latency ?? 0)}, ${number(drift.calibration ?? 0)}` : "–");
  put("version", number(status.policy_version));
  put("age", status.policy_age_s == null ? "" : `, from ${ago(status.policy_age_s)}`);
  put("steps", number(status.decode_steps));
  byId("sweep").hidden = status.mode !== "sweep";
  if (status.sweep) {
    byId("progress").value = status.sweep.progress;
    put("sweep-steps", `${status.sweep.steps} steps`);
  }
  showStaircase(status);
  const jumps = status.boundaries.map((tokens, i) => `${tokens} (×${number(status.jump_ratios[i], 2)})`);
  put("boundaries", jumps.length ? `tile boundaries in tokens (latency jump): ${jumps.join(", ")}` : "no tile boundaries yet");
  showReliability(status.calibration && status.calibration.curve);
  put("kind", status.calibration ? `calibration: ${status.calibration.kind}; larger dots: more samples` : "");
  byId("events").replaceChildren(...[...(status.events || [])].reverse().map((event) => {
    const item = element("li", "", { "data-kind": event.kind });
    item.append(element("time", ago(event.age_s)), element("span", event.text));
    return item;
  }));
  showControl(status);
  put("pids", `sidecar ${status.sidecar_pid}${status.engine_pid ? `, engine ${status.engine_pid}` : ""}, version ${status.version}`);
}

const ask = async (path) => (await fetch(path, { cache: "no-store" })).json();

async function look() {
  try {
    const status = await ask("status.json");
    show(status);
    await showExplained();
    if (looks++ % 2 === 0) showGoodput(await ask("history.json"), status.events || []);
    document.body.classList.remove("stale");
  } catch (error) {
    if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;  // other errors are bugs
    put("mode", "no answer");
    byId("mode").className = "badge gone";
    document.body.classList.add("stale");
  }
}

// A hidden page sends no requests.
async function refresh() {
  try {
    if (!document.hidden) await look();
  } finally {
    setTimeout(refresh, LOOK_MS);
  }
}

function say(text, bad = false) {
  put("said", text);
  byId("said").className = bad ? "bad" : "";
}

async function send(command, k) {
  const token = byId("token").value.trim();
  if (!token) {
    say("Enter the control token; it is in the sidecar's token file.", true);
    byId("token").focus();
    return;
  }
  if (!/^[\x21-\x7e]+$/.test(token)) {
    say("Control token: must be ASCII characters without spaces.", true);
    return;
  }
  say(`${command} …`);
  try {
    const answer = await fetch("control", {
      method: "POST",
      headers: { "Authorization": `Bearer ${token}`, "Content-Type": "application/json" },
      body: JSON.stringify(k === undefined ? { command } : { command, k }),
    });
    const document = await answer.json();
    if (answer.ok) sessionStorage.setItem(TOKEN_KEY, token);
    if (answer.status === 403) sessionStorage.removeItem(TOKEN_KEY);
    say(answer.ok ? `${command}: done, mode ${document.mode}` : `${command}: refused: ${document.error}`, !answer.ok);
  } catch {
    say(`${command}: no answer`, true);
  }
  await look();
}

byId("explain-close").addEventListener("click", () => { explained = null; byId("explain").hidden = true; });
byId("token").value = sessionStorage.getItem(TOKEN_KEY) || "";
byId("control").addEventListener("submit", (event) => event.preventDefault());
for (const button of byId("control").querySelectorAll("button")) {
  const command = button.dataset.command;
  button.addEventListener("click", () => send(command, command === "pin" ? Number(byId("pin-k").value) : undefined));
}
refresh();
