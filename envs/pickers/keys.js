// What a browser does with keys that the page left alone is decided outside of the page; so is what forms complain of.
const SPECIAL = /^(F\d+|ArrowLeft|ArrowRight|Home|Tab|PageUp|PageDown|Delete)$/;
const send = (message) => globalThis.BINDING?.(JSON.stringify(message));

// Chromium does this for keys that the system sends, not for those that a program does.
function pressNamed(key) {
  const named = [...document.querySelectorAll("[accesskey]")].filter((element) => element.accessKey.toLowerCase() === key.toLowerCase());
  if (named.length !== 1) return false;
  named[0].focus();
  named[0].click();
  return true;
}

function report(event) {
  if (event.altKey && !event.ctrlKey && event.key.length === 1 && pressNamed(event.key)) return;
  const held = event.ctrlKey || event.altKey;
  if (held || /^F\d+$/.test(event.key)) {
    if (event.key.length === 1 || SPECIAL.test(event.key))
      send({ keys: [event.ctrlKey && "Control", event.altKey && "Alt", event.shiftKey && "Shift", event.key].filter(Boolean) });
  }
}

addEventListener("click", (event) => {
  if (event.composedPath()[0].type === "file") setTimeout(() => event.defaultPrevented || send({ coming: "file" }));
}, true);

addEventListener("submit", (event) => {
  const target = event.submitter?.formTarget || event.target.target;
  const inside = /^(|_self|_top|_parent)$/i.test(target) || outer.document.getElementsByName(target).length;
  if (!inside) setTimeout(() => event.defaultPrevented || send({ coming: "tab" }));
}, true);

let complaint = null; // the first field of a form that was not sent
addEventListener("invalid", (event) => {
  const field = event.composedPath()[0];
  if (complaint) return;
  complaint = field;
  setTimeout(() => {
    complaint = null;
    if (event.defaultPrevented || field.ownerDocument.activeElement !== field) return;
    send({ invalid: field.validationMessage, field: field.name || field.id || field.type });
    show({ owner: field, modal: false, body: make("popup bubble", field.validationMessage), key: () => stage.shown.close() });
  });
}, true);
