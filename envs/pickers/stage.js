// What Chromium draws in windows of its own is missing in a picture of the page, so it is drawn again inside the page:
// one popup at a time, in the top layer of the outermost document that this frame may touch. This world is isolated:
// the page sees none of its variables, and the popup's content is closed to it.
const outer = (() => {
  let reached = window;
  try {
    while (reached.parent !== reached && reached.parent.document) reached = reached.parent;
  } catch {
    // a frame of another origin ends the climb
  }
  return reached;
})();
const stage = (outer.__stage ??= { shown: null });

const LOOK = `
  :host { all: initial; }
  * { box-sizing: border-box; margin: 0; }
  .popup { font: 13px Arial, sans-serif; color: #1f1f1f; background: #fff; border: 1px solid #767676;
    box-shadow: 0 2px 8px #0005; overflow: hidden; user-select: none; cursor: default; }
  .rows { overflow-y: auto; }
  .row { padding: 2px 8px; white-space: pre; line-height: 1.3; min-height: 1.3em; }
  .group { font-weight: bold; padding: 2px 4px; }
  .in { padding-left: 20px; }
  .off { color: #9e9e9e; }
  .on { background: #1a73e8; color: #fff; }
  .note { font-size: 12px; color: #5f6368; margin-left: 12px; }
  .head { display: flex; align-items: center; justify-content: space-between; padding: 6px; font-weight: bold; }
  .key { padding: 4px 8px; border-radius: 3px; }
  .key.link { color: #1a73e8; font-weight: normal; }
  .grid { display: grid; text-align: center; padding: 0 6px 6px; }
  .grid > * { padding: 5px; border-radius: 3px; }
  .day { color: #5f6368; }
  .side { display: flex; }
  .bubble { padding: 8px 12px; max-width: 300px; border-radius: 4px; white-space: pre-wrap; }
`;

const make = (kind, text = "", ...children) => {
  const made = outer.document.createElement("div");
  made.className = kind;
  made.append(text, ...children);
  return made;
};

function placeOf(owner) {
  const box = owner.getBoundingClientRect();
  let [left, top] = [box.left, box.top];
  for (let frame = owner.ownerDocument.defaultView; frame !== outer; frame = frame.parent) {
    const edge = frame.frameElement.getBoundingClientRect();
    left += edge.left + frame.frameElement.clientLeft;
    top += edge.top + frame.frameElement.clientTop;
  }
  return { left, top, width: box.width, height: box.height };
}

// beside a modal dialog everything is inert, so the popup must be a part of it
function holder(owner) {
  for (let inside = owner; inside; inside = inside.ownerDocument.defaultView.frameElement) {
    if (inside.ownerDocument === outer.document) return inside.closest("dialog:modal") ?? outer.document.documentElement;
  }
  return outer.document.documentElement;
}

// `popup`: {owner, body, modal, key(event) -> taken, choose(part), hover(part), closed()}; its parts are elements with
// `part`, an object of the popup's own
function show(popup) {
  stage.shown?.close();
  const host = outer.document.createElement("div");
  host.popover = "manual";
  host.style.cssText = "all: initial !important; position: fixed !important; z-index: 2147483647 !important;";
  const root = host.attachShadow({ mode: "closed" });
  const style = outer.document.createElement("style");
  style.textContent = LOOK;
  root.append(style, popup.body);
  holder(popup.owner).append(host);
  host.showPopover();
  popup.inside = (x, y) => {
    const box = host.getBoundingClientRect();
    return x >= box.left && x < box.right && y >= box.top && y < box.bottom;
  };
  popup.partAt = (x, y) => {
    for (let found = root.elementFromPoint(x, y); found; found = found.parentElement) if (found.part_) return found.part_;
    return null;
  };
  popup.place = () => {
    const [at, size] = [placeOf(popup.owner), host.getBoundingClientRect()];
    const below = at.top + at.height + size.height <= outer.innerHeight || at.top < size.height;
    const top = below ? Math.min(at.top + at.height, outer.innerHeight - size.height) : at.top - size.height;
    const left = Math.min(at.left, outer.innerWidth - size.width);
    host.style.setProperty("left", `${Math.max(0, left)}px`, "important");
    host.style.setProperty("top", `${Math.max(0, top)}px`, "important");
  };
  popup.close = () => {
    if (stage.shown !== popup) return;
    stage.shown = null;
    host.remove();
    popup.closed?.();
  };
  popup.place();
  stage.shown = popup;
  return popup;
}

function give(owner, value) {
  if (owner.value === value) return;
  owner.value = value;
  tell(owner, "input");
  tell(owner, "change");
}
const tell = (owner, type) => owner.dispatchEvent(new Event(type, { bubbles: true, composed: type === "input" }));
