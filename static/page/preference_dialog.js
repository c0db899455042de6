// The dialog for the user's notification preference in the channel.

import { call } from './api.js';
import { channelId } from './timeline.js';
import { when } from './format.js';

const MORNING = 8; // o'clock
const SHORT = { all: 'All messages', mentions: 'Mentions only', none: 'Nothing' };
const dialog = document.getElementById('setting');
const button = document.getElementById('setting-button');
const effect = document.getElementById('effect');
let muteTimer;

const UNTIL = {
  hour: () => new Date(Date.now() + 3_600_000),
  day: () => new Date(Date.now() + 86_400_000),
  morning() {
    const time = new Date();
    if (time.getHours() >= MORNING) time.setDate(time.getDate() + 1);
    time.setHours(MORNING, 0, 0, 0);
    return time;
  },
  end: () => null,
};

function mutedUntil() {
  const time = new Date(dialog.dataset.mutedUntil ?? 0);
  return time > new Date() ? time : null;
}

function show() {
  const { level } = dialog.dataset;
  const until = mutedUntil();
  dialog.querySelector(`[value="${level}"]`).checked = true;
  const sentence = dialog.getAttribute(`data-effect-${level}${until ? '-muted' : ''}`);
  effect.textContent = sentence.replace('TIME', until ? when(until) : '');
  const quiet = until && level !== 'none';
  button.querySelector('.text').textContent = quiet ? `Muted until ${when(until)}` : SHORT[level];
  button.classList.toggle('reduced', Boolean(until) || level !== 'all');
  dialog.querySelector('[data-mute="end"]').hidden = !until;
  clearTimeout(muteTimer);
  if (until) muteTimer = setTimeout(show, Math.min(until - new Date() + 1_000, 2 ** 31 - 1));
}

async function set(level, until) {
  try {
    const now = await call('PUT', `/api/channels/${channelId}/preference`, { level, muted_until: until });
    dialog.dataset.level = now.level;
    if (now.muted_until) dialog.dataset.mutedUntil = now.muted_until;
    else delete dialog.dataset.mutedUntil;
    show();
  } catch (problem) {
    show();
    effect.textContent = problem.message;
  }
}

export function start() {
  show();
  button.addEventListener('click', () => dialog.showModal());
  dialog.addEventListener('change', ({ target }) => set(target.value, mutedUntil()));
  dialog.addEventListener('click', ({ target }) => {
    const { mute } = target.dataset;
    if (!mute) return;
    set(dialog.dataset.level, UNTIL[mute]());
    if (mute === 'end') dialog.querySelector('[data-mute="hour"]').focus();
  });
}
