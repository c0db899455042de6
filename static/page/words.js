// Times and decisions in words.

const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: 'short' });
const DAY = new Intl.DateTimeFormat(undefined, { day: 'numeric', month: 'short' });
const LONG = new Intl.DateTimeFormat(undefined, { dateStyle: 'long', timeStyle: 'short' });
const COUNT = new Intl.NumberFormat();

export const clock = (time) => CLOCK.format(time);
export const count = (number) => COUNT.format(number);

// `09:30` of today, else `23 Nov, 09:30`.
export function when(time, now = new Date()) {
  return time.toDateString() === now.toDateString() ? clock(time) : `${DAY.format(time)}, ${clock(time)}`;
}

// How a message in the list begins.
export const excerpt = (item) => item.querySelector('.content').textContent.trim().slice(0, 200);

// Each time that the server wrote in UTC, in the reader's own.
export function localise(root) {
  for (const element of root.querySelectorAll('time[datetime]')) {
    const time = new Date(element.dateTime);
    element.textContent = when(time);
    element.title = LONG.format(time);
  }
}

// What each decision says of the members whom it counts: those who were told, and those who were not.
export const TOLD = {
  message: 'want every message',
  mention: 'were mentioned by name',
  mention_role: 'have a role that was mentioned',
  mention_everyone: 'were mentioned as everyone',
};
export const NOT_TOLD = {
  author: 'wrote it',
  no_channel_access: 'cannot see the channel',
  no_subscription: 'have no active subscription',
  preference_none: 'have switched the channel off',
  preference_mentions: 'want mentions only',
  muted: 'have muted the channel',
};

const YOURS = { they: 'you', theirs: 'yours', their: 'your', them: 'you' };

// One sentence of an explanation; `name` null is the reader.
export function because({ detail, notified_at: told, read_at: read }, name = null) {
  const told_or_not = `${name ?? 'You'} ${name ? 'was' : 'were'} ${told ? '' : 'not '}told`;
  const at = told ? ` at ${when(new Date(told))}${read ? ` and read it at ${when(new Date(read))}` : ''}` : '';
  const why = name ? detail : detail.replace(/\b(they|theirs|their|them)\b/gi, (word) => {
    const mine = YOURS[word.toLowerCase()];
    return word[0] === 'T' ? mine[0].toUpperCase() + mine.slice(1) : mine;
  });
  return `${told_or_not}${at}: ${why[0].toLowerCase()}${why.slice(1)}`;
}
