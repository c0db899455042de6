// What was seen is read, as in every chat.
//
// - Seen is what is in view while the reader's attention is on the window: it is visible, and has the focus.
// - Who sees the newest message of the list has read all of the list. Before that, only what was seen is.
// - Messages are marked by their ids: one that the list does not have, since it is older or was committed later than its
//   neighbours, stays unread.

import { call } from './api.js';
import { live, recount } from './live.js';
import { channelId, isAtEnd, listedIds, timeline } from './timeline.js';
import { unreadIn } from './unread.js';

const PAUSE = 400;
const AT_ONCE = 1_000; // notifications that one request marks at most
const APART = 2_000; // milliseconds between two times, in a channel in which there is always something new
const me = document.body.dataset.user;
const log = document.getElementById('log');
const seen = new Set();
const inView = [new Set(), new Set()];
let waiting = null;
let next = 0;
let before = null; // what was marked, and with how many unread: the same again would change nothing

const isWatched = () => document.visibilityState === 'visible' && document.hasFocus();

function soon() {
  waiting ??= setTimeout(mark, Math.max(PAUSE, next - performance.now())); // what comes meanwhile does not put it off
}

async function mark() {
  waiting = null;
  if (!isWatched() || !unreadIn(channelId)) return;
  see();
  const ids = isAtEnd() ? listedIds().slice(-AT_ONCE) : [...seen].slice(0, AT_ONCE);
  if (!ids.length) return;
  const now = `${ids} ${unreadIn(channelId)}`;
  if (now === before) return;
  before = now;
  next = performance.now() + APART;
  for (const id of ids) seen.delete(id);
  try {
    await call('POST', '/api/notifications/read', { ids: ids.map((id) => `${me}-${id}`) });
    await recount();
  } catch {
    before = null;
    for (const id of ids) seen.add(id); // the next time that something is seen
  }
}

function see() {
  for (const views of inView) for (const item of views) seen.add(item.dataset.id);
}

// In view is what shows a third of itself; and of what is longer than the window, what is in the middle of it.
const observers = [{ threshold: 0.3 }, { rootMargin: '-49% 0px -49% 0px' }].map((options, number) =>
  new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) inView[number][isIntersecting ? 'add' : 'delete'](target);
    if (isWatched()) see();
    soon();
  }, { root: log, ...options }));

const watch = (item) => observers.forEach((observer) => observer.observe(item));

export function start() {
  for (const item of document.querySelectorAll('#messages > li')) watch(item);
  timeline.addEventListener('added', ({ detail }) => detail.items.forEach(watch));
  live.addEventListener('unread', soon);
  window.addEventListener('focus', soon);
  document.addEventListener('visibilitychange', soon);
}
