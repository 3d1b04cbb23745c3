// Tasks in which something shown on an earlier screen is needed on a later one.
// A page calls memory.play(goal, build); build(tools) returns the list of screens (functions that draw one screen).
// Moving on removes the screen from the document, so the answer can only be remembered.
'use strict';

const memory = (() => {
  const COLOURS = {
    red: '#e00000', blue: '#0050ff', green: '#00a000', yellow: '#ffd800',
    purple: '#9000c0', orange: '#ff8000', cyan: '#00c8e0', black: '#000000',
  };
  const SHAPES = {
    circle: '<circle cx="50" cy="50" r="46"/>',
    square: '<rect x="8" y="8" width="84" height="84"/>',
    triangle: '<polygon points="50,4 98,94 2,94"/>',
    cross: '<polygon points="34,4 66,4 66,34 96,34 96,66 66,66 66,96 34,96 34,66 4,66 4,34 34,34"/>',
  };
  const NEXT = 'Next';

  // a 32-bit counter hashed into [0, 1): small, seeded and the same in every browser
  function generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x9e3779b9) >>> 0;
      let z = state;
      z = Math.imul(z ^ (z >>> 16), 0x85ebca6b);
      z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
      return ((z ^ (z >>> 16)) >>> 0) / 4294967296;
    };
  }

  function draws(random) {
    const integer = (below) => Math.floor(random() * below);
    const pick = (list) => list[integer(list.length)];
    const shuffle = (list) => {
      const copy = [...list];
      for (let i = copy.length - 1; i > 0; i--) {
        const j = integer(i + 1);
        [copy[i], copy[j]] = [copy[j], copy[i]];
      }
      return copy;
    };
    return {integer, pick, shuffle};
  }

  function place(element, [left, top, width, height]) {
    Object.assign(element.style, {left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`});
    document.body.append(element);
    return element;
  }

  function button(text, box, size, act) {
    const element = document.createElement('button');
    element.textContent = text;
    element.style.fontSize = `${size}px`;
    element.addEventListener('click', act);
    return place(element, box);
  }

  // a coloured shape; item = {colour, shape}
  function figure(item, box, act) {
    const holder = document.createElement('div');
    holder.innerHTML = `<svg viewBox="0 0 100 100" fill="${COLOURS[item.colour]}">${SHAPES[item.shape]}</svg>`;
    const element = holder.firstChild;
    element.dataset.colour = item.colour;
    element.dataset.shape = item.shape;
    element.dataset.label = `${item.colour} ${item.shape}`;
    if (act) element.addEventListener('click', () => act(element));
    return place(element, box);
  }

  // a filled rectangle of one colour, edge to edge
  function swatch(colour, box, act) {
    const element = document.createElement(act ? 'button' : 'div');
    element.style.background = COLOURS[colour];
    element.style.position = 'absolute';
    element.dataset.colour = colour;
    element.dataset.label = colour;
    if (act) element.addEventListener('click', act);
    return place(element, box);
  }

  // big characters on a card
  function glyph(text, box, size) {
    const element = document.createElement('div');
    element.className = 'glyph';
    element.textContent = text;
    element.style.fontSize = `${size}px`;
    return place(element, box);
  }

  function play(goal, build) {
    const state = {done: false, reward: 0, reason: ''};
    let screens = [];
    let current = 0;

    const show = (index) => {
      current = index;
      document.body.replaceChildren();
      screens[index]();
    };
    const end = (won, reason) => {
      if (state.done) return;
      Object.assign(state, {done: true, reward: won ? 1 : -1, reason});
    };
    const onward = () => { if (!state.done) show(current + 1); };
    const next = () => {
      const element = button(NEXT, [10, 160, 140, 44], 26, onward);
      element.className = 'next';
      element.style.fontSize = '';
    };
    const parameter = (name, fallback) => Number(new URLSearchParams(location.search).get(name) ?? fallback);

    window.task = {
      start(seed) {
        const tools = {...draws(generator(seed)), button, figure, swatch, glyph, place, next, onward, end, parameter};
        tools.colours = Object.keys(COLOURS);
        tools.shapes = Object.keys(SHAPES);
        screens = build(tools);
        show(0);
      },
      goal: () => goal,
      done: () => state.done,
      reward: () => state.reward,
      reason: () => state.reason,
    };
  }

  return {play};
})();
