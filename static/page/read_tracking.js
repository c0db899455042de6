// Mark messages read when they were seen.
//
// - A message is seen when it was in view for a moment while the window was visible and had the focus.
// - Only seen messages are marked, by their ids. All others stay unread until the user marks them: by scrolling to them,
//   or by "Mark all read".

import { call } from './api.js';
import { count } from './format.js';
import { live, recount } from './live.js';
import { channelId, timeline } from './timeline.js';
import { mentionsIn, unreadIn } from './unread.js';

const MOMENT = 600; // milliseconds in view
const BAR_DELAY = 2 * MOMENT; // new messages that are in view are read before the bar would appear
const BATCH_SIZE = 1_000; // the maximum of notifications in one request
const MIN_INTERVAL = 2_000; // milliseconds between two requests in a busy channel
const me = document.body.dataset.user;
const log = document.getElementById('log');
const bar = document.getElementById('unread-bar');
const toMention = document.getElementById('to-mention');
const seen = new Set(); // ids to be marked
const inView = [new Map(), new Map()]; // for each observer {message: when it came into view, as `performance.now()`}
let waiting = null;
let next = 0;
let before = null; // the last ids and unread count: the same request again would change nothing

const hasAttention = () => document.visibilityState === 'visible' && document.hasFocus();

function markSoon(delay = MOMENT) {
  waiting ??= setTimeout(mark, Math.max(delay, next - performance.now())); // further messages do not delay it
}

async function mark() {
  waiting = null;
  if (!hasAttention() || !unreadIn(channelId)) return;
  if (addSeen()) markSoon();
  const ids = [...seen].slice(0, BATCH_SIZE);
  const now = `${ids} ${unreadIn(channelId)}`;
  if (!ids.length || now === before) return;
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

// Add the messages that are in view for long enough; whether others are in view.
function addSeen() {
  const now = performance.now();
  let others = false;
  for (const views of inView) {
    for (const [item, since] of views) {
      if (now - since >= MOMENT) seen.add(item.dataset.id);
      else others = true;
    }
  }
  return others;
}

// What is in view when the window gets the attention comes into view then.
function attend() {
  const now = performance.now();
  for (const views of inView) for (const item of views.keys()) views.set(item, now);
  markSoon();
}

// A message is in view when a third of it is visible, or when it covers the middle of the window.
const observers = [{ threshold: 0.3 }, { rootMargin: '-49% 0px -49% 0px' }].map((options, number) =>
  new IntersectionObserver((entries) => {
    const views = inView[number];
    if (hasAttention()) addSeen(); // before those that leave are removed
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) views.delete(target);
      else if (!views.has(target)) views.set(target, performance.now());
    }
    markSoon();
  }, { root: log, ...options }));

const watch = (item) => observers.forEach((observer) => observer.observe(item));

let barTimer;
function showBar() {
  clearTimeout(barTimer);
  const unread = unreadIn(channelId);
  if (!unread) bar.hidden = true;
  else if (bar.hidden) barTimer = setTimeout(fillBar, BAR_DELAY);
  else fillBar();
}

function fillBar() {
  const mentions = mentionsIn(channelId);
  bar.hidden = !unreadIn(channelId);
  bar.querySelector('.number').textContent = count(unreadIn(channelId));
  toMention.hidden = !mentions;
  toMention.textContent = mentions === 1 ? 'To the mention' : `To the first of ${count(mentions)} mentions`;
}

async function goToMention() {
  const query = `unread=1&mentions=1&limit=100&channel_id=${channelId}`;
  const { items } = await call('GET', `/api/notifications?${query}`);
  if (items.length) location.hash = `#message-${items.at(-1).message_id}`;
}

async function markChannel() {
  await call('POST', '/api/notifications/read', { channel_id: channelId });
  await recount();
}

export function start() {
  for (const item of document.querySelectorAll('#messages > li')) watch(item);
  timeline.addEventListener('added', ({ detail }) => detail.items.forEach(watch));
  live.addEventListener('unread', () => {
    markSoon();
    showBar();
  });
  window.addEventListener('focus', attend);
  document.addEventListener('visibilitychange', attend);
  toMention.addEventListener('click', () => goToMention().catch(() => {}));
  document.getElementById('mark-channel').addEventListener('click', () => markChannel().catch(() => {}));
  fillBar();
}
