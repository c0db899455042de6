// Keep the inbox up to date, mark notifications read and remove them in place, and move between them by keyboard.

import { call, coalesce, part } from './api.js';
import { live, recount, start as startLive } from './live.js';
import { showToastFor } from './toast.js';
import './shortcuts.js';
import './unread.js';
import { localise } from './format.js';

const inbox = document.getElementById('inbox');
const undo = document.getElementById('undo');
const first = !new URLSearchParams(location.search).has('before');
const GAP = 1_000; // milliseconds between two fetches

const rows = () => [...document.querySelectorAll('#notifications li')];
const focusedRow = () => document.activeElement?.closest('#notifications li');
const focusRow = (row) => (row?.querySelector('a.jump') ?? inbox).focus();

// Fetch the list again. The focused notification, or one near it, keeps the focus.
async function refresh() {
  const given = (await part(`/inbox/notifications${location.search}`)).getElementById('notifications');
  const list = document.getElementById('notifications');
  const focused = focusedRow();
  const before = rows();
  const at = before.indexOf(focused);
  const near = focused && [focused, ...before.slice(at + 1), ...before.slice(0, at).reverse()].map((item) => item.id);
  localise(given);
  list.replaceChildren(...[...given.children].map((item) => document.adoptNode(item)));
  document.getElementById('nothing').hidden = list.children.length > 0;
  if (near && !focused.isConnected) focusRow(near.map((id) => document.getElementById(id)).find(Boolean));
}

const refreshOnce = coalesce(refresh, GAP);
const refreshSoon = () => refreshOnce().catch(() => {}); // the connection's state is shown

// The request for what a form would do; null for a form that the browser submits.
function request(form) {
  const { id, all, undo: isUndo } = form.elements;
  if (form.id === 'channel-filter') return null;
  if (all) return () => call('POST', '/api/notifications/read', { all: true });
  if (isUndo) return () => call('POST', `/api/notifications/${id.value}/restore`);
  if (form.classList.contains('dismiss')) return () => call('DELETE', `/api/notifications/${id.value}`);
  return () => call('POST', '/api/notifications/read', { ids: id.value.split(',') });
}

async function submit(event) {
  const form = event.target;
  const send = request(form);
  if (!send) return;
  event.preventDefault();
  try {
    await send();
  } catch {
    if (!form.isConnected) inbox.append(form); // the list was replaced meanwhile
    return form.submit(); // the form's response shows the error
  }
  offerUndo(form.classList.contains('dismiss') ? form.elements.id.value : null);
  await recount().catch(() => {}); // it is done; the next count updates the page
  await refreshSoon();
}

function offerUndo(id) {
  undo.hidden = !id;
  undo.elements.id.value = id ?? '';
  undo.querySelector('[role="status"]').textContent = id ? 'The notification was removed.' : '';
}

// j and k, or the arrows, move; e marks read; Delete removes; z undoes. Enter opens, as for any link.
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input, textarea, select')) return;
  const list = rows();
  const row = focusedRow();
  const at = list.indexOf(row);
  const act = {
    j: () => focusRow(list[at + 1] ?? list.at(-1)),
    k: () => focusRow(list[Math.max(0, at - 1)]),
    e: () => row?.querySelector('form:not(.dismiss)')?.requestSubmit(),
    Delete: () => row?.querySelector('form.dismiss').requestSubmit(),
    z: () => undo.hidden || undo.requestSubmit(),
  };
  [act.ArrowDown, act.ArrowUp] = [act.j, act.k];
  if (!act[event.key] || !list.length) return;
  event.preventDefault();
  act[event.key]();
}

if (inbox) {
  localise(document);
  inbox.tabIndex = -1;
  inbox.addEventListener('submit', submit);
  document.addEventListener('keydown', press);
  document.getElementById('channel').addEventListener('change', ({ target }) => target.form.submit());
  const all = document.querySelector('#mark-all button');
  const current = document.querySelector('.filters [aria-current]');
  live.addEventListener('unread', ({ detail }) => {
    if (!detail.unread && document.activeElement === all) current.focus(); // a disabled element cannot have the focus
    all.disabled = !detail.unread;
    if (first) refreshSoon();
  });
  live.addEventListener('reset', () => first && refreshSoon());
}
showToastFor(() => Boolean(inbox) && first);
startLive();
