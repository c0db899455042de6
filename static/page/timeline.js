// The list of messages: older ones are loaded while scrolling up, new ones as they arrive.

import { coalesce, part } from './api.js';
import { day, localise } from './format.js';

const log = document.getElementById('log');
const list = document.getElementById('messages');
const nothing = document.getElementById('nothing');
const toNewest = document.getElementById('to-newest');
export const address = log.dataset.address;
const GAP = 300; // milliseconds between two fetches
const PAGE_SIZE = 50; // messages in one request
const GROUP = 5 * 60_000; // milliseconds within which messages of one author are shown together
const pendingIds = new Set(); // ids of announced messages

export const timeline = new EventTarget(); // event `added`: the elements `items`, and whether they are new (`isNew`) or older ones
export const channelId = Number(log.dataset.channel);

// Whether the list includes the newest message, and whether that is in view. `#log` is a reversed column, so that it
// starts at its end without a script: there `scrollTop` is 0, and above it negative.
export const reachesNewest = () => !('newer' in list.dataset);
export const isAtEnd = () => reachesNewest() && Math.abs(log.scrollTop) < 48;

// The ids of the listed messages, oldest first.
export const listedIds = () => [...list.children].map(idOf);

// Whether an announced message is not in the list: fetching it failed, or is in progress.
export const hasPending = () => pendingIds.size > 0;

const idOf = (item) => Number(item?.dataset.id ?? 0);

async function fetchMessages(query) {
  const given = (await part(`${address}/messages?${query}`)).getElementById('messages');
  const items = [...given.children].map((item) => document.adoptNode(item));
  for (const item of items) localise(item);
  return { items, more: 'older' in given.dataset, newer: 'newer' in given.dataset };
}

// Change the list without moving the visible messages.
function keepScrollPosition(change) {
  const anchor = [...list.children].find((item) => item.getBoundingClientRect().bottom > log.getBoundingClientRect().top);
  const before = anchor?.getBoundingClientRect().top;
  change();
  if (anchor?.isConnected) log.scrollTop += anchor.getBoundingClientRect().top - before;
}

// Append the messages that are newer than the last one.
export const fetchNewer = coalesce(async () => {
  while (reachesNewest() && await appendPage());
}, GAP);

// Append the next page of messages; whether another follows.
async function appendPage() {
  const { items, newer } = await fetchMessages(`after=${idOf(list.lastElementChild)}`);
  append(items);
  return newer;
}

// Append the next page where the list does not reach the newest message.
const loadNewer = coalesce(async () => {
  if (reachesNewest()) return;
  await quietly(async () => {
    if (await appendPage()) return;
    delete list.dataset.newer;
    document.getElementById('newer').parentElement.remove();
  });
}, GAP);

// Fetch new messages, among them this one. An id is assigned before the message is committed, so a message may appear
// after others with higher ids. Then nothing is found after the last one, and the whole page is fetched.
export async function fetchMessage(id) {
  pendingIds.add(id);
  await fetchNewer();
  if (isMissing(id)) await refresh();
  pendingIds.delete(id); // it is listed, or was deleted
}

// Update messages that were posted, edited or deleted elsewhere.
const changedIds = new Set();

export function updateMessages(ids) {
  const listed = ids.filter((id) => document.getElementById(`message-${id}`));
  for (const id of listed) changedIds.add(id);
  const others = reachesNewest() ? ids.filter((id) => !listed.includes(id)) : [];
  return Promise.all([listed.length ? updateChanged() : null, ...others.map(fetchMessage)]);
}

const updateChanged = coalesce(async () => {
  const ids = [...changedIds].slice(0, PAGE_SIZE);
  if (!ids.length) return;
  const { items } = await fetchMessages(`ids=${ids}`);
  for (const id of ids) changedIds.delete(id);
  keepScrollPosition(() => replace(ids.map((id) => `message-${id}`), items));
}, GAP);

// Replace what listed messages contain by what the given ones do; remove those that are not given.
function replace(ids, given) {
  const found = new Map(given.map((item) => [item.id, item]));
  for (const id of ids) {
    const old = document.getElementById(id);
    const item = found.get(id);
    if (!item) old?.remove();
    else if (old && !old.querySelector('.content').isEqualNode(item.querySelector('.content'))) {
      old.querySelector('.by').replaceWith(item.querySelector('.by'));
      old.querySelector('.content').replaceWith(item.querySelector('.content'));
    }
  }
  arrange();
  nothing.hidden = list.children.length > 0;
}

const isMissing = (id) =>
  reachesNewest() && !document.getElementById(`message-${id}`)
  && (id > idOf(list.firstElementChild) || !document.getElementById('older'));

function append(items) {
  const fresh = items.filter((item) => !document.getElementById(item.id));
  if (!fresh.length) return;
  const follow = isAtEnd();
  if (follow) insert(fresh);
  else keepScrollPosition(() => insert(fresh));
  if (follow) scrollToEnd();
  else if (reachesNewest()) offerNewest('New messages');
  nothing.hidden = true;
  timeline.dispatchEvent(new CustomEvent('added', { detail: { items: fresh, isNew: true } }));
}

// Show a line before the first message of each day, and the author once for messages that follow each other.
function arrange() {
  let before = null;
  for (const item of list.children) {
    const time = new Date(item.querySelector('.when time').dateTime);
    const isNewDay = time.toDateString() !== before?.time.toDateString();
    const { author } = item.dataset;
    const continues = !isNewDay && author === before.author && time - before.time < GROUP && !item.querySelector('#new');
    item.classList.toggle('continued', continues);
    item.querySelector('.day-line')?.remove();
    if (isNewDay) {
      const line = document.createElement('p');
      line.className = 'day-line';
      line.textContent = day(time);
      item.prepend(line);
    }
    before = { time, author };
  }
}

// Insert in the order of ids; usually at the end.
function insert(items) {
  for (const item of items) {
    const earlier = [...list.children].findLast((one) => idOf(one) < idOf(item));
    if (earlier) earlier.after(item);
    else list.prepend(item);
  }
  arrange();
}

// Update the listed messages, which may have been edited or deleted.
export const refresh = coalesce(async () => {
  if (!reachesNewest() || list.children.length < 1) return fetchNewer();
  const pending = [...pendingIds];
  const shown = [...list.children]; // without those added during the request
  const { items, more } = await fetchMessages('');
  const first = more ? idOf(items[0]) : 0;
  keepScrollPosition(() => replace(shown.filter((item) => idOf(item) >= first).map((item) => item.id), items));
  if (items.length && first > idOf(list.lastElementChild)) return location.reload(); // more messages than one page are missing
  append(items);
  for (const id of pending) pendingIds.delete(id);
}, GAP);

// Run `work` without announcing the messages that it adds.
async function quietly(work) {
  log.ariaBusy = 'true';
  log.ariaLive = 'off';
  try {
    await work();
  } finally {
    log.ariaBusy = 'false';
    setTimeout(() => { log.ariaLive = null; }, 1_000);
  }
}

async function loadOlder() {
  const older = document.getElementById('older');
  if (!older || log.ariaBusy === 'true') return;
  await quietly(async () => {
    const { items, more } = await fetchMessages(`before=${idOf(list.firstElementChild)}`);
    keepScrollPosition(() => {
      list.prepend(...items);
      arrange();
    });
    older.href = `${address}?before=${idOf(list.firstElementChild)}`;
    if (!more) older.parentElement.remove();
    timeline.dispatchEvent(new CustomEvent('added', { detail: { items, isNew: false } }));
  });
}

function offerNewest(text) {
  toNewest.textContent = text;
  toNewest.hidden = false;
}

export function scrollToEnd() {
  log.scrollTop = 0;
  toNewest.hidden = true;
}

export function start() {
  localise(document);
  arrange();
  if (!reachesNewest()) offerNewest('To the newest');
  toNewest.addEventListener('click', () => {
    if (!reachesNewest()) return location.assign(`${address}?newest=1`);
    scrollToEnd();
    log.focus();
  });
  log.addEventListener('scroll', () => { if (isAtEnd()) toNewest.hidden = true; }, { passive: true });
  loadWhenNear('older', loadOlder);
  loadWhenNear('newer', loadNewer);
}

// Load more messages when the link to them is clicked, or comes near the view.
function loadWhenNear(id, load) {
  const link = document.getElementById(id);
  if (!link) return;
  link.addEventListener('click', (event) => {
    event.preventDefault();
    load().catch(() => location.assign(link.href));
  });
  const near = new IntersectionObserver(async ([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    await load();
    near.unobserve(link); // and again: the link may still be near
    near.observe(link);
  }, { root: log, rootMargin: '300px 0px' });
  near.observe(link);
}

// Scroll to the first unread message, unless the URL names another place.
export function goToUnread() {
  if (!location.hash || location.hash === '#new') document.getElementById('new')?.scrollIntoView();
}

// Scroll to the message in the URL's fragment; load its page where it is not listed.
export function jump() {
  const [, id] = location.hash.match(/^#message-(\d+)$/) ?? [];
  if (!id) return;
  const item = document.getElementById(`message-${id}`);
  const asked = new URLSearchParams(location.search).get('around') === id;
  if (item) item.scrollIntoView({ block: 'center' });
  else if (!asked) location.replace(`${address}?around=${id}#message-${id}`);
  else showMissing();
}

function showMissing() {
  const notice = document.getElementById('notice');
  notice.textContent = 'This message does not exist any more.';
  notice.hidden = false;
}
