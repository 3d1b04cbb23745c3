"use strict";
// Everything that a model or a page said reaches the document as text (textContent, attributes), never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const colour = (method) => `var(--m${DATA.methods.indexOf(method) % 8})`;
const state = { pair: 0, step: 0, overlay: "kept", timer: 0 };

function put(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat(3)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const h = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

const percent = (share) => `${Math.round(share * 100)}\u202f%`;
const whole = (value) => Math.round(value).toLocaleString("en");
const seconds = (value) =>
  value >= 10 ? `${value.toFixed(1)} s` : value >= 1 ? `${value.toFixed(2)} s` : `${Math.round(value * 1000)} ms`;
function bytes(value) {
  const unit = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : [1e3, "KB"];
  const number = value / unit[0];
  return `${number.toFixed(number < 10 ? 2 : number < 100 ? 1 : 0)} ${unit[1]}`;
}
