// The list of a <select> and the suggestions of an <input list>.
const LONGEST = 20;
const OUT_OF_SIGHT = "none";

function rowsOf(popup, rows) {
  const list = make("rows");
  for (const row of rows) {
    const drawn = make(`row ${row.kind}`, row.text);
    if (row.note) drawn.append(Object.assign(make("note", row.note), { style: "display: inline" }));
    if (row.style) drawn.style.cssText = row.style;
    if (row.value !== undefined) drawn.part_ = row;
    row.drawn = drawn;
    list.append(drawn);
  }
  popup.body.replaceChildren(list);
  popup.list = list;
  popup.rows = rows.filter((row) => row.value !== undefined);
  return popup;
}

function fit(popup, rows) {
  const height = rows[0]?.drawn.getBoundingClientRect().height ?? 0;
  popup.list.style.maxHeight = `${Math.min(LONGEST * height, outer.innerHeight - 4)}px`;
  popup.place();
}

function mark(popup, row) {
  popup.marked?.drawn.classList.remove("on");
  popup.marked = row;
  row?.drawn.classList.add("on");
}

function step(popup, by) {
  const at = popup.rows.indexOf(popup.marked);
  const to = at < 0 ? (by > 0 ? 0 : popup.rows.length - 1) : Math.max(0, Math.min(popup.rows.length - 1, at + by));
  mark(popup, popup.rows[to]);
  popup.marked?.drawn.scrollIntoView({ block: "nearest" });
}

const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: LONGEST - 1, PageUp: 1 - LONGEST };

function optionRows(select) {
  const colours = (element) => {
    const { color, backgroundColor } = getComputedStyle(element);
    return backgroundColor === "rgba(0, 0, 0, 0)" ? "" : `color: ${color}; background: ${backgroundColor}`;
  };
  const rows = [];
  const add = (option, inside, off) => {
    if (getComputedStyle(option).display === OUT_OF_SIGHT) return;
    const kind = `${inside ? "in" : ""} ${off || option.disabled ? "off" : ""}`;
    rows.push({ kind, text: option.label, style: colours(option), value: off || option.disabled ? undefined : option });
  };
  for (const child of select.querySelectorAll(":scope > option, :scope > optgroup, :scope > hr")) {
    if (child.localName === "option") add(child, false, false);
    if (child.localName === "optgroup" && getComputedStyle(child).display !== OUT_OF_SIGHT) {
      rows.push({ kind: `group ${child.disabled ? "off" : ""}`, text: child.label });
      for (const option of child.querySelectorAll("option")) add(option, true, child.disabled);
    }
  }
  return rows;
}

function openSelect(select) {
  const popup = { owner: select, modal: true, body: make("popup") };
  const rows = optionRows(select);
  const { fontSize, fontFamily } = getComputedStyle(select);
  popup.body.style.cssText = `font-size: ${fontSize}; font-family: ${fontFamily}`;
  popup.body.style.minWidth = `${select.getBoundingClientRect().width}px`;
  rowsOf(popup, rows);
  popup.choose = (row) => {
    popup.close();
    if (row.value.selected) return;
    row.value.selected = true;
    tell(select, "input");
    tell(select, "change");
  };
  popup.hover = (row) => mark(popup, row);
  let [typed, at] = ["", 0];
  const search = (letter, now) => {
    typed = now - at > 1000 ? letter : typed + letter;
    at = now;
    const found = popup.rows.find((row) => row.text.trim().toLowerCase().startsWith(typed.toLowerCase()));
    if (found) step(popup, popup.rows.indexOf(found) - popup.rows.indexOf(popup.marked));
  };
  popup.key = (event) => {
    if (event.key in STEPS) step(popup, STEPS[event.key]);
    else if (event.key === "Home" || event.key === "End") step(popup, event.key === "Home" ? -1e9 : 1e9);
    else if (event.key === "Enter" || (event.key === " " && !typed)) popup.marked && popup.choose(popup.marked);
    else if (event.key === "Tab") popup.marked && popup.choose(popup.marked);
    else if (event.key.length === 1 && !event.ctrlKey && !event.altKey) search(event.key, event.timeStamp);
    return event.key !== "Tab";
  };
  show(popup);
  fit(popup, rows);
  mark(popup, popup.rows.find((row) => row.value.selected));
  popup.marked?.drawn.scrollIntoView({ block: "center" });
}

function suggestions(input) {
  const wanted = input.value.toLowerCase();
  return [...input.list.options]
    .filter((option) => !option.disabled && `${option.value}\n${option.label}`.toLowerCase().includes(wanted))
    .map((option) => ({ kind: "", text: option.value, note: option.label === option.value ? "" : option.label, value: option.value }));
}

function openSuggestions(input) {
  const rows = suggestions(input);
  if (!rows.length) return;
  const popup = rowsOf({ owner: input, modal: false, body: make("popup") }, rows);
  popup.body.style.minWidth = `${input.getBoundingClientRect().width}px`;
  popup.choose = (row) => {
    popup.close();
    give(input, row.value);
  };
  popup.hover = (row) => mark(popup, row);
  popup.key = (event) => {
    if (event.key in STEPS) step(popup, STEPS[event.key]);
    else if (event.key === "Enter" && popup.marked) popup.choose(popup.marked);
    else return false;
    return true;
  };
  show(popup);
  fit(popup, rows);
}
