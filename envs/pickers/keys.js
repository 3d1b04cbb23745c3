// What a browser does with keys that the page left alone is decided outside of the page; so is what forms complain of.
const SPECIAL = /^(F\d+|ArrowLeft|ArrowRight|Home|Tab|PageUp|PageDown|Delete)$/;
const send = (message) => globalThis.BINDING?.(JSON.stringify(message));

function report(event) {
  const held = event.ctrlKey || event.altKey;
  if (held || /^F\d+$/.test(event.key)) {
    if (event.key.length === 1 || SPECIAL.test(event.key))
      send({ keys: [event.ctrlKey && "Control", event.altKey && "Alt", event.shiftKey && "Shift", event.key].filter(Boolean) });
  }
}

addEventListener("click", (event) => {
  if (event.composedPath()[0].type === "file") setTimeout(() => event.defaultPrevented || send({ file: true }));
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
