// What fonts.conf does, for a browser that does not read it. Each face: {names, weight, style, bytes in base64}.
(() => {
  if (window === top && location.href === 'about:blank') return;  // a tab before its page: half of the time
  for (const face of FACES) {
    const bytes = Uint8Array.from(atob(face.bytes), (letter) => letter.charCodeAt(0));
    const how = {weight: face.weight, style: face.style};
    for (const name of face.names) document.fonts.add(new FontFace(name, bytes, how));
  }
  // the user agent's own defaults are generic names; without weight, so that any rule of the page wins
  const defaults = [
    [':where(html)', 'Liberation Serif'],
    [':where(button, input, select)', 'Liberation Sans'],
    [':where(pre, code, kbd, samp, tt, textarea)', 'Liberation Mono'],
    [':where(input:is([type=date], [type=time], [type=datetime-local], [type=month], [type=week]))', 'Liberation Mono'],
  ];
  const style = document.createElement('style');
  style.textContent = defaults.map(([where, name]) => `${where} { font-family: '${name}'; }`).join('\n');
  new MutationObserver((_, watch) => {
    if (!document.documentElement) return;
    watch.disconnect();
    document.documentElement.prepend(style);
  }).observe(document, {childList: true});
})();
