// Keep the inbox up to date, and mark notifications read in place.

import { call, coalesce, part } from './api.js';
import { live, recount, start as startLive } from './live.js';
import { showToastFor } from './toast.js';
import './unread.js';
import { localise } from './format.js';

const inbox = document.getElementById('inbox');
const first = !new URLSearchParams(location.search).has('before');
const GAP = 1_000; // milliseconds between two fetches

// Fetch the list again. The focused notification keeps the focus.
async function refresh() {
  const given = (await part(`/inbox/notifications${location.search}`)).getElementById('notifications');
  const list = document.getElementById('notifications');
  const focused = document.activeElement?.closest('#notifications li');
  const near = focused && [focused, focused.nextElementSibling, focused.previousElementSibling].map((item) => item?.id);
  localise(given);
  list.replaceChildren(...[...given.children].map((item) => document.adoptNode(item)));
  document.getElementById('nothing').hidden = list.children.length > 0;
  if (near && !focused.isConnected) {
    const item = near.map((id) => id && document.getElementById(id)).find(Boolean);
    (item?.querySelector('a.jump') ?? inbox).focus();
  }
}

const refreshOnce = coalesce(refresh, GAP);
const refreshSoon = () => refreshOnce().catch(() => {}); // the connection's state is shown

async function markRead(event) {
  event.preventDefault();
  const { id, all } = event.target.elements;
  try {
    await call('POST', '/api/notifications/read', all ? { all: true } : { ids: [id.value] });
  } catch {
    if (!event.target.isConnected) inbox.append(event.target); // the list was replaced meanwhile
    return event.target.submit(); // the form's response shows the error
  }
  await recount().catch(() => {}); // it is marked; the next count updates the page
  await refreshSoon();
}

if (inbox) {
  localise(document);
  inbox.tabIndex = -1;
  inbox.addEventListener('submit', markRead);
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
