// The stream of what happens, as events: `notification`, `unread`, `tick` (look for what is new), `reset` (look anew),
// and `state`: connecting, live, reconnecting, offline, unsubscribed, signed-out.

import { call } from './api.js';

const ADDRESS = '/api/notifications/stream';
const SILENCE = 45_000; // three pings that did not come: the connection is dead, and nobody has said so
const POLL = 30_000;
const AGAIN = 5_000;
const HIDDEN = 10_000; // A page in the background lets go: browsers open six connections to a site, for all of its tabs.

export const live = new EventTarget();
let source = null;
let silence, later, hiding;
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
  window.addEventListener('online', open);
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
  later = setTimeout(poll, POLL);
}

function close() {
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
  hear('open', () => { hears = false; });
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
  hear('reset', () => emit('reset'));
  hear('ping', () => emit('tick'));
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

// The stream was refused, and the browser does not try again by itself: find out what that means.
async function refused() {
  close();
  let status = 0;
  try {
    status = (await fetch(ADDRESS, { method: 'HEAD', cache: 'no-store' })).status;
  } catch { /* nobody answered */ }
  if (status === 401) say('signed-out');
  else if (status === 403) withoutStream();
  else {
    say(status || navigator.onLine ? 'reconnecting' : 'offline');
    later = setTimeout(open, AGAIN * (1 + Math.random()));
  }
}

// Until the page is loaded again, with a subscription perhaps.
function withoutStream() {
  say('unsubscribed');
  later = setTimeout(poll, POLL);
}

async function poll() {
  try {
    emit('unread', await call('GET', '/api/notifications/unread-count'));
    emit('tick');
  } catch (problem) {
    if (problem.status === 401) return say('signed-out');
  }
  later = setTimeout(poll, POLL);
}

// Ask for the count where no stream brings it.
export async function recount() {
  if (state !== 'live') emit('unread', await call('GET', '/api/notifications/unread-count'));
}
