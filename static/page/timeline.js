// The messages in view: older ones as one scrolls up, new ones as they come.

import { inTurn, part } from './api.js';
import { localise } from './words.js';

const log = document.getElementById('log');
const list = document.getElementById('messages');
const nothing = document.getElementById('nothing');
const toNewest = document.getElementById('to-newest');
export const address = log.dataset.address;
const GAP = 300; // milliseconds between two looks
const awaited = new Set(); // ids of announced messages

export const timeline = new EventTarget(); // `added`: the elements `items`, which `isNew` are, or old ones
export const channelId = Number(log.dataset.channel);

// Whether the list goes on to the newest message, and whether that is in view. `#log` is a reversed column, so that it
// begins at its end even without a script: there `scrollTop` is 0, and above it less.
export const reachesNewest = () => !('newer' in list.dataset);
export const isAtEnd = () => reachesNewest() && Math.abs(log.scrollTop) < 48;

// The ids of the messages that the list has, the oldest first.
export const listedIds = () => [...list.children].map(idOf);

// Whether an announced message is not in the list: fetching it failed, or is in progress.
export const isBehind = () => awaited.size > 0;

const idOf = (item) => Number(item?.dataset.id ?? 0);

async function fetchMessages(query) {
  const given = (await part(`${address}/messages?${query}`)).getElementById('messages');
  const items = [...given.children].map((item) => document.adoptNode(item));
  for (const item of items) localise(item);
  return { items, more: 'older' in given.dataset, newer: 'newer' in given.dataset };
}

// Change the list without moving what the reader looks at.
function inPlace(change) {
  const anchor = [...list.children].find((item) => item.getBoundingClientRect().bottom > log.getBoundingClientRect().top);
  const before = anchor?.getBoundingClientRect().top;
  change();
  if (anchor?.isConnected) log.scrollTop += anchor.getBoundingClientRect().top - before;
}

// Append what is newer than the last message.
export const lookForNew = inTurn(async () => {
  let more = reachesNewest();
  while (more) {
    const { items, newer } = await fetchMessages(`after=${idOf(list.lastElementChild)}`);
    append(items);
    more = newer;
  }
}, GAP);

// Look for what is new, of which this message is. Ids are given when a message is written, and it is seen when that is
// through: one may come after others that have a higher id, and then `after` the last one there is nothing.
export async function lookFor(id) {
  awaited.add(id);
  await lookForNew();
  if (isMissing(id)) await lookAnew();
  awaited.delete(id); // it is there, or is no more
}

const isMissing = (id) =>
  reachesNewest() && !document.getElementById(`message-${id}`)
  && (id > idOf(list.firstElementChild) || !document.getElementById('older'));

function append(items) {
  const fresh = items.filter((item) => !document.getElementById(item.id));
  if (!fresh.length) return;
  const follow = isAtEnd();
  if (follow) insert(fresh);
  else inPlace(() => insert(fresh));
  if (follow) scrollToEnd();
  else toNewest.hidden = false;
  nothing.hidden = true;
  timeline.dispatchEvent(new CustomEvent('added', { detail: { items: fresh, isNew: true } }));
}

// Each where its id belongs; mostly that is the end.
function insert(items) {
  for (const item of items) {
    const earlier = [...list.children].findLast((one) => idOf(one) < idOf(item));
    if (earlier) earlier.after(item);
    else list.prepend(item);
  }
}

// Bring what is shown up to date: some of it may have been edited or deleted meanwhile.
export const lookAnew = inTurn(async () => {
  if (!reachesNewest() || list.children.length < 1) return lookForNew();
  const asked = [...awaited];
  const shown = new Map([...list.children].map((item) => [item.id, item])); // and not what comes while this is asked
  const { items, more } = await fetchMessages('');
  const first = more ? idOf(items[0]) : 0;
  const given = new Set(items.map((item) => item.id));
  inPlace(() => {
    for (const item of items) {
      const old = shown.get(item.id);
      if (old && !old.querySelector('.content').isEqualNode(item.querySelector('.content'))) {
        old.querySelector('.by').replaceWith(item.querySelector('.by'));
        old.querySelector('.content').replaceWith(item.querySelector('.content'));
      }
    }
    for (const [id, old] of shown) if (idOf(old) >= first && !given.has(id)) old.remove();
  });
  if (items.length && first > idOf(list.lastElementChild)) return location.reload(); // too much has happened
  append(items);
  nothing.hidden = list.children.length > 0;
  for (const id of asked) awaited.delete(id);
}, GAP);

async function loadOlder() {
  const older = document.getElementById('older');
  if (!older || log.ariaBusy === 'true') return;
  log.ariaBusy = 'true';
  log.ariaLive = 'off'; // what is old is no news
  try {
    const { items, more } = await fetchMessages(`before=${idOf(list.firstElementChild)}`);
    inPlace(() => list.prepend(...items));
    older.href = `${address}?before=${idOf(list.firstElementChild)}`;
    if (!more) older.parentElement.remove();
    timeline.dispatchEvent(new CustomEvent('added', { detail: { items, isNew: false } }));
  } finally {
    log.ariaBusy = 'false';
    setTimeout(() => { log.ariaLive = null; }, 1_000);
  }
}

export function scrollToEnd() {
  log.scrollTop = 0;
  toNewest.hidden = true;
}

export function start() {
  localise(document);
  if (!reachesNewest()) {
    toNewest.textContent = 'To the newest';
    toNewest.hidden = false;
  }
  toNewest.addEventListener('click', () => {
    if (!reachesNewest()) return location.assign(address);
    scrollToEnd();
    log.focus();
  });
  log.addEventListener('scroll', () => { if (isAtEnd()) toNewest.hidden = true; }, { passive: true });
  const older = document.getElementById('older');
  if (!older) return;
  older.addEventListener('click', (event) => {
    event.preventDefault();
    loadOlder().catch(() => location.assign(older.href));
  });
  const near = new IntersectionObserver(
    ([{ isIntersecting }]) => { if (isIntersecting) loadOlder().catch(() => {}); },
    { root: log, rootMargin: '300px 0px 0px' },
  );
  near.observe(older);
}

// To the message that the address names; where it is not in view, to the page on which it is.
export function jump() {
  const [, id] = location.hash.match(/^#message-(\d+)$/) ?? [];
  if (!id) return;
  const item = document.getElementById(`message-${id}`);
  const asked = new URLSearchParams(location.search).get('around') === id;
  if (item) item.scrollIntoView({ block: 'center' });
  else if (!asked) location.replace(`${address}?around=${id}#message-${id}`);
  else gone();
}

function gone() {
  const notice = document.getElementById('notice');
  notice.textContent = 'This message is not there any more.';
  notice.hidden = false;
}
