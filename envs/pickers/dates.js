// Calendars and clocks; values are the texts that the inputs hold: 2026-11-28, 2026-11, 2026-W48, 09:30.
const MONTHS = "January February March April May June July August September October November December".split(" ");
const WEEKDAYS = ["Su", "Mo", "Tu", "We", "Th", "Fr", "Sa"];
const DAY = 86_400_000;
const two = (number, width = 2) => String(number).padStart(width, "0");
const iso = (date) => date.toISOString().slice(0, 10);
const monthOf = (date) => iso(date).slice(0, 7);

function weekOf(date) {
  const thursday = new Date(date.getTime() + (4 - (date.getUTCDay() || 7)) * DAY);
  const days = (thursday - Date.UTC(thursday.getUTCFullYear(), 0, 1)) / DAY;
  return `${two(thursday.getUTCFullYear(), 4)}-W${two(Math.floor(days / 7) + 1)}`;
}

function dateIn(value) {
  const week = /^(\d+)-W(\d+)$/.exec(value);
  if (week) {
    const first = Date.UTC(Number(week[1]), 0, 4);
    return new Date(first + (1 - (new Date(first).getUTCDay() || 7) + 7 * (Number(week[2]) - 1)) * DAY);
  }
  const found = /^(\d+)-(\d+)(?:-(\d+))?/.exec(value);
  return found ? new Date(Date.UTC(Number(found[1]), Number(found[2]) - 1, Number(found[3] ?? 1))) : null;
}

const AS = { date: iso, "datetime-local": iso, month: monthOf, week: weekOf };
const SPAN = { date: 10, "datetime-local": 10, month: 7, week: 8 };

function allowed(input, value) {
  const length = SPAN[input.type];
  return !(input.min && value < input.min.slice(0, length)) && !(input.max && value > input.max.slice(0, length));
}

const button = (text, part, kind = "key") => Object.assign(make(kind, text), { part_: part });

function drawDays(popup, pane) {
  const { at, input } = popup;
  pane.append(
    make("head", "", button("\u2039", { move: [0, -1] }), button(`${MONTHS[at.getUTCMonth()]} ${at.getUTCFullYear()} \u25be`, { months: true }), button("\u203a", { move: [0, 1] })),
  );
  const grid = make("grid", "", ...WEEKDAYS.map((name) => make("day", name)));
  grid.style.gridTemplateColumns = "repeat(7, 32px)";
  const first = Date.UTC(at.getUTCFullYear(), at.getUTCMonth(), 1);
  const start = first - new Date(first).getUTCDay() * DAY;
  for (let n = 0; n < 42; n++) {
    const day = new Date(start + n * DAY);
    const value = AS[input.type](day);
    const strange = day.getUTCMonth() !== at.getUTCMonth() || !allowed(input, value);
    const drawn = make(strange ? "off" : "", String(day.getUTCDate()));
    if (allowed(input, value)) drawn.part_ = { day };
    if (AS[input.type](at) === value) drawn.classList.add("on");
    grid.append(drawn);
  }
  pane.append(grid, make("head", "", button("Clear", { clear: true }, "key link"), button("Today", { today: true }, "key link")));
}

function drawMonths(popup, pane) {
  const { at, input } = popup;
  const year = at.getUTCFullYear();
  const go = (text, years) => button(text, { move: [years, 0] });
  pane.append(make("head", "", go("\u00ab", -10), go("\u2039", -1), make("", String(year)), go("\u203a", 1), go("\u00bb", 10)));
  const grid = make("grid");
  grid.style.gridTemplateColumns = "repeat(4, 56px)";
  MONTHS.forEach((name, month) => {
    const first = new Date(Date.UTC(year, month, 1));
    const open = input.type !== "month" || allowed(input, monthOf(first));
    const drawn = make(open ? "" : "off", name.slice(0, 3));
    if (open) drawn.part_ = { month: first };
    if (month === at.getUTCMonth()) drawn.classList.add("on");
    grid.append(drawn);
  });
  pane.append(grid);
  if (input.type === "month") pane.append(make("head", "", button("Clear", { clear: true }, "key link"), button("This month", { today: true }, "key link")));
}

const CLOCK = [
  ["hour", 12, (n) => two(n === 0 ? 12 : n)],
  ["minute", 60, two],
  ["half", 2, (n) => ["AM", "PM"][n]],
];

function drawClock(popup, pane) {
  for (const [unit, count, name] of CLOCK) {
    const column = make("rows");
    column.style.cssText = "height: 250px; width: 48px; text-align: center";
    for (let n = 0; n < count; n++) {
      const drawn = Object.assign(make("row", name(n)), { part_: { unit, n } });
      if (popup.time[unit] === n) drawn.classList.add("on");
      column.append(drawn);
    }
    pane.append(column);
  }
}

function draw(popup) {
  const held = [...popup.body.querySelectorAll(".rows")].map((column) => column.scrollTop);
  const panes = make("side");
  if (popup.at) {
    const pane = make("");
    (popup.months ? drawMonths : drawDays)(popup, pane);
    panes.append(pane);
  }
  if (popup.time) drawClock(popup, panes);
  popup.body.replaceChildren(panes);
  popup.body.querySelectorAll(".rows").forEach((column, n) => {
    if (held.length) column.scrollTop = held[n];
    else column.querySelector(".on")?.scrollIntoView({ block: "start" });
  });
  popup.place?.();
}

function timeText({ hour, minute, half }) {
  return `${two(hour + 12 * half)}:${two(minute)}`;
}

function commit(popup) {
  const { input, at, time } = popup;
  const day = at && AS[input.type](at);
  give(input, day && time ? `${day}T${timeText(time)}` : (day ?? timeText(time)));
}

function openDates(input) {
  const now = new Date(Date.now() - new Date().getTimezoneOffset() * 60_000);
  const clock = /(\d\d):(\d\d)/.exec(input.value) ?? ["", two(now.getUTCHours()), two(now.getUTCMinutes())];
  const timed = input.type === "time" || input.type === "datetime-local";
  const popup = {
    owner: input,
    input,
    modal: true,
    body: make("popup"),
    months: input.type === "month",
    at: input.type === "time" ? null : (dateIn(input.value) ?? dateIn(iso(now))),
    time: timed ? { hour: clock[1] % 12, minute: Number(clock[2]), half: clock[1] >= 12 ? 1 : 0 } : null,
  };
  const before = input.value;
  const shift = (years, months, days = 0) => {
    const { at } = popup;
    const last = new Date(Date.UTC(at.getUTCFullYear() + years, at.getUTCMonth() + months + 1, 0)).getUTCDate();
    const day = days ? at.getUTCDate() + days : Math.min(at.getUTCDate(), last);
    popup.at = new Date(Date.UTC(at.getUTCFullYear() + years, at.getUTCMonth() + months, day));
  };
  const settled = () => {
    commit(popup);
    if (!popup.time) popup.close();
  };
  popup.choose = (part) => {
    if (part.move) shift(...part.move);
    if (part.months) popup.months = true;
    if (part.today) popup.at = dateIn(iso(now));
    if (part.day) popup.at = part.day;
    if (part.unit) popup.time[part.unit] = part.n;
    if (part.month) {
      popup.at = part.month;
      popup.months = input.type === "month";
    }
    if (part.unit) commit(popup);
    if (part.day || part.today || (part.month && popup.months)) settled();
    if (part.clear) {
      give(input, "");
      popup.close();
    }
    if (stage.shown === popup) draw(popup);
  };
  const moves = { ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], ArrowUp: [0, 0, -7], ArrowDown: [0, 0, 7], PageUp: [0, -1], PageDown: [0, 1] };
  const months = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [0, -4], ArrowDown: [0, 4], PageUp: [-1, 0], PageDown: [1, 0] };
  popup.key = (event) => {
    const move = popup.at && (popup.months ? months : moves)[event.key];
    if (event.key === "Enter" || event.key === " ") {
      commit(popup);
      popup.close();
    } else if (move) {
      shift(...move);
      draw(popup);
    } else return false;
    return true;
  };
  popup.cancel = () => give(input, before);
  draw(popup);
  show(popup);
  draw(popup);
}
