// The list of episodes, one drawn step, and moving about.

const first = () => document.querySelector(".pair");
const differs = (pair) => new Set(Object.values(pair.plays).map((p) => p.success)).size > 1;

function pairButton(pair, index) {
  const marks = DATA.methods
    .filter((m) => pair.plays[m])
    .map((m) => {
      const won = pair.plays[m].success;
      return h(
        "i",
        { class: won ? "won" : "", style: `--c:${colour(m)}`, title: `${m}: ${won ? "solved" : "not solved"}` },
        won ? "✓" : "✕",
      );
    });
  return h(
    "button",
    { type: "button", class: "pair", "data-pair": index, onclick: () => open(index) },
    `seed ${pair.seed}`,
    h("span", { class: "marks" }, marks),
  );
}

function pairList() {
  const task = byId("task").value,
    box = byId("pairs"),
    groups = new Map();
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
  for (const node of document.querySelectorAll(".pair"))
    node.setAttribute("aria-current", Number(node.dataset.pair) === state.pair);
}

// A step is drawn anew, so the button that was pressed is another node afterwards: give it the focus back.
function render() {
  const name = (node) => node.getAttribute("aria-label") || node.textContent;
  const pressed =
    byId("player").contains(document.activeElement) && document.activeElement.tagName === "BUTTON"
      ? name(document.activeElement)
      : null;
  draw();
  if (pressed) [...byId("player").querySelectorAll("button")].find((b) => name(b) === pressed)?.focus();
}

function draw() {
  const pair = DATA.pairs[state.pair],
    player = byId("player");
  if (!pair) {
    player.replaceChildren(h("p", { class: "notes" }, "No finished episode yet."));
    return;
  }
  const plays = DATA.methods.filter((m) => pair.plays[m]).map((m) => [m, pair.plays[m]]);
  const count = Math.max(...plays.map(([, p]) => p.steps.length), 0);
  state.step = Math.min(state.step, Math.max(0, count - 1));
  const step = (i) =>
    h(
      "button",
      {
        type: "button",
        "data-step": i,
        "aria-label": `Step ${i + 1}`,
        "aria-current": i === state.step ? "step" : null,
        onclick: () => go(i),
      },
      String(i + 1),
    );
  const controls = h(
    "div",
    { class: "controls" },
    h(
      "button",
      { type: "button", class: "ghost", "aria-label": "Previous step", onclick: () => go(state.step - 1) },
      "←",
    ),
    h(
      "div",
      { class: "steps", role: "group", "aria-label": "Steps" },
      Array.from({ length: count }, (_, i) => step(i)),
    ),
    h("button", { type: "button", class: "ghost", "aria-label": "Next step", onclick: () => go(state.step + 1) }, "→"),
    count > 1
      ? h("button", { type: "button", class: "ghost", onclick: play }, state.timer ? "❚❚ pause" : "▶ play")
      : null,
  );
  player.replaceChildren(
    h("p", { class: "where" }, `${pair.task} · seed ${pair.seed}`),
    h("p", { class: "goal" }, pair.goal),
    controls,
    h(
      "div",
      { class: "cards" },
      plays.map(([m, p]) => card(m, p)),
    ),
    heldPanel(plays) || "",
    comparison(plays) || "",
    chart(plays) || "",
  );
  byId("said").textContent = `Step ${state.step + 1} of ${count}`;
  history.replaceState(null, "", `#${pair.task}/${pair.seed}/${state.step + 1}`);
  markCurrent();
}

function open(index) {
  stop();
  state.pair = index;
  state.step = 0;
  render();
}

function go(index) {
  const count = document.querySelectorAll("[data-step]").length;
  state.step = Math.max(0, Math.min(count - 1, index));
  render();
}

function stop() {
  clearInterval(state.timer);
  state.timer = 0;
}

function play() {
  if (state.timer) {
    stop();
    render();
    return;
  }
  const count = document.querySelectorAll("[data-step]").length;
  if (state.step === count - 1) state.step = -1;
  state.timer = setInterval(() => {
    if (state.step >= count - 1) {
      stop();
      render();
    } else go(state.step + 1);
  }, 1200);
  go(state.step + 1);
}

function keys(event) {
  if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const move = { ArrowLeft: () => go(state.step - 1), ArrowRight: () => go(state.step + 1) }[event.key];
  if (move) {
    event.preventDefault();
    stop();
    move();
  }
}

function fromAddress() {
  const [task, seed, step] = decodeURIComponent(location.hash.slice(1)).split("/");
  const index = DATA.pairs.findIndex((p) => p.task === task && String(p.seed) === seed);
  if (index >= 0) {
    state.pair = index;
    state.step = Math.max(0, Number(step || 1) - 1);
  }
}

function start() {
  const root = document.documentElement;
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    render();
  });
  facts();
  summary();
  taskTiles();
  const tasks = [...new Set(DATA.pairs.map((p) => p.task))];
  byId("task").append(h("option", { value: "" }, "all"), ...tasks.map((t) => h("option", { value: t }, t)));
  byId("task").addEventListener("change", pairList);
  byId("differ").addEventListener("change", pairList);
  const missing = DATA.pairs_played - DATA.pairs.length;
  if (missing)
    byId("left-out").textContent =
      `${missing} of ${DATA.pairs_played} episodes were left out to keep this page small; ` +
      "their traces are in the run folder.";
  document.addEventListener("keydown", keys);
  fromAddress();
  pairList();
  render();
}

start();
