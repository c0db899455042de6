// The stream of what happens, as events: `notification`, `unread`, `tick` (look for what is new), `reset` (look anew),
// `ping` (the stream is well), and `state`: connecting, live, reconnecting, polling, offline, unsubscribed, signed-out.

import { call } from './api.js';

const ADDRESS = '/api/notifications/stream';
const SILENCE = 45_000; // three pings that did not come: the connection is dead, and nobody has said so
const POLL = 30_000;
const AGAIN = 5_000; // and the longer, the more often it was refused
const TOGETHER = 3_000; // ms over which pages spread what all of them are sent at once
const HIDDEN = 10_000; // A page in the background lets go: browsers open six connections to a site, for all of its tabs.

export const live = new EventTarget();
let source = null;
let silence, later, hiding;
let turn = 0; // counts what was begun, so that what was asked before it changes nothing after it
let refusals = 0;
let state = 'connecting';
let isNew = true; // the page knows nearly all that was before

const emit = (name, detail) => live.dispatchEvent(new CustomEvent(name, { detail }));
const isOver = () => state === 'unsubscribed' || state === 'signed-out';

function say(now) {
  if (now === state) return;
  state = now;
  emit('state', now);
}

export function start() {
  if (!('hears' in document.body.dataset)) return withoutStream();
  document.addEventListener('visibilitychange', watch);
  window.addEventListener('online', () => (document.visibilityState === 'hidden' ? rest() : open()));
  window.addEventListener('offline', () => isOver() || say('offline'));
  window.addEventListener('pagehide', close); // an open stream would keep the page out of the back/forward cache
  window.addEventListener('pageshow', (event) => event.persisted && open());
  watch();
}

function watch() {
  clearTimeout(hiding);
  if (document.visibilityState === 'hidden') hiding = setTimeout(rest, source ? HIDDEN : 0);
  else if (!source) open();
}

// In the background: only what the title shows.
function rest() {
  if (isOver()) return;
  close();
  pollLater();
}

function close() {
  turn += 1;
  clearTimeout(silence);
  clearTimeout(later);
  source?.close();
  source = null;
}

function open() {
  if (isOver()) return;
  close();
  const mine = new EventSource(ADDRESS);
  source = mine;
  let resumes = false;
  let hears = false;
  const hear = (name, act) => mine.addEventListener(name, (event) => { listen(); act(event); });
  hear('open', () => { hears = false; refusals = 0; });
  hear('notification', (event) => emit('notification', JSON.parse(event.data)));
  // The count is the first thing that everybody is sent who is met. What came between the page, or the stream before,
  // and this moment has no event: look for it. The browser resumes where it was; with another stream all begins anew.
  hear('unread', (event) => {
    if (!hears) {
      hears = true;
      say('live');
      emit(isNew || resumes ? 'tick' : 'reset');
      isNew = false;
      resumes = true;
    }
    emit('unread', JSON.parse(event.data));
  });
  hear('reset', () => setTimeout(emit, Math.random() * TOGETHER, 'reset'));
  hear('ping', () => emit('ping'));
  mine.addEventListener('error', () => {
    if (source !== mine) return;
    if (mine.readyState === EventSource.CLOSED) refused();
    else say(navigator.onLine ? 'reconnecting' : 'offline');
  });
  listen();
}

function listen() {
  clearTimeout(silence);
  silence = setTimeout(open, SILENCE);
}

// The stream was refused, and the browser does not try again by itself: find out what that means. While there is no room
// for one more, or none is to be had at all, the page looks by itself before each try.
async function refused() {
  close();
  const mine = turn;
  let answer = null;
  try {
    answer = await fetch(ADDRESS, { method: 'HEAD', cache: 'no-store' });
  } catch { /* nobody answered */ }
  if (mine !== turn) return;
  if (answer?.status === 401) return say('signed-out');
  if (answer?.status === 403) return withoutStream();
  const well = answer !== null && await look();
  if (mine !== turn || isOver()) return;
  say(well ? 'polling' : answer || navigator.onLine ? 'reconnecting' : 'offline');
  const asked = 1_000 * Number(answer?.headers.get('Retry-After') ?? 0);
  const wait = Math.min(POLL, Math.max(asked, AGAIN * 2 ** refusals));
  refusals += 1;
  later = setTimeout(open, wait * (1 + Math.random()));
}

// Until the page is loaded again, with a subscription perhaps.
function withoutStream() {
  say('unsubscribed');
  pollLater();
}

function pollLater() {
  clearTimeout(later);
  later = setTimeout(poll, POLL);
}

async function poll() {
  const mine = turn;
  await look();
  if (mine === turn && state !== 'signed-out') pollLater();
}

// Whether it was answered.
async function look() {
  try {
    await count();
    emit('tick');
    return true;
  } catch (problem) {
    if (problem.status === 401) say('signed-out');
    return false;
  }
}

async function count() {
  emit('unread', await call('GET', '/api/notifications/unread-count'));
}

// Ask for the count where no stream brings it.
export async function recount() {
  if (state !== 'live') await count();
}
