// "Why?": in one sentence, of the reader; and for admins, of anybody.

import { call } from './api.js';
import { complete, findMentionable } from './completion.js';
import { because, excerpt } from './words.js';

const dialog = document.getElementById('why');
const answer = document.getElementById('why-answer');
const form = document.getElementById('why-form');
const field = document.getElementById('why-name');
let message;

async function ask(about) {
  answer.textContent = '…';
  try {
    answer.textContent = await about();
  } catch (problem) {
    answer.textContent = problem.message;
  }
}

const explain = (query) => call('GET', `/api/messages/${message}/explain${query}`);

async function aboutSomebody(username) {
  const { items } = await call('GET', `/api/users?username=${encodeURIComponent(username)}`);
  if (!items.length) return `There is nobody called @${username}.`;
  return because(await explain(`?user_id=${items[0].id}`), `@${items[0].username}`);
}

export function why(item) {
  message = item.dataset.id;
  dialog.querySelector('.excerpt').textContent = excerpt(item);
  form?.reset();
  dialog.showModal();
  ask(async () => because(await explain('')));
}

export function start() {
  if (!form) return;
  complete({
    field,
    list: document.getElementById('why-names'),
    wanted: () => field.value.trim().replace(/^@/, '').toLowerCase() || null,
    find: async (prefix) => (await findMentionable(prefix)).filter((one) => one.kind === 'user'),
    choose({ username }) {
      field.value = username;
      form.requestSubmit();
    },
  });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    ask(() => aboutSomebody(field.value.trim().replace(/^@/, '')));
  });
}
