// "Why?": in one sentence, of the reader; and for admins, of anybody.

import { call } from './api.js';
import { complete } from './completion.js';
import { channelId } from './timeline.js';
import { because } from './words.js';

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
  dialog.querySelector('.excerpt').textContent = item.querySelector('.content').textContent.trim().slice(0, 200);
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
    find: async (prefix) =>
      (await call('GET', `/api/channels/${channelId}/members?limit=8&prefix=${encodeURIComponent(prefix)}`))
        .items.filter((one) => one.kind === 'user'),
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
