// What gentelella's static pages lack: sign-in, forms that are kept, products by name, a cart. Runs last in each page.
'use strict';

(() => {
  const {make, text, note, data} = site;
  const find = (selector) => document.querySelector(selector);
  const here = location.pathname.split('/').pop().replace('.html', '');
  const wanted = () => (data().products || []).find((product) => product[7] === new URLSearchParams(location.search).get('id'));

  // before the template's own handlers
  const first = (kind, selector, act) => addEventListener(kind, (event) => {
    const element = event.target.closest && event.target.closest(selector);
    if (element) act(element, event);
  }, true);
  const instead = (selector, act) => first('submit', selector, (form, event) => {
    event.preventDefault();
    event.stopImmediatePropagation();
    act(form);
  });

  site.product = () => text(find('.product-title'));
  site.chat = (threads, people) => {
    site.bind('chat', threads);
    for (const person of people) {
      const last = (threads[person.id] || []).at(-1);
      person.preview = last ? last.text : '';
    }
  };

  const pages = {
    login() {
      find('form').removeAttribute('onsubmit');
      instead('form', () => {
        const {email, password} = data().account || {};
        if (find('#email').value.trim() === email && find('#password').value === password) {
          note('session', email);
          location.href = 'index.html';
        } else if (!find('.form-error')) {
          find('form').append(make('div', 'Email or password is wrong.', {class: 'form-error'}));
        }
      });
    },
    form() {
      first('submit', 'form', (form) => {
        note('forms', {form: text(form.closest('.card').querySelector('.card-title')), fields: site.fields(form)});
      });
    },
    form_wizards() {
      const said = () => site.fields(find('main'));
      first('click', '#next-btn', (button) => {
        const {Email, 'Workspace name': workspace, Plan} = said();
        const lines = document.querySelectorAll('[data-panel="3"] li');
        lines[0].textContent = `Account · ${Email || ''}`;
        lines[1].textContent = `Workspace · ${workspace || ''} on ${(Plan || '').split('$')[0]} plan`;
        if (text(button) !== 'Finish') return;
        note('forms', {form: 'Onboarding wizard', fields: said()});
        find('[data-panel="3"] .alert-body').textContent = 'Your workspace was created.';
      });
    },
    e_commerce() {
      // the pictures are drawn by the storefront's script alone
      first('click', '.product-card', (card) => {
        sessionStorage.setItem('picture', card.querySelector('.product-thumb > svg').outerHTML);
      });
    },
    product_detail() {
      const product = wanted();
      if (!product) return;
      const [name, category, price, old] = product;
      find('.page-title').textContent = find('.product-title').textContent = name;
      find('.product-meta .chip').textContent = category;
      find('.product-tagline').textContent = `${name} from our ${category.toLowerCase()} collection.`;
      find('.price').textContent = `$${price}`;
      find('.price-old').textContent = old ? `$${old}` : '';
      find('.price-discount').remove();
      find('#buy-now').textContent = `Buy now — $${price}`;
      const groups = document.querySelectorAll('.product-option');
      [['Size', ['Small', 'Medium', 'Large']], ['Colour', ['Black', 'Green', 'Red']]].forEach(([title, values], at) => {
        groups[at].querySelector('.option-label').textContent = title;
        groups[at].querySelectorAll('.option-value').forEach((value, number) => { value.textContent = values[number]; });
      });
      const gallery = find('#main-img');
      find('#gallery-svg').style.display = find('#gallery-thumbs').style.display = 'none';
      gallery.insertAdjacentHTML('beforeend', sessionStorage.getItem('picture') || '');
      first('click', '#add-cart, #buy-now', () => {
        const [size, colour] = [...document.querySelectorAll('.option-value.active')].map(text);
        note('cart', {name, size, colour, count: Number(find('#qty').value)});
        find('#cart').textContent = label();
      });
    },
    cart() {
      document.title = find('.breadcrumb .current').textContent = 'Cart';
      const show = () => {
        const lines = data().cart || [];
        find('#lines').replaceChildren(...lines.map((line, at) => {
          const remove = make('button', 'Remove', {class: 'btn btn-outline btn-sm', type: 'button'});
          remove.addEventListener('click', () => {
            data().cart = lines.filter((_, other) => other !== at);
            site.keep();
            show();
          });
          const price = data().products.find((product) => product[0] === line.name)[2];
          return make('tr', '', {}, [
            make('td', line.name, {class: 'cell-strong'}), make('td', `${line.size}, ${line.colour}`),
            make('td', String(line.count)), make('td', `$${price * line.count}`), make('td', '', {}, [remove]),
          ]);
        }));
        find('#empty').hidden = lines.length > 0;
      };
      instead('#order', (form) => {
        if (!(data().cart || []).length) return;
        note('placed', {lines: data().cart, ...site.fields(form)});
        data().cart = [];
        site.keep();
        form.replaceChildren(make('div', 'Thank you. Your order was placed.', {class: 'alert alert-success'}));
        show();
      });
      show();
    },
  };

  const label = () => `Cart (${(data().cart || []).reduce((sum, line) => sum + line.count, 0)})`;
  const actions = find('.page-actions');
  if (['e_commerce', 'product_detail'].includes(here) && actions) {
    actions.prepend(make('a', label(), {class: 'btn btn-outline', href: 'cart.html', id: 'cart'}));
  }
  if (pages[here]) pages[here]();
})();
