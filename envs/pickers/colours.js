// The colour of an <input type=color>: a field of shades, a bar of hues, the datalist's or some usual colours.
const USUAL = "#000000 #7f7f7f #ffffff #ff0000 #ff7f00 #ffff00 #00ff00 #00ffff #0000ff #7f00ff #ff00ff #7f3f00".split(" ");
const [WIDE, HIGH, BAR] = [200, 120, 14];

function toHsv(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16) / 255);
  const [top, gap] = [Math.max(r, g, b), Math.max(r, g, b) - Math.min(r, g, b)];
  const turn = gap === 0 ? 0 : top === r ? (g - b) / gap : top === g ? 2 + (b - r) / gap : 4 + (r - g) / gap;
  return { hue: ((turn + 6) % 6) / 6, shade: top === 0 ? 0 : gap / top, light: top };
}

function toHex({ hue, shade, light }) {
  const channel = (n) => {
    const k = (n + hue * 6) % 6;
    return two(Math.round(255 * light * (1 - shade * Math.max(0, Math.min(k, 4 - k, 1)))).toString(16));
  };
  return `#${channel(5)}${channel(3)}${channel(1)}`;
}

function drawColours(popup) {
  const { colour } = popup;
  const area = (width, height, background, part, left, top) => {
    const made = Object.assign(make(""), { part_: part });
    made.style.cssText = `position: relative; width: ${width}px; height: ${height}px; margin: 6px; background: ${background}`;
    const dot = make("");
    dot.style.cssText = `position: absolute; left: ${left - 4}px; top: ${top - 4}px; width: 8px; height: 8px; border: 2px solid #fff; outline: 1px solid #000; border-radius: 50%`;
    made.append(dot);
    part.drawn = made;
    return made;
  };
  const pure = toHex({ hue: colour.hue, shade: 1, light: 1 });
  const field = `linear-gradient(#0000, #000), linear-gradient(90deg, #fff, ${pure})`;
  const hues = "linear-gradient(90deg, #f00, #ff0, #0f0, #0ff, #00f, #f0f, #f00)";
  const swatches = make("grid");
  swatches.style.gridTemplateColumns = "repeat(6, 30px)";
  for (const hex of popup.swatches) {
    const made = Object.assign(make(""), { part_: { hex } });
    made.style.cssText = `height: 20px; margin: 2px; border: 1px solid #767676; background: ${hex}`;
    swatches.append(made);
  }
  popup.body.replaceChildren(
    area(WIDE, HIGH, field, { field: true }, colour.shade * WIDE, (1 - colour.light) * HIGH),
    area(WIDE, BAR, hues, { hues: true }, colour.hue * WIDE, BAR / 2),
    swatches,
    make("head", "", make("", popup.typed || toHex(colour)), button("OK", { done: true }, "key link")),
  );
}

function openColours(input) {
  const before = input.value;
  const own = [...(input.list?.options ?? [])].map((option) => option.value).filter((value) => /^#[0-9a-f]{6}$/i.test(value));
  const popup = { owner: input, modal: true, body: make("popup"), colour: toHsv(before), swatches: own.length ? own : USUAL, typed: "" };
  const set = (colour) => {
    popup.colour = colour;
    const value = toHex(colour);
    if (input.value !== value) {
      input.value = value;
      tell(input, "input");
    }
    drawColours(popup);
  };
  popup.choose = (part, x, y) => {
    if (part.done) return popup.close();
    if (part.hex) return set(toHsv(part.hex));
    const box = part.drawn.getBoundingClientRect();
    const across = Math.max(0, Math.min(1, (x - box.left) / box.width));
    const down = Math.max(0, Math.min(1, (y - box.top) / box.height));
    set(part.hues ? { ...popup.colour, hue: Math.min(across, 0.9999) } : { ...popup.colour, shade: across, light: 1 - down });
  };
  popup.key = (event) => {
    if (event.key === "Enter") popup.close();
    else if (event.key === "Backspace") popup.typed = popup.typed.slice(0, -1);
    else if (/^[#0-9a-f]$/i.test(event.key) && popup.typed.length < 7) popup.typed += event.key;
    else return false;
    const typed = /^#?([0-9a-f]{6})$/i.exec(popup.typed);
    if (typed) {
      popup.typed = "";
      set(toHsv(`#${typed[1].toLowerCase()}`));
    }
    if (stage.shown === popup) drawColours(popup);
    return true;
  };
  popup.cancel = () => {
    if (input.value !== before) set(toHsv(before));
  };
  popup.closed = () => {
    if (input.value !== before) tell(input, "change");
  };
  drawColours(popup);
  show(popup);
}
