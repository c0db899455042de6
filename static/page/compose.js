// Writing a message.

import { call } from './api.js';
import { complete, findMentionable } from './completion.js';
import { channelId, lookFor, scrollToEnd, reachesNewest } from './timeline.js';

const form = document.getElementById('compose');
const field = document.getElementById('content');
const status = document.getElementById('compose-status');
const BEFORE_CARET = /(?:^|[\s'"([{/<>*_~|])@([a-z0-9_.-]{0,32})$/i;
const touch = matchMedia('(pointer: coarse)');
// What was begun is there again after a look at another channel, and is not the next one's who signs in here.
const DRAFT = `draft ${document.body.dataset.user} ${channelId}`;
let once = null; // what is being sent, and its key: sent twice, it is posted once

const typed = () => field.value.slice(0, field.selectionStart).match(BEFORE_CARET);

function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

function changed() {
  field.rows = Math.min(8, Math.max(1, field.value.split('\n').length));
  sessionStorage.setItem(DRAFT, field.value);
}

function say(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle('wrong', wrong);
}

const addressOf = (id) => `${document.getElementById('log').dataset.address}#message-${id}`;

async function send() {
  const content = field.value.trim();
  if (!content || form.ariaBusy === 'true') return;
  form.ariaBusy = 'true';
  if (once?.content !== content) once = { key: newKey(), content };
  let message;
  try {
    message = await call('POST', '/api/messages', { channel_id: channelId, content }, { 'Idempotency-Key': once.key });
  } catch (problem) {
    // It was refused, and another try is another message. After no answer, a failure or "still under way" nobody knows.
    if (problem.status && problem.status < 500 && problem.status !== 409) once = null;
    return say(problem.message, true);
  } finally {
    form.ariaBusy = 'false';
  }
  once = null;
  if (field.value.trim() === content) field.value = '';
  changed();
  say(message.warnings.map((warning) => warning.detail).join(' '));
  if (!reachesNewest()) return location.assign(addressOf(message.id));
  scrollToEnd();
  await lookFor(message.id).catch(() => {}); // it is posted, whatever becomes of this; the next look finds it
  scrollToEnd();
}

export function start() {
  if (!form) return;
  field.value = sessionStorage.getItem(DRAFT) ?? '';
  changed();
  complete({
    field,
    list: document.getElementById('suggestions'),
    wanted: () => typed()?.[1].toLowerCase() ?? null,
    find: findMentionable,
    choose({ username }) {
      const caret = field.selectionStart;
      field.setRangeText(`${username} `, caret - typed()[1].length, caret, 'end');
      changed();
    },
  });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  field.addEventListener('input', () => {
    changed();
    say('');
  });
  field.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    send();
  });
}
