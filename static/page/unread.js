// Show the unread counts in the bell, the channels and the title, and the state of the stream.

import { live } from './live.js';
import { count } from './format.js';

const TEXTS = {
  connecting: '', live: 'Live', delayed: 'Notifications are delayed', reconnecting: 'Reconnecting …', offline: 'Offline',
  polling: 'Updated every half minute', unsubscribed: 'Not live', 'signed-out': 'Signed out',
};
const bell = document.getElementById('bell');
const connection = document.getElementById('connection');
const notice = document.getElementById('notice');
const title = document.title.replace(/^\(\d+\) /, '');
let channels = new Map([...document.querySelectorAll('#channels a[data-unread]')].map(({ dataset }) =>
  [Number(dataset.channel), { unread: Number(dataset.unread), mentions: Number(dataset.mentions) }]));

// The number of unread notifications of a channel, and how many of them are mentions.
export const unreadIn = (channelId) => channels.get(channelId)?.unread ?? 0;
export const mentionsIn = (channelId) => channels.get(channelId)?.mentions ?? 0;

function show({ unread, mentions, channels: list }) {
  channels = new Map(list.map((one) => [one.channel_id, one]));
  document.title = unread ? `(${unread}) ${title}` : title;
  fill(bell.querySelector('.number'), unread);
  bell.classList.toggle('mentions', mentions > 0);
  bell.querySelector('.label').textContent = unread ? ` unread${named(mentions)}` : 'nothing unread';
  for (const link of document.querySelectorAll('#channels a[data-channel]')) {
    const here = channels.get(Number(link.dataset.channel));
    const badge = link.querySelector('.count');
    badge.hidden = !here;
    badge.classList.toggle('mentions', Boolean(here?.mentions));
    badge.querySelector('.number').textContent = here ? count(here.unread) : '';
    badge.querySelector('.visually-hidden').textContent = ` unread${named(here?.mentions)}`;
  }
}

const named = (mentions) => (mentions ? `, ${count(mentions)} mentioning you` : '');

function fill(element, number) {
  element.hidden = !number;
  element.textContent = count(number);
}

live.addEventListener('unread', ({ detail }) => show(detail));

// A short interruption is not shown.
let waiting;
live.addEventListener('state', ({ detail: state }) => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    connection.dataset.state = state;
    connection.querySelector('.text').textContent = TEXTS[state];
    if (state === 'unsubscribed') {
      notice.hidden = false;
      notice.textContent = 'Live updates need an active subscription. Without one, this page is updated every half minute.';
    } else if (state === 'signed-out') {
      notice.hidden = false;
      const link = document.createElement('a');
      link.href = `/login?next=${encodeURIComponent(location.pathname + location.search)}`;
      link.textContent = 'Sign in again';
      notice.replaceChildren('You are signed out. ', link);
    }
  }, state === 'reconnecting' || state === 'polling' ? 2_000 : 0);
});
