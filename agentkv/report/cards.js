// What each method did at one step.

// A drag or a scroll may start where the pointer is.
const at = (a) => (a.x === null ? "the pointer" : `(${a.x}, ${a.y})`);
const ACTS = {
  Click: (a) => `click ${at(a)}`,
  DoubleClick: (a) => `double click ${at(a)}`,
  TripleClick: (a) => `triple click ${at(a)}`,
  RightClick: (a) => `right click ${at(a)}`,
  MiddleClick: (a) => `middle click ${at(a)}`,
  LongPress: (a) => `long press ${at(a)}`,
  Move: (a) => `move to ${at(a)}`,
  Drag: (a) => `drag ${at(a)} to (${a.to_x}, ${a.to_y})`,
  Scroll: (a) => `scroll ${a.direction} by ${a.pixels} at ${at(a)}`,
  Type: (a) => `type “${a.text}”`,
  Hotkey: (a) => `press ${a.keys.join(" + ")}`,
  KeyDown: (a) => `hold ${a.key}`,
  KeyUp: (a) => `let go of ${a.key}`,
  PressBack: () => "go back",
  PressHome: () => "press home",
  OpenApp: (a) => `open the app ${a.name}`,
  Wait: (a) => `wait ${a.seconds} s`,
  Finished: (a) => (a.answer ? `finished: ${a.answer}` : "finished"),
  CallUser: (a) => (a.question ? `asks the user: ${a.question}` : "asks the user"),
  Goto: (a) => `open ${a.url}`,
  Reload: () => "load the page again",
  Note: (a) => `note “${a.text}”`,
  Several: (a) => a.actions.map((part) => ACTS[part.type](rounded(part))).join(", then "),
};
const rounded = (action) =>
  Object.fromEntries(Object.entries(action).map(([k, v]) => [k, typeof v === "number" ? Math.round(v * 10) / 10 : v]));
const describe = (action) => (action ? ACTS[action.type](rounded(action)) : "no action: the answer could not be read");

function figures(step) {
  const rows = [["reward", step.reward.toFixed(2)]];
  if (step.kv_bytes_full) {
    rows.push(
      ["KV at rest", `${bytes(step.kv_bytes)}, ${percent(step.kv_bytes / step.kv_bytes_full)}`],
      ["KV peak", bytes(step.kv_bytes_peak)],
      ["tokens in", whole(step.prefill_tokens)],
      ["stored", whole(step.tokens_stored)],
      ["out", whole(step.decode_tokens)],
    );
  }
  const phases = ["prefill", "decode", "browser"].filter((p) => step[`seconds_${p}`] > 0);
  rows.push(...phases.map((p) => [p, seconds(step[`seconds_${p}`])]));
  return h(
    "dl",
    { class: "figs" },
    rows.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]),
  );
}

function card(method, play) {
  const step = play.steps[state.step],
    last = state.step === play.steps.length - 1;
  const badge =
    last || !step
      ? h(
          "span",
          { class: `badge ${play.success ? "won" : "lost"}` },
          play.success ? "solved" : play.stop === "done" ? `failed, reward ${play.reward.toFixed(2)}` : play.stop,
        )
      : h("span", { class: "badge" }, "goes on");
  const head = h("header", {}, h("span", { class: "method" }, h("i", { class: "dot" }), method), badge);
  const box = (...children) =>
    h(
      "section",
      { class: "card", style: `--c:${colour(method)}`, "aria-label": `${method}, step ${state.step + 1}` },
      head,
      children,
    );
  if (!step)
    return box(
      h(
        "div",
        { class: "gone" },
        play.steps_played > play.steps.length
          ? `step ${state.step + 1} is not in this page`
          : `ended after step ${play.steps.length}`,
      ),
    );
  const pointed = (step.action?.actions ?? [step.action]).find((a) => a && typeof a.x === "number");
  const point = pointed ? marker(pointed, step.viewport, method) : null;
  const said = h(
    "div",
    { class: "info" },
    h("p", { class: "did" }, describe(step.action)),
    h("pre", { class: "said", "aria-label": "what the model said" }, step.text),
    step.error ? h("p", { class: "wrong" }, step.error) : null,
    step.left_out ? h("p", { class: "wrong" }, step.left_out) : null,
    step.reason ? h("p", { class: "cell-note" }, step.reason) : null,
    step.blocked.length
      ? h("p", { class: "wrong" }, `refused: ${step.blocked.map((b) => `${b.kind} ${b.url} (${b.reason})`).join(", ")}`)
      : null,
    (step.told ?? []).length ? h("p", { class: "cell-note" }, `told: ${step.told.join("; ")}`) : null,
    figures(step),
  );
  const alt = `Screenshot before step ${state.step + 1}; ${describe(step.action)}`;
  return box(h("div", { class: "body" }, shot(step.image, alt, widthFor(step.viewport, 230), point), said));
}
