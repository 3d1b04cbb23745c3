// The table of methods and the tiles of tasks.

function facts() {
  const about = DATA.about,
    one = (name, value) => h("span", {}, `${name} `, h("b", {}, String(value)));
  byId("facts").append(
    one("model", about.model),
    one("budget", about.budget),
    one("screenshots in a prompt", about.history),
    one("tasks", about.tasks.length),
    one("episodes per task", about.episodes),
    one("seeds from", about.meta.seed),
    one("on", about.meta.hardware),
  );
  byId("meta").textContent = JSON.stringify(about, null, 2);
  byId("notes").textContent = DATA.notes.join(" ");
}

function successBar(row) {
  const whisker = `left:${row.low * 100}%;width:${(row.high - row.low) * 100}%`;
  return h(
    "div",
    {
      class: "bar",
      role: "img",
      "aria-label": `success ${percent(row.success)}, 95 % interval ${percent(row.low)} to ${percent(row.high)}`,
    },
    h("i", { style: `width:${row.success * 100}%` }),
    h("u", { style: whisker }),
  );
}

function summaryRow(row, scale) {
  const parts = ["prefill", "decode", "browser"];
  const label = parts.map((p) => `${p} ${seconds(row["seconds_" + p])}`).join(", ");
  return h(
    "tr",
    { style: `--c:${colour(row.method)}` },
    h("td", {}, h("span", { class: "method" }, h("i", { class: "dot" }), row.method)),
    h(
      "td",
      { class: "num" },
      percent(row.success),
      " ",
      h("small", {}, `${Math.round(row.low * 100)}–${Math.round(row.high * 100)}, n=${row.n}`),
      successBar(row),
    ),
    h(
      "td",
      { class: "num" },
      percent(row.kv_share),
      " ",
      h("small", {}, `${bytes(row.kv_bytes)} of ${bytes(row.kv_bytes_full)}`),
      h("div", { class: "bar" }, h("i", { style: `width:${Math.min(1, row.kv_share) * 100}%` })),
    ),
    h("td", { class: "num" }, bytes(row.kv_bytes_peak)),
    h("td", { class: "num" }, row.steps.toFixed(1)),
    h("td", { class: "num" }, whole(row.prefill_tokens)),
    h("td", { class: "num" }, row.decode_tokens.toFixed(1)),
    h(
      "td",
      { class: "num" },
      seconds(row.seconds),
      h(
        "div",
        { class: "stack", role: "img", "aria-label": label, title: label },
        parts.map((p) => h("i", { class: p, style: `width:${(row["seconds_" + p] / scale) * 100}%` })),
      ),
    ),
  );
}

function summary() {
  const rows = DATA.rows.filter((r) => r.task === "all");
  const scale = Math.max(...rows.map((r) => r.seconds), 1e-9);
  const key = ["prefill", "decode", "browser"].map((p) => [h("i", { class: `key ${p}` }), p]);
  const heads = [
    "Method",
    "Success (95 % interval)",
    "KV cache at rest, of full",
    "KV peak",
    "Steps",
    "Prompt tokens",
    "Decoded",
    h("span", {}, "Time per step", key),
  ];
  byId("summary").append(
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        heads.map((t) => h("th", { scope: "col" }, t)),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((r) => summaryRow(r, scale)),
    ),
  );
}

function taskTiles() {
  const tasks = [...new Set(DATA.rows.map((r) => r.task))].filter((t) => t !== "all");
  if (tasks.length < 2) return;
  byId("tasks").append(
    ...tasks.map((task) => {
      const bars = DATA.rows
        .filter((r) => r.task === task)
        .map((r) =>
          h(
            "span",
            { style: `--c:${colour(r.method)}`, title: `${r.method}: ${percent(r.success)} of ${r.n}` },
            h("i", { class: "bar" }, h("i", { style: `width:${r.success * 100}%` })),
            percent(r.success),
          ),
        );
      return h(
        "button",
        {
          type: "button",
          class: "task",
          onclick: () => {
            byId("task").value = task;
            pairList();
            open(Number(first().dataset.pair));
            byId("player").scrollIntoView();
          },
        },
        h("b", {}, task),
        bars,
      );
    }),
  );
}
