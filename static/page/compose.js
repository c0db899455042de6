// The form for a new message.

import { call } from './api.js';
import { editLast } from './changes.js';
import { complete, findSuggestions } from './completion.js';
import { channelId, fetchMessage, scrollToEnd, reachesNewest } from './timeline.js';

const form = document.getElementById('compose');
const field = document.getElementById('content');
const status = document.getElementById('compose-status');
const BEFORE_CARET = /(?:^|[\s'"([{/<>*_~|])@([a-z0-9_.-]{0,32})$/i;
const touch = matchMedia('(pointer: coarse)');
// A draft survives a visit to another channel, and is not shown to another user who signs in.
const DRAFT = `draft ${document.body.dataset.user} ${channelId}`;
let completion;
let once = null; // the content being sent, and its key: sent twice, it is posted once

const typed = () => field.value.slice(0, field.selectionStart).match(BEFORE_CARET);

function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

function saveDraft() {
  field.rows = Math.min(8, Math.max(1, field.value.split('\n').length));
  sessionStorage.setItem(DRAFT, field.value);
}

function setStatus(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle('wrong', wrong);
}

const addressOf = (id) => `${document.getElementById('log').dataset.address}#message-${id}`;

async function send() {
  const content = field.value.trim();
  if (!content || form.ariaBusy === 'true') return;
  completion.close();
  form.ariaBusy = 'true';
  if (once?.content !== content) once = { key: newKey(), content };
  let message;
  try {
    message = await call('POST', '/api/messages', { channel_id: channelId, content },
      { headers: { 'Idempotency-Key': once.key } });
  } catch (problem) {
    // After a refusal, another attempt is another message. Otherwise the message may have been posted: keep the key.
    if (problem.status && problem.status < 500 && problem.status !== 409) once = null;
    return setStatus(problem.message, true);
  } finally {
    form.ariaBusy = 'false';
  }
  once = null;
  if (field.value.trim() === content) field.value = '';
  saveDraft();
  setStatus(message.warnings.map((warning) => warning.detail).join(' '));
  if (!reachesNewest()) return location.assign(addressOf(message.id));
  scrollToEnd();
  await fetchMessage(message.id).catch(() => {}); // it is posted; the next fetch finds it
  scrollToEnd();
}

export function start() {
  if (!form) return;
  field.value = sessionStorage.getItem(DRAFT) ?? '';
  saveDraft();
  completion = complete({
    field,
    list: document.getElementById('suggestions'),
    getPrefix: () => typed()?.[1].toLowerCase() ?? null,
    find: findSuggestions,
    choose({ username }) {
      const caret = field.selectionStart;
      field.setRangeText(`${username} `, caret - typed()[1].length, caret, 'end');
      saveDraft();
    },
  });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  field.addEventListener('input', () => {
    saveDraft();
    setStatus('');
  });
  field.addEventListener('keydown', (event) => {
    if (event.key === 'ArrowUp' && !field.value && editLast()) event.preventDefault();
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    send();
  });
}
