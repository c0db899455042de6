// The inbox: kept up to date, and marked read without leaving it.

import { call, inTurn, part } from './api.js';
import { live, recount, start as startLive } from './live.js';
import { tellOfNew } from './toast.js';
import './unread.js';
import { localise } from './words.js';

const inbox = document.getElementById('inbox');
const first = !new URLSearchParams(location.search).has('before');
const GAP = 1_000; // milliseconds between two looks

// The list as it is now, in its order. What has the focus keeps it.
async function look() {
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

const inOrder = inTurn(look, GAP);
const lookSoon = () => inOrder().catch(() => {}); // the connection's state says what is wrong

async function markRead(event) {
  event.preventDefault();
  const { id, all } = event.target.elements;
  try {
    await call('POST', '/api/notifications/read', all ? { all: true } : { ids: [id.value] });
  } catch {
    if (!event.target.isConnected) inbox.append(event.target); // the list was looked at meanwhile, and is another one
    return event.target.submit(); // the form itself says what is wrong
  }
  await recount().catch(() => {}); // it is marked; what is shown of it comes with the next count
  await lookSoon();
}

if (inbox) {
  localise(document);
  inbox.tabIndex = -1;
  inbox.addEventListener('submit', markRead);
  const all = document.querySelector('#mark-all button');
  const current = document.querySelector('.filters [aria-current]');
  live.addEventListener('unread', ({ detail }) => {
    if (!detail.unread && document.activeElement === all) current.focus(); // what is disabled cannot have it
    all.disabled = !detail.unread;
    if (first) lookSoon();
  });
  live.addEventListener('reset', () => first && lookSoon());
}
tellOfNew(() => Boolean(inbox) && first);
startLive();
