// Runs first in every page: a clock that stands, a seeded chance, no motion, and what the user has changed so far.
// An episode's data lie in localStorage: {seed, data: {kind: list or object}}; `envs.sites.task` writes and reads them.
'use strict';

const site = (() => {
  const NOW = Date.UTC(2026, 3, 15, 9, 30);
  const KEY = 'agentkv';
  const STORES = {settings: 'gentelella:settings'};  // what a template keeps there by itself
  const kept = JSON.parse(localStorage.getItem(KEY) || '{"seed": 1, "data": {}}');
  const bound = {};

  // dates that are shown stand still; durations (jQuery, charts) still pass
  const RealDate = Date;
  const began = RealDate.now();
  window.Date = new Proxy(RealDate, {
    construct: (target, given, asked) => Reflect.construct(target, given.length ? given : [NOW], asked),
    get: (target, name) => (name === 'now' ? () => NOW + RealDate.now() - began : Reflect.get(target, name)),
  });

  let state = kept.seed >>> 0;
  Math.random = () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return ((z ^ (z >>> 16)) >>> 0) / 4294967296;
  };

  // what follows an action soon, follows it at once: the next screenshot shows it however fast the machine is
  const later = window.setTimeout;
  window.setTimeout = (act, ms, ...given) => later(act, ms <= 500 ? 0 : ms, ...given);
  for (const owner of [Element.prototype, window]) {
    for (const name of ['scrollIntoView', 'scrollTo', 'scrollBy', 'scroll']) {
      const scroll = owner[name];
      if (!scroll) continue;
      owner[name] = function (how, ...given) {
        return scroll.call(this, how && how.behavior ? {...how, behavior: 'instant'} : how, ...given);
      };
    }
  }
  const style = document.createElement('style');
  style.textContent = '*, *::before, *::after { transition-duration: .001s !important; transition-delay: 0s !important;'
    + ' animation-duration: .001s !important; animation-iteration-count: 1 !important; scroll-behavior: auto !important; }'
    + ' .toast { pointer-events: none; }';
  document.documentElement.append(style);
  for (const kind of ['pointerdown', 'keydown']) {
    addEventListener(kind, () => document.querySelectorAll('.toast').forEach((toast) => toast.remove()), true);
  }

  // a template counts its own entries from where its sample data ended
  const numbered = (entry, at) => (typeof entry.id === 'number' ? {...entry, id: at + 1}
    : typeof entry.id === 'string' && entry.id.startsWith('msg-') ? {...entry, id: `kept-${at}`} : entry);
  const plain = (thing) => (thing instanceof Map ? Object.fromEntries(thing) : thing);

  function fill(thing, data) {
    if (Array.isArray(thing)) {
      thing.splice(0, thing.length, ...data.map(numbered));
    } else if (thing instanceof Map) {
      Object.entries(data).forEach(([key, value]) => thing.set(key, value));
    } else {
      Object.keys(thing).forEach((key) => delete thing[key]);
      Object.assign(thing, data);
    }
  }

  // gives a template's array, map or object the episode's data, and reads them from it from now on
  function bind(kind, thing) {
    if (kind in kept.data) fill(thing, kept.data[kind]);
    bound[kind] = thing;
    return thing;
  }

  function keep() {
    for (const [kind, thing] of Object.entries(bound)) kept.data[kind] = plain(thing);
    for (const [kind, key] of Object.entries(STORES)) {
      if (localStorage.getItem(key)) kept.data[kind] = JSON.parse(localStorage.getItem(key));
    }
    localStorage.setItem(KEY, JSON.stringify(kept));
    return kept.data;
  }

  function start(seed, data) {
    localStorage.clear();
    sessionStorage.clear();
    Object.assign(kept, {seed, data});
    for (const [kind, key] of Object.entries(STORES)) {
      if (kind in data) localStorage.setItem(key, JSON.stringify(data[kind]));
    }
    keep();
  }

  // one more entry in a list that no template has: an order, a form that was sent
  function note(kind, entry) {
    kept.data[kind] = [...(kept.data[kind] || []), entry];
    keep();
  }

  const text = (element) => (element ? element.textContent.replace(/\s+/g, ' ').replace('*', '').trim() : '');

  // what a form says, by its labels; empty fields are left out
  function fields(form) {
    const found = {};
    for (const field of form.querySelectorAll('input, select, textarea')) {
      const own = text(field.labels && field.labels[0]) || field.placeholder || field.getAttribute('aria-label') || '';
      const group = text(field.closest('.form-group') && field.closest('.form-group').querySelector('label'));
      if (field.type === 'radio') {
        if (field.checked) found[group] = own;
      } else if (field.type === 'checkbox') {
        if (field.checked) found[own] = 'yes';
      } else if (field.value.trim()) {
        found[field.labels && field.labels.length ? own : group || own] = field.value.trim();
      }
    }
    return found;
  }

  // an element with text; children may be elements
  function make(tag, content = '', attributes = {}, children = []) {
    const element = document.createElement(tag);
    element.textContent = content;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  addEventListener('pagehide', keep);
  const data = () => kept.data;
  return {bind, keep, start, note, fields, text, make, data};
})();
window.site = site;
