// Input reaches a popup first; what opens Chromium's own popup is noticed afterwards and replaced.
const MOUSE = "pointerdown mousedown pointerup mouseup click dblclick auxclick contextmenu pointermove mousemove wheel".split(" ");
let refused = null; // the owner whose popup was just closed by a press on it

function openFor(owner) {
  if (owner === refused || stage.shown?.owner === owner) return;
  if (owner.localName === "select") openSelect(owner);
  else if (owner.type === "color") openColours(owner);
  else if (owner.type in AS || owner.type === "time") openDates(owner);
}

// no event tells that Chromium closes its popup for an element that is not drawn any more, and the focus stays
function closeNative(owner) {
  const style = owner.getAttribute("style");
  owner.style.setProperty("display", "none", "important");
  owner.offsetWidth;
  if (style === null) owner.removeAttribute("style");
  else owner.setAttribute("style", style);
}

function replaceNative(...roots) {
  for (const root of roots) {
    for (const owner of root.querySelectorAll("select:open, input:open")) {
      if (owner.localName === "select" && getComputedStyle(owner).appearance === "base-select") continue;
      closeNative(owner);
      openFor(owner);
    }
  }
}

function rootsOf(event) {
  const roots = event.composedPath().filter((node) => node instanceof ShadowRoot);
  return [document, ...roots];
}

function onMouse(event) {
  const popup = stage.shown;
  if (!event.isTrusted) return;
  if (popup && window === outer && popup.inside(event.clientX, event.clientY)) {
    event.stopImmediatePropagation();
    // a pointer event that is prevented has no mouse events after it, and the wheel shall turn the popup's own rows
    if (!event.type.startsWith("pointer") && event.type !== "wheel") event.preventDefault();
    const part = popup.partAt(event.clientX, event.clientY);
    if (event.type === "mousemove" && part) popup.hover?.(part);
    if (event.type === "mouseup" && event.button === 0 && part) popup.choose?.(part, event.clientX, event.clientY);
    return;
  }
  if (event.type === "mousedown") {
    const target = event.composedPath()[0];
    refused = popup && popup.owner === target ? target : null;
    popup?.close();
    const suggests = target.localName === "input" && target.list && !(target.type in AS) && !["color", "range", "time"].includes(target.type);
    if (suggests && event.button === 0 && refused !== target) setTimeout(() => event.defaultPrevented || openSuggestions(target));
  }
  if (event.type === "wheel" && popup) popup.close();
  if (event.type === "wheel" && event.ctrlKey) setTimeout(() => event.defaultPrevented || send({ keys: ["Control", "wheel"] }));
  const apart = event.type === "auxclick" ? event.button === 1 : event.type === "click" && (event.ctrlKey || event.shiftKey);
  if (apart && event.composedPath().some((node) => node.localName === "a" && node.href))
    setTimeout(() => event.defaultPrevented || send({ coming: "tab" }));
  if (event.type === "mousedown" || event.type === "click") setTimeout(replaceNative, 0, ...rootsOf(event));
}

function onKey(event) {
  if (!event.isTrusted) return;
  const popup = stage.shown;
  const roots = rootsOf(event);
  refused = null;
  if (popup) {
    if (event.key === "Escape") popup.cancel?.();
    const taken = event.key === "Escape" || popup.key?.(event);
    if (event.key === "Escape" || event.key === "Tab") popup.close();
    if (taken && !["Control", "Shift", "Alt", "Meta"].includes(event.key)) {
      event.preventDefault();
      event.stopImmediatePropagation();
      return;
    }
  }
  setTimeout(() => {
    if (event.defaultPrevented) return;
    const field = event.composedPath()[0];
    if (event.key === "ArrowDown" && field.list && !stage.shown && field.type !== "range") openSuggestions(field);
    report(event);
  });
  setTimeout(replaceNative, 0, ...roots);
}

// After the page's own listeners: a list that Chromium never opens cannot be in the way of a picture, as one can that
// is just being closed.
function onListPressed(event) {
  const owner = event.composedPath()[0];
  const list = owner.localName === "select" && !owner.multiple && owner.size <= 1 && !owner.disabled;
  if (!list || !event.isTrusted || event.button !== 0 || event.defaultPrevented) return;
  if (getComputedStyle(owner).appearance === "base-select") return;
  event.preventDefault();
  owner.focus();
  openFor(owner);
}

addEventListener("mousedown", onListPressed);
for (const type of MOUSE) addEventListener(type, onMouse, { capture: true, passive: type === "wheel" });
addEventListener("keydown", onKey, true);
addEventListener("input", (event) => {
  const field = event.composedPath()[0];
  const popup = stage.shown;
  if (!event.isTrusted || !field.list || field.type === "range") return;
  if (popup?.owner === field) popup.close();
  openSuggestions(field);
}, true);
addEventListener("blur", (event) => {
  if (event.target === window && stage.shown?.owner.ownerDocument === document) setTimeout(() => document.hasFocus() || stage.shown?.close());
  else if (stage.shown?.owner === event.target) stage.shown.close();
}, true);
addEventListener("resize", () => stage.shown?.close());
addEventListener("pagehide", () => {
  if (stage.shown?.owner.ownerDocument === document) stage.shown.close();
});
