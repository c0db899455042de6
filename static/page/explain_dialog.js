// The dialog that explains why the user, or for admins any user, was or was not notified.

import { call } from './api.js';
import { complete, findSuggestions } from './completion.js';
import { because, excerpt } from './format.js';

const dialog = document.getElementById('why');
const answer = document.getElementById('why-answer');
const form = document.getElementById('why-form');
const field = document.getElementById('why-name');
let message;

async function showAnswer(explainer) {
  answer.textContent = '…';
  try {
    answer.textContent = await explainer();
  } catch (problem) {
    answer.textContent = problem.message;
  }
}

const explain = (query) => call('GET', `/api/messages/${message}/explain${query}`);

async function explainFor(username) {
  const { items } = await call('GET', `/api/users?username=${encodeURIComponent(username)}`);
  if (!items.length) return `There is no user @${username}.`;
  return because(await explain(`?user_id=${items[0].id}`), `@${items[0].username}`);
}

export function open(item) {
  message = item.dataset.id;
  dialog.querySelector('.excerpt').textContent = excerpt(item);
  form?.reset();
  dialog.showModal();
  showAnswer(async () => because(await explain('')));
}

export function start() {
  if (!form) return;
  const completion = complete({
    field,
    list: document.getElementById('why-names'),
    getPrefix: () => field.value.trim().replace(/^@/, '').toLowerCase() || null,
    find: async (prefix, signal) => (await findSuggestions(prefix, signal)).filter((one) => one.kind === 'user'),
    choose({ username }) {
      field.value = username;
      form.requestSubmit();
    },
  });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    completion.close();
    showAnswer(() => explainFor(field.value.trim().replace(/^@/, '')));
  });
}
