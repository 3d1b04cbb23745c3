// What was still in the cache at one step, and how large the cache was over the episode.

function heldCell(frame, method, viewport, current) {
  const kept = unpack(frame),
    mean = kept.reduce((a, b) => a + b, 0) / kept.length / 100;
  const alt = `Screenshot of step ${frame.step + 1}: ${method} kept ${percent(mean)} of its visual tokens`;
  return h(
    "td",
    {},
    shot(
      frame.image,
      alt,
      Math.min(250, widthFor(viewport, current ? 170 : 145)),
      state.overlay === "off" ? null : overlay(frame, method),
    ),
    h("div", { class: "cell-note num" }, `${percent(mean)} kept`),
  );
}

function heldPanel(plays) {
  const rows = plays.filter(([, play]) => play.steps[state.step] && play.steps[state.step].frames.length);
  if (!rows.length) return null;
  const numbers = [...new Set(rows.flatMap(([, p]) => p.steps[state.step].frames.map((f) => f.step)))].sort(
    (a, b) => a - b,
  );
  const button = (name, text) =>
    h(
      "button",
      {
        type: "button",
        "aria-pressed": state.overlay === name,
        onclick: () => {
          state.overlay = name;
          render();
        },
      },
      text,
    );
  const head = h(
    "tr",
    {},
    h("td", {}),
    numbers.map((n) => h("th", { scope: "col" }, n === state.step ? `step ${n + 1}: now` : `step ${n + 1}`)),
  );
  const body = rows.map(([method, play]) => {
    const step = play.steps[state.step];
    return h(
      "tr",
      { style: `--c:${colour(method)}` },
      h("th", { scope: "row" }, h("span", { class: "method" }, h("i", { class: "dot" }), method)),
      numbers.map((n) => {
        const f = step.frames.find((g) => g.step === n);
        return f ? heldCell(f, method, step.viewport, n === state.step) : h("td", {});
      }),
    );
  });
  return h(
    "section",
    { class: "panel" },
    h("h3", {}, "What was still in the cache"),
    h(
      "p",
      {},
      "The screenshots of the prompt, oldest first. A cell is one visual token; the stronger it shows, the more " +
        "layers and heads still held it when the answer was decoded.",
    ),
    h(
      "div",
      { class: "controls" },
      h(
        "div",
        { class: "seg", role: "group", "aria-label": "Overlay" },
        button("kept", "what is left"),
        button("tint", "tint"),
        button("off", "off"),
      ),
    ),
    h("div", { class: "scroll" }, h("table", { class: "held" }, h("thead", {}, head), h("tbody", {}, body))),
  );
}

function chart(plays) {
  const longest = Math.max(...plays.map(([, p]) => p.steps.length)),
    full = Math.max(...plays.flatMap(([, p]) => p.steps.map((t) => Math.max(t.kv_bytes_full, t.kv_bytes))), 0);
  if (!full || longest < 2) return null;
  const W = 900,
    H = 130,
    left = 70,
    right = 14,
    top = 10,
    bottom = 22;
  const x = (i) => left + (i / (longest - 1)) * (W - left - right),
    y = (v) => H - bottom - (v / full) * (H - top - bottom);
  const line = (steps, key, look) =>
    s("polyline", { points: steps.map((t, i) => `${x(i)},${y(t[key])}`).join(" "), fill: "none", ...look });
  const deepest = plays.reduce((a, b) => (b[1].steps.length > a[1].steps.length ? b : a))[1];
  const picture = s(
    "svg",
    { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "KV bytes at rest per step and method" },
    [0, 0.5, 1].map((v) => [
      s("line", { class: "axis", x1: left, x2: W - right, y1: y(v * full), y2: y(v * full) }),
      s("text", { x: left - 8, y: y(v * full) + 4, "text-anchor": "end" }, v ? bytes(v * full) : "0"),
    ]),
    deepest.steps.map((_, i) => s("text", { x: x(i), y: H - 6, "text-anchor": "middle" }, String(i + 1))),
    line(deepest.steps, "kv_bytes_full", { stroke: "var(--soft)", "stroke-dasharray": "5 4", "stroke-width": 1.5 }),
    // Later lines are thinner, so that equal ones stay visible under each other.
    plays.map(([m, p], k) => [
      line(p.steps, "kv_bytes", { stroke: colour(m), "stroke-width": Math.max(1.5, 6 - 2 * k) }),
      p.steps.map((t, i) => s("circle", { cx: x(i), cy: y(t.kv_bytes), r: 3.5, fill: colour(m) })),
    ]),
    s("line", {
      class: "here",
      x1: x(Math.min(state.step, longest - 1)),
      x2: x(Math.min(state.step, longest - 1)),
      y1: top,
      y2: H - bottom,
    }),
  );
  return h(
    "section",
    { class: "panel" },
    h("h3", {}, "KV cache at rest, step by step"),
    h("p", {}, "Dashed: what the full cache holds at the same moment."),
    picture,
  );
}
