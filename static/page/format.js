// Format times, numbers and decisions.

const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: 'short' });
const DAY = new Intl.DateTimeFormat(undefined, { day: 'numeric', month: 'short' });
const DAY_AND_YEAR = new Intl.DateTimeFormat(undefined, { day: 'numeric', month: 'short', year: 'numeric' });
const WEEKDAY = new Intl.DateTimeFormat(undefined, { weekday: 'long', day: 'numeric', month: 'long' });
const WEEKDAY_AND_YEAR = new Intl.DateTimeFormat(undefined,
  { weekday: 'long', day: 'numeric', month: 'long', year: 'numeric' });
const LONG = new Intl.DateTimeFormat(undefined, { dateStyle: 'long', timeStyle: 'short' });
const COUNT = new Intl.NumberFormat();

export const clock = (time) => CLOCK.format(time);
export const count = (number) => COUNT.format(number);

const isThisYear = (time) => time.getFullYear() === new Date().getFullYear();

// `09:30` for today, otherwise `23 Nov, 09:30`, with the year where it is another one.
export function when(time, now = new Date()) {
  if (time.toDateString() === now.toDateString()) return clock(time);
  return `${(isThisYear(time) ? DAY : DAY_AND_YEAR).format(time)}, ${clock(time)}`;
}

// `Today`, `Yesterday`, or `Monday, 23 November`, with the year where it is another one.
export function day(time) {
  const yesterday = new Date();
  if (time.toDateString() === yesterday.toDateString()) return 'Today';
  yesterday.setDate(yesterday.getDate() - 1);
  if (time.toDateString() === yesterday.toDateString()) return 'Yesterday';
  return (isThisYear(time) ? WEEKDAY : WEEKDAY_AND_YEAR).format(time);
}

// The beginning of a message in the list.
export const excerpt = (item) => item.querySelector('.content').textContent.trim().slice(0, 200);

// Show times, which the server wrote in UTC, in the user's time zone.
export function localise(root) {
  for (const element of root.querySelectorAll('time[datetime]')) {
    const time = new Date(element.dateTime);
    element.textContent = element.classList.contains('day') ? day(time) : when(time);
    element.title = LONG.format(time);
  }
}

// Why members were notified, and why they were not, by decision.
export const NOTIFIED = {
  message: 'want every message',
  mention: 'were mentioned by name',
  mention_role: 'have a role that was mentioned',
  mention_everyone: 'were mentioned as everyone',
};
export const NOT_NOTIFIED = {
  author: 'wrote it',
  no_channel_access: 'cannot see the channel',
  no_subscription: 'have no active subscription',
  channel_off: 'have switched the channel off',
  mentions_only: 'want mentions only',
  muted: 'have muted the channel',
};

const YOURS = { they: 'you', theirs: 'yours', their: 'your', them: 'you' };

// An explanation as one sentence; `name` is null for the user.
export function because({ detail, notified_at: notified, read_at: read }, name = null) {
  const outcome = `${name ?? 'You'} ${name ? 'was' : 'were'} ${notified ? '' : 'not '}notified`;
  const at = notified ? ` at ${when(new Date(notified))}${read ? ` and read it at ${when(new Date(read))}` : ''}` : '';
  const why = name ? detail : detail.replace(/\b(they|theirs|their|them)\b/gi, (word) => {
    const mine = YOURS[word.toLowerCase()];
    return word[0] === 'T' ? mine[0].toUpperCase() + mine.slice(1) : mine;
  });
  return `${outcome}${at}: ${why[0].toLowerCase()}${why.slice(1)}`;
}
