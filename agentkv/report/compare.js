// Methods step by step: what each kept of every screenshot, and where its actions leave those of the full cache.

// Two answers that could not be read are no more alike than two others.
const alike = (a, b) => Boolean(a && b && a.action) && JSON.stringify(a.action) === JSON.stringify(b.action);

// The first step at which a play is not the other one's, or null; one that ended earlier differs there.
function leaves(play, other) {
  const longest = Math.max(play.steps.length, other.steps.length);
  for (let i = 0; i < longest; i++) if (!alike(play.steps[i], other.steps[i])) return i;
  return null;
}

const meanKept = (frame) => {
  const kept = unpack(frame);
  return kept.reduce((a, b) => a + b, 0) / kept.length / 100;
};

// A bar for each screenshot in the prompt, oldest first: full height = nothing was dropped.
function keptBars(step) {
  const shares = step.frames.map(meanKept),
    W = 34,
    H = 16,
    wide = W / Math.max(1, shares.length);
  const told = shares.map(percent).join(", ");
  return s(
    "svg",
    { viewBox: `0 0 ${W} ${H}`, class: "bars", role: "img", "aria-label": `kept per screenshot: ${told}` },
    s("title", {}, `kept per screenshot, oldest first: ${told}`),
    shares.map((share, i) =>
      s("rect", { x: i * wide, y: H * (1 - share), width: Math.max(1, wide - 1), height: H * share, fill: "var(--c)" }),
    ),
  );
}

function compareCell(step, i, first) {
  const classes = [i === state.step ? "now" : "", first !== null && i >= first ? "apart" : ""].join(" ").trim();
  if (!step) return h("td", { class: classes });
  return h(
    "td",
    { class: classes, onclick: () => go(i) },
    step.frames.length ? keptBars(step) : null,
    h("div", { class: "cell-note num" }, step.kv_bytes_full ? bytes(step.kv_bytes) : ""),
    i === first ? h("span", { class: "apart-mark", title: describe(step.action) }, "≠") : null,
  );
}

function verdict(method, play, base) {
  const first = leaves(play, base[1]);
  if (first === null) return `${method} does what ${base[0]} does`;
  const mine = play.steps[first],
    theirs = base[1].steps[first];
  const ended = (who, steps) => `${who} had ended after step ${steps}`;
  const what = !mine
    ? ended(method, play.steps.length)
    : !theirs
      ? ended(base[0], base[1].steps.length)
      : `${describe(mine.action)} where ${base[0]} does: ${describe(theirs.action)}`;
  return `${method} leaves ${base[0]} at step ${first + 1}: ${what}`;
}

function comparison(plays) {
  if (plays.length < 2) return null;
  const base = plays.find(([m]) => m === "full") ?? plays[0];
  const longest = Math.max(...plays.map(([, p]) => p.steps.length));
  const numbers = Array.from({ length: longest }, (_, i) => i);
  const row = ([method, play]) => {
    const first = play === base[1] ? null : leaves(play, base[1]);
    return h(
      "tr",
      { style: `--c:${colour(method)}` },
      h("th", { scope: "row" }, h("span", { class: "method" }, h("i", { class: "dot" }), method)),
      numbers.map((i) => compareCell(play.steps[i], i, first)),
    );
  };
  const head = h(
    "tr",
    {},
    h("td", {}),
    numbers.map((i) => h("th", { scope: "col" }, `step ${i + 1}`)),
  );
  const others = plays.filter(([, play]) => play !== base[1]);
  return h(
    "section",
    { class: "panel compare" },
    h("h3", {}, `Step by step, against ${base[0]}`),
    h("p", {}, "A bar is what was kept of one screenshot, oldest first; below, the bytes at rest. After ≠ actions differ."),
    h(
      "ul",
      {},
      others.map(([method, play]) => h("li", {}, verdict(method, play, base))),
    ),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, plays.map(row)))),
  );
}
