// What sb-admin-2's static pages lack: accounts, the episode's staff, figures and messages, tickets. Runs last.
'use strict';

(() => {
  const {make, text, note, data} = site;
  const find = (selector) => document.querySelector(selector);
  const here = location.pathname.split('/').pop().replace('.html', '') || 'index';
  const episode = data();

  // the links that only look like buttons of their forms, and Enter in a field
  function submits(act) {
    const button = find('form.user .btn-primary');
    const run = (event) => { event.preventDefault(); act(site.fields(find('form.user'))); };
    button.addEventListener('click', run);
    find('form.user').addEventListener('submit', run);
  }
  const wrong = (why) => {
    if (!find('.text-danger')) find('form.user').append(make('p', why, {class: 'text-danger text-center'}));
  };

  const pages = {
    login() {
      submits((said) => {
        const {email, password} = episode.account || {};
        if (said['Enter Email Address...'] !== email || said.Password !== password) return wrong('Wrong email or password.');
        note('session', email);
        location.href = 'index.html';
      });
    },
    register() {
      submits((said) => {
        if (!said['Email Address'] || said.Password !== said['Repeat Password']) return wrong('The passwords differ.');
        note('accounts', said);
        location.href = 'login.html';
      });
    },
    'forgot-password'() {
      submits((said) => {
        if (!said['Enter Email Address...']) return wrong('Enter an email address.');
        note('resets', said['Enter Email Address...']);
        location.href = 'login.html';
      });
    },
    tables() {
      find('#dataTable tbody').replaceChildren(...(episode.staff || []).map((person) => (
        make('tr', '', {}, person.map((cell) => make('td', String(cell)))))));
    },
    index() {
      const figures = document.querySelectorAll('.card .h5.font-weight-bold');
      (episode.figures || []).forEach((figure, at) => { figures[at].textContent = figure; });
    },
    ticket() {
      find('#ticket').addEventListener('submit', (event) => {
        event.preventDefault();
        note('tickets', site.fields(event.target));
        event.target.replaceChildren(make('div', 'Your ticket was sent.', {class: 'alert alert-success mb-0'}));
      });
    },
  };

  document.querySelectorAll('a[href="blank.html"]').forEach((link) => {
    link.textContent = 'Support Ticket';
    link.href = 'ticket.html';
  });
  const alerts = document.querySelectorAll('[aria-labelledby=alertsDropdown] .dropdown-item > div:last-child');
  (episode.alerts || []).forEach(([day, said], at) => {
    if (alerts[at]) alerts[at].replaceChildren(make('div', day, {class: 'small text-gray-500'}), make('span', said));
  });
  const messages = document.querySelectorAll('[aria-labelledby=messagesDropdown] .dropdown-item > div:last-child');
  (episode.messages || []).forEach(([who, said], at) => {
    if (!messages[at]) return;
    messages[at].replaceChildren(make('div', said), make('div', who, {class: 'small text-gray-500'}));
  });
  if (pages[here]) pages[here]();
})();
