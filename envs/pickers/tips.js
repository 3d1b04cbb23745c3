// The words of a `title`, beside the pointer that was moved onto its element. A press or a key takes them away until the
// pointer comes back, so that they hide nothing after a click.
let dismissed = null;

function onRest(event) {
  // After a change of the page Chromium tells the pointer's place once more: nobody has moved it.
  if (event.buttons || !(event.movementX || event.movementY)) return;
  const owner = event.composedPath().find((node) => node.title && node.getBoundingClientRect);
  if (stage.shown?.tip && stage.shown.owner === owner) return;
  hideTip();
  if (owner !== dismissed) dismissed = null;
  if (!owner || dismissed || stage.shown) return;
  const box = owner.getBoundingClientRect();
  const [right, down] = [event.clientX - box.left, event.clientY - box.top];
  show({
    owner,
    tip: true,
    body: make("popup tip", owner.title),
    spot() {
      const at = placeOf(owner);
      return { left: at.left + right, top: at.top + down, width: 0, height: 20 };
    },
  });
}

function hideTip() {
  if (!stage.shown?.tip) return;
  dismissed = stage.shown.owner;
  stage.shown.close();
}
