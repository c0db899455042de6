// Mark messages read when they were seen.
//
// - A message is seen while it is in view and the window is visible and has the focus.
// - Seeing the newest message marks the whole list read. Before that, only seen messages are marked.
// - Messages are marked by their ids, so a message that is not in the list, because it is older or was committed later
//   than its neighbours, stays unread.

import { call } from './api.js';
import { live, recount } from './live.js';
import { channelId, isAtEnd, listedIds, timeline } from './timeline.js';
import { unreadIn } from './unread.js';

const PAUSE = 400;
const BATCH_SIZE = 1_000; // the maximum of notifications in one request
const MIN_INTERVAL = 2_000; // milliseconds between two requests in a busy channel
const me = document.body.dataset.user;
const log = document.getElementById('log');
const seen = new Set();
const inView = [new Set(), new Set()];
let waiting = null;
let next = 0;
let before = null; // the last ids and unread count: the same request again would change nothing

const hasAttention = () => document.visibilityState === 'visible' && document.hasFocus();

function markSoon() {
  waiting ??= setTimeout(mark, Math.max(PAUSE, next - performance.now())); // further messages do not delay it
}

async function mark() {
  waiting = null;
  if (!hasAttention() || !unreadIn(channelId)) return;
  addSeen();
  const ids = isAtEnd() ? listedIds().slice(-BATCH_SIZE) : [...seen].slice(0, BATCH_SIZE);
  if (!ids.length) return;
  const now = `${ids} ${unreadIn(channelId)}`;
  if (now === before) return;
  before = now;
  next = performance.now() + MIN_INTERVAL;
  for (const id of ids) seen.delete(id);
  try {
    await call('POST', '/api/notifications/read', { ids: ids.map((id) => `${me}-${id}`) });
    await recount();
  } catch {
    before = null;
    for (const id of ids) seen.add(id); // retried when another message is seen
  }
}

function addSeen() {
  for (const views of inView) for (const item of views) seen.add(item.dataset.id);
}

// A message is in view when a third of it is visible, or when it covers the middle of the window.
const observers = [{ threshold: 0.3 }, { rootMargin: '-49% 0px -49% 0px' }].map((options, number) =>
  new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) inView[number][isIntersecting ? 'add' : 'delete'](target);
    if (hasAttention()) addSeen();
    markSoon();
  }, { root: log, ...options }));

const watch = (item) => observers.forEach((observer) => observer.observe(item));

export function start() {
  for (const item of document.querySelectorAll('#messages > li')) watch(item);
  timeline.addEventListener('added', ({ detail }) => detail.items.forEach(watch));
  live.addEventListener('unread', markSoon);
  window.addEventListener('focus', markSoon);
  document.addEventListener('visibilitychange', markSoon);
}
