// Screenshots with what lies over them: where the action went, which visual tokens were kept.

function unpack(frame) {
  return Uint8Array.from(atob(frame.kept), (c) => c.charCodeAt(0));
}

// One canvas pixel per visual token, stretched over the picture.
function overlay(frame, method) {
  const [rows, cols] = frame.grid,
    kept = unpack(frame);
  const canvas = h("canvas", { width: cols, height: rows, "aria-hidden": "true" });
  const style = getComputedStyle(document.documentElement),
    pen = canvas.getContext("2d");
  const tint = style.getPropertyValue(colour(method).slice(4, -1)).trim(),
    veil = `rgb(${style.getPropertyValue("--veil")})`;
  pen.fillStyle = state.overlay === "tint" ? tint : veil;
  kept.forEach((share, i) => {
    pen.globalAlpha = state.overlay === "tint" ? (0.7 * share) / 100 : 0.86 * (1 - share / 100);
    pen.fillRect(i % cols, Math.floor(i / cols), 1, 1);
  });
  return canvas;
}


function arrow(x, y, toX, toY, r, look) {
  const angle = Math.atan2(toY - y, toX - x),
    wing = (turn) => `${toX - 1.5 * r * Math.cos(angle + turn)},${toY - 1.5 * r * Math.sin(angle + turn)}`;
  return s("path", {
    d: `M${x},${y} L${toX},${toY} M${wing(0.5)} L${toX},${toY} L${wing(-0.5)}`,
    fill: "none",
    "stroke-linecap": "round",
    ...look,
  });
}

// The point where the action was executed, in CSS pixels of the page.
function marker(action, viewport, method) {
  const [width, height] = viewport,
    box = s("svg", {
      viewBox: `0 0 ${width} ${height}`,
      "aria-hidden": "true",
      class: "click",
      "data-x": action.x,
      "data-y": action.y,
    });
  const r = Math.max(width, height) * 0.032,
    { x, y } = action,
    c = colour(method);
  const both = (draw) => [
    draw({ stroke: "#fff", "stroke-width": r * 0.62 }),
    draw({ stroke: c, "stroke-width": r * 0.34 }),
  ];
  if (action.type === "Drag") box.append(...both((look) => arrow(x, y, action.to_x, action.to_y, r, look)));
  if (action.type === "Scroll") {
    const [dx, dy] = { up: [0, -1], down: [0, 1], left: [-1, 0], right: [1, 0] }[action.direction];
    box.append(...both((look) => arrow(x, y, x + dx * r * 4, y + dy * r * 4, r, look)));
  }
  box.append(s("circle", { class: "ping", cx: x, cy: y, r: r, fill: c, opacity: 0.5 }));
  box.append(...both((look) => s("circle", { cx: x, cy: y, r: r, fill: "none", ...look })));
  if (action.type === "DoubleClick")
    box.append(...both((look) => s("circle", { cx: x, cy: y, r: r * 1.8, fill: "none", ...look })));
  box.append(s("circle", { cx: x, cy: y, r: r * 0.22, fill: c, stroke: "#fff", "stroke-width": r * 0.1 }));
  return box;
}

const shot = (image, alt, width, ...over) =>
  h(
    "span",
    { class: "shot", style: `width:${width}px` },
    h("img", { src: DATA.images[image], alt, loading: "lazy" }),
    over,
  );

// Tall phone-like screens are held to a height, wide ones fill their card.
const widthFor = (viewport, height) => Math.round(Math.min(1000, (height * viewport[0]) / viewport[1]));
