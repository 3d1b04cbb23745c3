// A small shop: what it sells, and a basket that lives in the browser until the order is sent.
'use strict';

const shop = (() => {
  const ITEMS = [
    {id: 'teapot', price: 12, colours: ['white', 'blue', 'red']},
    {id: 'mug', price: 5, colours: ['white', 'green']},
    {id: 'kettle', price: 30, colours: ['black', 'red']},
    {id: 'plate', price: 4, colours: ['white', 'blue']},
    {id: 'lamp', price: 22, colours: ['black', 'yellow']},
    {id: 'clock', price: 18, colours: ['white', 'black']},
  ];
  const find = (id) => ITEMS.find((item) => item.id === id);
  const basket = () => JSON.parse(localStorage.basket || '[]');
  const keep = (lines) => { localStorage.basket = JSON.stringify(lines); };
  const total = () => basket().reduce((sum, line) => sum + line.count * find(line.id).price, 0);

  function add(id, colour, count) {
    const lines = basket();
    const same = lines.find((line) => line.id === id && line.colour === colour);
    if (same) same.count += count; else lines.push({id, colour, count});
    keep(lines);
  }

  // an element with text; children may be elements
  function make(tag, text = '', attributes = {}, children = []) {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function header() {
    const count = basket().reduce((sum, line) => sum + line.count, 0);
    document.body.prepend(make('header', '', {}, [
      make('h1', 'Corner shop'),
      make('a', 'All things', {href: 'index.html'}),
      make('a', `Basket (${count})`, {href: 'basket.html', id: 'to-basket'}),
    ]));
  }

  return {ITEMS, find, basket, keep, total, add, make, header};
})();
