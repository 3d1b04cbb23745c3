"use strict";
// Everything that a model or a page said reaches the document as text (textContent, attributes), never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const colour = (method) => `var(--m${DATA.methods.indexOf(method) % 8})`;
const state = { pair: 0, step: 0, overlay: "kept", timer: 0 };

function put(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat(3)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const h = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

const percent = (share) => `${Math.round(share * 100)} %`;
const whole = (value) => Math.round(value).toLocaleString("en");
const seconds = (value) => (value >= 10 ? `${value.toFixed(1)} s` : value >= 1 ? `${value.toFixed(2)} s` : `${Math.round(value * 1000)} ms`);
function bytes(value) {
  const unit = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : [1e3, "KB"];
  const number = value / unit[0];
  return `${number.toFixed(number < 10 ? 2 : number < 100 ? 1 : 0)} ${unit[1]}`;
}

// ---- summary

function facts() {
  const about = DATA.about, one = (name, value) => h("span", {}, `${name} `, h("b", {}, String(value)));
  byId("facts").append(
    one("model", about.model), one("budget", about.budget), one("screenshots in a prompt", about.history),
    one("tasks", about.tasks.length), one("episodes per task", about.episodes), one("seeds from", about.meta.seed),
    one("on", about.meta.hardware));
  byId("meta").textContent = JSON.stringify(about, null, 2);
  byId("notes").textContent = DATA.notes.join(" ");
}

function successBar(row) {
  const whisker = `left:${row.low * 100}%;width:${(row.high - row.low) * 100}%`;
  return h("div", { class: "bar", role: "img", "aria-label": `success ${percent(row.success)}, 95 % interval ${percent(row.low)} to ${percent(row.high)}` },
    h("i", { style: `width:${row.success * 100}%` }), h("u", { style: whisker }));
}

function summaryRow(row, scale) {
  const parts = ["prefill", "decode", "browser"];
  const label = parts.map((p) => `${p} ${seconds(row["seconds_" + p])}`).join(", ");
  return h("tr", { style: `--c:${colour(row.method)}` },
    h("td", {}, h("span", { class: "method" }, h("i", { class: "dot" }), row.method)),
    h("td", { class: "num" }, percent(row.success), " ", h("small", {}, `${Math.round(row.low * 100)}–${Math.round(row.high * 100)}, n=${row.n}`), successBar(row)),
    h("td", { class: "num" }, percent(row.kv_share), " ", h("small", {}, `${bytes(row.kv_bytes)} of ${bytes(row.kv_bytes_full)}`),
      h("div", { class: "bar" }, h("i", { style: `width:${Math.min(1, row.kv_share) * 100}%` }))),
    h("td", { class: "num" }, bytes(row.kv_bytes_peak)),
    h("td", { class: "num" }, row.steps.toFixed(1)),
    h("td", { class: "num" }, whole(row.prefill_tokens)),
    h("td", { class: "num" }, row.decode_tokens.toFixed(1)),
    h("td", { class: "num" }, seconds(row.seconds), h("div", { class: "stack", role: "img", "aria-label": label, title: label },
      parts.map((p) => h("i", { class: p, style: `width:${(row["seconds_" + p] / scale) * 100}%` })))));
}

function summary() {
  const rows = DATA.rows.filter((r) => r.task === "all");
  const scale = Math.max(...rows.map((r) => r.seconds), 1e-9);
  const key = ["prefill", "decode", "browser"].map((p) => [h("i", { class: `key ${p}` }), p]);
  const heads = ["Method", "Success (95 % interval)", "KV cache at rest, of full", "KV peak", "Steps", "Prompt tokens", "Decoded", h("span", {}, "Time per step", key)];
  byId("summary").append(h("thead", {}, h("tr", {}, heads.map((t) => h("th", { scope: "col" }, t)))),
    h("tbody", {}, rows.map((r) => summaryRow(r, scale))));
}

function taskTiles() {
  const tasks = [...new Set(DATA.rows.map((r) => r.task))].filter((t) => t !== "all");
  if (tasks.length < 2) return;
  byId("tasks").append(...tasks.map((task) => {
    const bars = DATA.rows.filter((r) => r.task === task).map((r) =>
      h("span", { style: `--c:${colour(r.method)}`, title: `${r.method}: ${percent(r.success)} of ${r.n}` },
        h("i", { class: "bar" }, h("i", { style: `width:${r.success * 100}%` })), percent(r.success)));
    return h("button", { type: "button", class: "task", onclick: () => { byId("task").value = task; pairList(); open(Number(first().dataset.pair)); byId("player").scrollIntoView(); } }, h("b", {}, task), bars);
  }));
}

// ---- list of episodes

const first = () => document.querySelector(".pair");
const differs = (pair) => new Set(Object.values(pair.plays).map((p) => p.success)).size > 1;

function pairButton(pair, index) {
  const marks = DATA.methods.filter((m) => pair.plays[m]).map((m) => {
    const won = pair.plays[m].success;
    return h("i", { class: won ? "won" : "", style: `--c:${colour(m)}`, title: `${m}: ${won ? "solved" : "not solved"}` }, won ? "✓" : "✕");
  });
  return h("button", { type: "button", class: "pair", "data-pair": index, onclick: () => open(index) }, `seed ${pair.seed}`, h("span", { class: "marks" }, marks));
}

function pairList() {
  const task = byId("task").value, box = byId("pairs"), groups = new Map();
  DATA.pairs.forEach((pair, i) => {
    if ((task && pair.task !== task) || (byId("differ").checked && !differs(pair))) return;
    if (!groups.has(pair.task)) groups.set(pair.task, []);
    groups.get(pair.task).push(pairButton(pair, i));
  });
  box.replaceChildren(...[...groups].flatMap(([name, buttons]) => [h("h3", {}, name), ...buttons]));
  if (!groups.size) box.append(h("p", { class: "notes" }, "No such episode."));
  markCurrent();
}

function markCurrent() {
  for (const node of document.querySelectorAll(".pair")) node.setAttribute("aria-current", Number(node.dataset.pair) === state.pair);
}

// ---- pictures with what lies over them

function unpack(frame) {
  return Uint8Array.from(atob(frame.kept), (c) => c.charCodeAt(0));
}

// One canvas pixel per visual token, stretched over the picture.
function overlay(frame, method) {
  const [rows, cols] = frame.grid, kept = unpack(frame);
  const canvas = h("canvas", { width: cols, height: rows, "aria-hidden": "true" });
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  const tint = style.getPropertyValue(colour(method).slice(4, -1)).trim(), veil = `rgb(${style.getPropertyValue("--veil")})`;
  pen.fillStyle = state.overlay === "tint" ? tint : veil;
  kept.forEach((share, i) => {
    pen.globalAlpha = state.overlay === "tint" ? (0.7 * share) / 100 : 0.86 * (1 - share / 100);
    pen.fillRect(i % cols, Math.floor(i / cols), 1, 1);
  });
  return canvas;
}

const POINTS = ["Click", "DoubleClick", "RightClick", "Drag", "Scroll"];

function arrow(x, y, toX, toY, r, look) {
  const angle = Math.atan2(toY - y, toX - x), wing = (turn) => `${toX - 1.5 * r * Math.cos(angle + turn)},${toY - 1.5 * r * Math.sin(angle + turn)}`;
  return s("path", { d: `M${x},${y} L${toX},${toY} M${wing(0.5)} L${toX},${toY} L${wing(-0.5)}`, fill: "none", "stroke-linecap": "round", ...look });
}

// The point where the action was executed, in CSS pixels of the page.
function marker(action, viewport, method) {
  const [width, height] = viewport, box = s("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", class: "click", "data-x": action.x, "data-y": action.y });
  const r = Math.max(width, height) * 0.032, { x, y } = action, c = colour(method);
  const both = (draw) => [draw({ stroke: "#fff", "stroke-width": r * 0.62 }), draw({ stroke: c, "stroke-width": r * 0.34 })];
  if (action.type === "Drag") box.append(...both((look) => arrow(x, y, action.to_x, action.to_y, r, look)));
  if (action.type === "Scroll") {
    const [dx, dy] = { up: [0, -1], down: [0, 1], left: [-1, 0], right: [1, 0] }[action.direction];
    box.append(...both((look) => arrow(x, y, x + dx * r * 4, y + dy * r * 4, r, look)));
  }
  box.append(s("circle", { class: "ping", cx: x, cy: y, r: r, fill: c, opacity: 0.5 }));
  box.append(...both((look) => s("circle", { cx: x, cy: y, r: r, fill: "none", ...look })));
  if (action.type === "DoubleClick") box.append(...both((look) => s("circle", { cx: x, cy: y, r: r * 1.8, fill: "none", ...look })));
  box.append(s("circle", { cx: x, cy: y, r: r * 0.22, fill: c, stroke: "#fff", "stroke-width": r * 0.1 }));
  return box;
}

const shot = (image, alt, width, ...over) => h("span", { class: "shot", style: `width:${width}px` }, h("img", { src: DATA.images[image], alt, loading: "lazy" }), over);

// Tall phone-like screens are held to a height, wide ones fill their card.
const widthFor = (viewport, height) => Math.round(Math.min(1000, (height * viewport[0]) / viewport[1]));

// ---- one step

const ACTS = {
  Click: (a) => `click (${a.x}, ${a.y})`, DoubleClick: (a) => `double click (${a.x}, ${a.y})`, RightClick: (a) => `right click (${a.x}, ${a.y})`,
  Drag: (a) => `drag (${a.x}, ${a.y}) to (${a.to_x}, ${a.to_y})`, Scroll: (a) => `scroll ${a.direction} by ${a.pixels} at (${a.x}, ${a.y})`,
  Type: (a) => `type “${a.text}”`, Hotkey: (a) => `press ${a.keys.join(" + ")}`, Wait: (a) => `wait ${a.seconds} s`,
  Finished: (a) => (a.answer ? `finished: ${a.answer}` : "finished"), CallUser: () => "asks the user",
};
const rounded = (action) => Object.fromEntries(Object.entries(action).map(([k, v]) => [k, typeof v === "number" ? Math.round(v * 10) / 10 : v]));
const describe = (action) => (action ? ACTS[action.type](rounded(action)) : "no action: the answer could not be read");

function figures(step) {
  const rows = [["reward", step.reward.toFixed(2)]];
  if (step.kv_bytes_full) {
    rows.push(["KV at rest", `${bytes(step.kv_bytes)} = ${percent(step.kv_bytes / step.kv_bytes_full)} of full`], ["KV peak", bytes(step.kv_bytes_peak)],
      ["tokens", `${whole(step.prefill_tokens)} in, ${whole(step.decode_tokens)} out, ${whole(step.tokens_stored)} stored`]);
  }
  rows.push(["time", `${seconds(step.seconds_prefill)} + ${seconds(step.seconds_decode)} + ${seconds(step.seconds_browser)}`]);
  return h("dl", { class: "figs", title: "time: prefill + decode + browser" }, rows.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]));
}

function card(method, play) {
  const step = play.steps[state.step], last = state.step === play.steps.length - 1;
  const badge = last || !step ? h("span", { class: `badge ${play.success ? "won" : "lost"}` }, play.success ? "solved" : play.stop === "done" ? `failed, reward ${play.reward.toFixed(2)}` : play.stop) : h("span", { class: "badge" }, "goes on");
  const head = h("header", {}, h("span", { class: "method" }, h("i", { class: "dot" }), method), badge);
  const box = (...children) => h("section", { class: "card", style: `--c:${colour(method)}`, "aria-label": `${method}, step ${state.step + 1}` }, head, children);
  if (!step) return box(h("div", { class: "gone" }, play.steps_played > play.steps.length ? `step ${state.step + 1} is not in this page` : `ended after step ${play.steps.length}`));
  const point = step.action && POINTS.includes(step.action.type) ? marker(step.action, step.viewport, method) : null;
  return box(
    shot(step.image, `Screenshot before step ${state.step + 1}; ${describe(step.action)}`, widthFor(step.viewport, 400), point),
    h("p", { class: "did" }, describe(step.action)),
    h("pre", { class: "said", "aria-label": "what the model said" }, step.text),
    step.error ? h("p", { class: "wrong" }, step.error) : null,
    step.reason ? h("p", { class: "cell-note" }, step.reason) : null,
    step.blocked.length ? h("p", { class: "wrong" }, `blocked: ${step.blocked.map((b) => `${b.kind} ${b.url}`).join(", ")}`) : null,
    figures(step));
}

function heldCell(frame, method, viewport, current) {
  const kept = unpack(frame), mean = kept.reduce((a, b) => a + b, 0) / kept.length / 100;
  const alt = `Screenshot of step ${frame.step + 1}: ${method} kept ${percent(mean)} of its visual tokens`;
  return h("td", {}, shot(frame.image, alt, Math.min(250, widthFor(viewport, current ? 230 : 190)), state.overlay === "off" ? null : overlay(frame, method)),
    h("div", { class: "cell-note num" }, `${percent(mean)} kept`));
}

function heldPanel(plays) {
  const rows = plays.filter(([, play]) => play.steps[state.step] && play.steps[state.step].frames.length);
  if (!rows.length) return null;
  const numbers = [...new Set(rows.flatMap(([, p]) => p.steps[state.step].frames.map((f) => f.step)))].sort((a, b) => a - b);
  const button = (name, text) => h("button", { type: "button", "aria-pressed": state.overlay === name, onclick: () => { state.overlay = name; render(); } }, text);
  const head = h("tr", {}, h("td", {}), numbers.map((n) => h("th", { scope: "col" }, n === state.step ? `step ${n + 1}: now` : `step ${n + 1}`)));
  const body = rows.map(([method, play]) => {
    const step = play.steps[state.step];
    return h("tr", { style: `--c:${colour(method)}` }, h("th", { scope: "row" }, h("span", { class: "method" }, h("i", { class: "dot" }), method)),
      numbers.map((n) => { const f = step.frames.find((g) => g.step === n); return f ? heldCell(f, method, step.viewport, n === state.step) : h("td", {}); }));
  });
  return h("section", { class: "panel" }, h("h3", {}, "What was still in the cache"),
    h("p", {}, "The screenshots of the prompt, oldest first. A cell is one visual token; the stronger it shows, the more layers and heads still held it when the answer was decoded."),
    h("div", { class: "controls" }, h("div", { class: "seg", role: "group", "aria-label": "Overlay" }, button("kept", "what is left"), button("tint", "tint"), button("off", "off"))),
    h("div", { class: "scroll" }, h("table", { class: "held" }, h("thead", {}, head), h("tbody", {}, body))));
}

function chart(plays) {
  const longest = Math.max(...plays.map(([, p]) => p.steps.length)), full = Math.max(...plays.flatMap(([, p]) => p.steps.map((t) => Math.max(t.kv_bytes_full, t.kv_bytes))), 0);
  if (!full || longest < 2) return null;
  const W = 900, H = 130, left = 70, right = 14, top = 10, bottom = 22;
  const x = (i) => left + (i / (longest - 1)) * (W - left - right), y = (v) => H - bottom - (v / full) * (H - top - bottom);
  const line = (steps, key, look) => s("polyline", { points: steps.map((t, i) => `${x(i)},${y(t[key])}`).join(" "), fill: "none", ...look });
  const deepest = plays.reduce((a, b) => (b[1].steps.length > a[1].steps.length ? b : a))[1];
  const picture = s("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": "KV bytes at rest per step and method" },
    [0, 0.5, 1].map((v) => [s("line", { class: "axis", x1: left, x2: W - right, y1: y(v * full), y2: y(v * full) }), s("text", { x: left - 8, y: y(v * full) + 4, "text-anchor": "end" }, bytes(v * full))]),
    deepest.steps.map((_, i) => s("text", { x: x(i), y: H - 6, "text-anchor": "middle" }, String(i + 1))),
    line(deepest.steps, "kv_bytes_full", { stroke: "var(--soft)", "stroke-dasharray": "5 4", "stroke-width": 1.5 }),
    plays.map(([m, p]) => [line(p.steps, "kv_bytes", { stroke: colour(m), "stroke-width": 2.5 }), p.steps.map((t, i) => s("circle", { cx: x(i), cy: y(t.kv_bytes), r: 3.5, fill: colour(m) }))]),
    s("line", { class: "here", x1: x(Math.min(state.step, longest - 1)), x2: x(Math.min(state.step, longest - 1)), y1: top, y2: H - bottom }));
  picture.setAttribute("preserveAspectRatio", "xMidYMid meet");
  return h("section", { class: "panel" }, h("h3", {}, "KV cache at rest, step by step"), h("p", {}, "Dashed: what the full cache holds at the same moment."), picture);
}

function render() {
  const pair = DATA.pairs[state.pair], player = byId("player");
  if (!pair) { player.replaceChildren(h("p", { class: "notes" }, "No finished episode yet.")); return; }
  const plays = DATA.methods.filter((m) => pair.plays[m]).map((m) => [m, pair.plays[m]]);
  const count = Math.max(...plays.map(([, p]) => p.steps.length), 0);
  state.step = Math.min(state.step, Math.max(0, count - 1));
  const step = (i) => h("button", { type: "button", "data-step": i, "aria-label": `Step ${i + 1}`, "aria-current": i === state.step ? "step" : null, onclick: () => go(i) }, String(i + 1));
  const controls = h("div", { class: "controls" },
    h("button", { type: "button", class: "ghost", "aria-label": "Previous step", onclick: () => go(state.step - 1) }, "←"),
    h("div", { class: "steps", role: "group", "aria-label": "Steps" }, Array.from({ length: count }, (_, i) => step(i))),
    h("button", { type: "button", class: "ghost", "aria-label": "Next step", onclick: () => go(state.step + 1) }, "→"),
    count > 1 ? h("button", { type: "button", class: "ghost", onclick: play }, state.timer ? "❚❚ pause" : "▶ play") : null);
  player.replaceChildren(h("p", { class: "where" }, `${pair.task} · seed ${pair.seed}`), h("p", { class: "goal" }, pair.goal), controls,
    h("div", { class: "cards" }, plays.map(([m, p]) => card(m, p))), heldPanel(plays) || "", chart(plays) || "");
  history.replaceState(null, "", `#${pair.task}/${pair.seed}/${state.step + 1}`);
  markCurrent();
}

// ---- moving about

function open(index) { stop(); state.pair = index; state.step = 0; render(); }

function go(index) {
  const count = document.querySelectorAll("[data-step]").length;
  state.step = Math.max(0, Math.min(count - 1, index));
  render();
}

function stop() { clearInterval(state.timer); state.timer = 0; }

function play() {
  if (state.timer) { stop(); render(); return; }
  const count = document.querySelectorAll("[data-step]").length;
  if (state.step === count - 1) state.step = -1;
  state.timer = setInterval(() => { if (state.step >= count - 1) { stop(); render(); } else go(state.step + 1); }, 1200);
  go(state.step + 1);
}

function keys(event) {
  if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const move = { ArrowLeft: () => go(state.step - 1), ArrowRight: () => go(state.step + 1) }[event.key];
  if (move) { event.preventDefault(); stop(); move(); }
}

function fromAddress() {
  const [task, seed, step] = decodeURIComponent(location.hash.slice(1)).split("/");
  const index = DATA.pairs.findIndex((p) => p.task === task && String(p.seed) === seed);
  if (index >= 0) { state.pair = index; state.step = Math.max(0, Number(step || 1) - 1); }
}

function start() {
  const root = document.documentElement;
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  byId("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; render(); });
  facts();
  summary();
  taskTiles();
  const tasks = [...new Set(DATA.pairs.map((p) => p.task))];
  byId("task").append(h("option", { value: "" }, "all"), ...tasks.map((t) => h("option", { value: t }, t)));
  byId("task").addEventListener("change", pairList);
  byId("differ").addEventListener("change", pairList);
  const missing = DATA.pairs_played - DATA.pairs.length;
  if (missing) byId("left-out").textContent = `${missing} of ${DATA.pairs_played} episodes were left out to keep this page small; their traces are in the run folder.`;
  document.addEventListener("keydown", keys);
  fromAddress();
  pairList();
  render();
}

start();
