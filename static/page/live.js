// The stream of server-sent events. Events: `notification`, `messages` (those of the page's channel that were posted,
// edited or deleted), `unread`, `tick` (fetch what is new), `reset` (fetch everything again), `ping` (the stream works), and `state`: connecting, live, delayed, reconnecting, polling,
// offline, unsubscribed, signed-out.

import { call } from './api.js';

const viewed = document.getElementById('log')?.dataset.channel;
const ADDRESS = `/api/notifications/stream${viewed ? `?channel_id=${viewed}` : ''}`;
const SILENCE = 12_000; // ms; two missing pings: the connection is dead
const POLL = 30_000;
const RETRY_DELAY = 5_000; // doubled after each refusal
const SPREAD = 3_000; // ms over which pages spread requests that an event to all of them causes
const HIDDEN = 10_000; // ms until a hidden page closes its stream: a browser opens six connections to a site

export const live = new EventTarget();
let source = null;
let silenceTimer, retryTimer, hiddenTimer;
let generation = 0; // counts openings and closings: answers from before one are ignored
let refusals = 0;
let state = 'connecting';
let isNew = true; // the page was just loaded and is nearly up to date

const emit = (name, detail) => live.dispatchEvent(new CustomEvent(name, { detail }));
const isConnected = () => state === 'live' || state === 'delayed';
const isOver = () => state === 'unsubscribed' || state === 'signed-out';

function setState(now) {
  if (now === state) return;
  state = now;
  emit('state', now);
}

export const isDelayed = () => state === 'delayed';

export function start() {
  if (!('canStream' in document.body.dataset)) return withoutStream();
  document.addEventListener('visibilitychange', watch);
  window.addEventListener('online', () => (document.visibilityState === 'hidden' ? pause() : open()));
  window.addEventListener('offline', () => isOver() || setState('offline'));
  window.addEventListener('pagehide', close); // an open stream would keep the page out of the back/forward cache
  window.addEventListener('pageshow', (event) => event.persisted && open());
  watch();
}

function watch() {
  clearTimeout(hiddenTimer);
  if (document.visibilityState === 'hidden') hiddenTimer = setTimeout(pause, source ? HIDDEN : 0);
  else if (!source) open();
}

// Hidden: only update the title.
function pause() {
  if (isOver()) return;
  close();
  pollLater();
}

function close() {
  generation += 1;
  clearTimeout(silenceTimer);
  clearTimeout(retryTimer);
  source?.close();
  source = null;
}

function open() {
  if (isOver()) return;
  close();
  const mine = new EventSource(ADDRESS);
  source = mine;
  let resumes = false;
  let isOpen = false;
  const on = (name, act) => mine.addEventListener(name, (event) => { watchSilence(); act(event); });
  on('open', () => { isOpen = false; refusals = 0; });
  on('notification', (event) => emit('notification', JSON.parse(event.data)));
  // The count is the first event of a stream. Messages between the page, or the last stream, and this moment have no
  // event, so they are fetched. The browser resumes after its last event; a new stream starts over.
  on('unread', (event) => {
    if (!isOpen) {
      isOpen = true;
      setState('live');
      if (isNew) emit('tick');
      else resetSoon(resumes);
      isNew = false;
      resumes = true;
    }
    emit('unread', JSON.parse(event.data));
  });
  on('messages', (event) => emit('messages', JSON.parse(event.data)));
  on('reset', () => resetSoon(true));
  on('ping', (event) => {
    const { delayed_seconds: delay } = JSON.parse(event.data);
    if (isConnected()) setState(delay ? 'delayed' : 'live');
    emit('ping');
  });
  mine.addEventListener('error', () => {
    if (source !== mine) return;
    if (mine.readyState === EventSource.CLOSED) refused();
    else setState(navigator.onLine ? 'reconnecting' : 'offline');
  });
  watchSilence();
}

// Fetch everything again; `spread` over a while where many pages do it at the same time.
function resetSoon(spread) {
  if (!spread) return emit('reset');
  emit('tick');
  setTimeout(emit, Math.random() * SPREAD, 'reset');
}

function watchSilence() {
  clearTimeout(silenceTimer);
  silenceTimer = setTimeout(open, SILENCE);
}

// The stream was refused, and the browser does not try again: find out why. While the server accepts no more streams,
// the page polls before each attempt.
async function refused() {
  close();
  const mine = generation;
  let answer = null;
  try {
    answer = await fetch(ADDRESS, { method: 'HEAD', cache: 'no-store' });
  } catch { /* no answer */ }
  if (mine !== generation) return;
  if (answer?.status === 401) return setState('signed-out');
  if (answer?.status === 403) return withoutStream();
  const isUp = answer !== null && await fetchCount();
  if (mine !== generation || isOver()) return;
  setState(isUp ? 'polling' : answer || navigator.onLine ? 'reconnecting' : 'offline');
  const asked = 1_000 * Number(answer?.headers.get('Retry-After') ?? 0);
  const wait = Math.min(POLL, Math.max(asked, RETRY_DELAY * 2 ** refusals));
  refusals += 1;
  retryTimer = setTimeout(open, wait * (1 + Math.random()));
}

// Until the page is loaded again.
function withoutStream() {
  setState('unsubscribed');
  pollLater();
}

function pollLater() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(poll, POLL);
}

async function poll() {
  const mine = generation;
  await fetchCount();
  if (mine === generation && state !== 'signed-out') pollLater();
}

// Whether the server answered.
async function fetchCount() {
  try {
    await count();
    emit('tick');
    return true;
  } catch (problem) {
    if (problem.status === 401) setState('signed-out');
    return false;
  }
}

async function count() {
  emit('unread', await call('GET', '/api/notifications/unread-count'));
}

// Fetch the count where no stream sends it.
export async function recount() {
  if (!isConnected()) await count();
}
