// What was seen is read, as in every chat.
//
// - Seen is what is in view while the reader's attention is on the window: it is visible, and has the focus.
// - Who sees the channel's newest message has read the channel. Before that, only what was seen is.

import { call } from './api.js';
import { live, recount } from './live.js';
import { channelId, isAtEnd, timeline } from './timeline.js';
import { unreadIn } from './unread.js';

const PAUSE = 400;
const me = document.body.dataset.user;
const seen = new Set();
let waiting;

const isWatched = () => document.visibilityState === 'visible' && document.hasFocus();

function soon() {
  clearTimeout(waiting);
  waiting = setTimeout(mark, PAUSE);
}

async function mark() {
  if (!isWatched() || !unreadIn(channelId)) return;
  const ids = [...seen].slice(0, 1_000);
  if (!isAtEnd() && !ids.length) return;
  const what = isAtEnd() ? { channel_id: channelId } : { ids: ids.map((id) => `${me}-${id}`) };
  for (const id of ids) seen.delete(id);
  try {
    await call('POST', '/api/notifications/read', what);
    await recount();
  } catch {
    for (const id of ids) seen.add(id); // the next time that something is seen
  }
}

const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) seen.add(target.dataset.id);
  soon();
}, { root: document.getElementById('log'), threshold: 0.3 });

export function start() {
  for (const item of document.querySelectorAll('#messages > li')) observer.observe(item);
  timeline.addEventListener('added', ({ detail }) => detail.items.forEach((item) => observer.observe(item)));
  live.addEventListener('unread', soon);
  window.addEventListener('focus', soon);
  document.addEventListener('visibilitychange', soon);
}
