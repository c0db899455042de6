// The progress of a run and its statistics, for the message's author and for admins.

import { call } from './api.js';
import { count, excerpt, NOT_NOTIFIED, NOTIFIED } from './format.js';

const PAUSE = 500;
const LONGEST = 10_000; // between two requests while nothing changes
const WATCHED = 5; // runs at once, so that an author of many messages does not use up the rate limit
const SVG = 'http://www.w3.org/2000/svg';
const STATES = {
  pending: 'Waiting …', queued: 'Waiting …', running: 'Sending …',
};
const dialog = document.getElementById('run');
const state = document.getElementById('run-state');
const retry = document.getElementById('run-retry'); // for admins
const bar = document.getElementById('run-progress');
const table = document.getElementById('run-decisions');
let shown = 0; // counts how often the dialog was opened: answers for an earlier opening are ignored

export const isOver = ({ state: now }) => now === 'succeeded' || now === 'failed';
const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

// Request the run until it is finished or `wanted` returns false; less often while nothing changes.
async function follow(id, show, wanted) {
  let before;
  let wait = PAUSE;
  while (wanted()) {
    const run = await call('GET', `/api/runs/${id}`);
    if (!wanted()) return;
    show(run);
    if (isOver(run)) return;
    const now = `${run.state} ${run.attempts} ${run.progress.done}`;
    wait = now === before ? Math.min(wait * 1.5, LONGEST) : PAUSE;
    before = now;
    await pause(wait);
  }
}

function progress(element, { progress: { done, total } }) {
  if (total === null) element.removeAttribute('value');
  else [element.max, element.value] = [total || 1, total ? done : 1];
}

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  Object.assign(element, attributes);
  element.append(...children);
  return element;
}

function makeSvg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function row(words, members, most, kind) {
  const chart = makeSvg('svg', { viewBox: '0 0 100 8', preserveAspectRatio: 'none', 'aria-hidden': 'true' });
  chart.append(makeSvg('rect', { class: kind, height: 8, width: Math.max(0.5, (100 * members) / most) }));
  return make('tr', {},
    make('th', { scope: 'row' }, words), make('td', {}, chart), make('td', {}, count(members)));
}

// One group of decisions, those with members; null where no decision has any.
function group(title, kind, decisions, counted, most) {
  const found = Object.entries(decisions).filter(([name]) => counted[name]);
  return found.length ? make('tbody', {},
    make('tr', {}, make('th', { scope: 'rowgroup', colSpan: 3 }, title)),
    ...found.map(([name, words]) => row(words, counted[name], most, kind))) : null;
}

// What happens to the run, as a sentence.
function sentence(run) {
  const { audience, notified } = run.stats;
  const summary = `${count(notified)} of ${count(audience)} members were notified.`;
  if (run.state === 'succeeded') return summary;
  if (run.state === 'failed') return `Failed after ${attempts(run.attempts)}: ${run.reason}. ${summary}`;
  if (!run.next_attempt_at) return STATES[run.state];
  const wait = Math.round((new Date(run.next_attempt_at) - Date.now()) / 1_000);
  return `Attempt ${run.attempts} failed: ${run.reason}. Next attempt ${wait > 0 ? `in ${count(wait)} s` : 'soon'}.`;
}

const attempts = (number) => (number === 1 ? 'one attempt' : `${count(number)} attempts`);

function show(run) {
  const { decisions } = run.stats;
  const words = sentence(run);
  if (retry) retry.hidden = run.state !== 'failed';
  if (state.textContent !== words) state.textContent = words; // screen readers announce each change
  progress(bar, run);
  bar.hidden = run.state === 'succeeded';
  const most = Math.max(1, ...Object.values(decisions));
  clear();
  table.append(...[
    group('Notified, because they', 'notified', NOTIFIED, decisions, most),
    group('Not notified, because they', 'not-notified', NOT_NOTIFIED, decisions, most),
  ].filter(Boolean));
}

function clear() {
  for (const body of [...table.tBodies]) body.remove();
}

export async function openRun(item, button) {
  dialog.querySelector('.excerpt').textContent = excerpt(item);
  dialog.dataset.run = button.dataset.run;
  dialog.showModal();
  await showRun();
}

async function showRun() {
  const mine = ++shown;
  state.textContent = '…';
  clear();
  bar.removeAttribute('value');
  try {
    await follow(dialog.dataset.run, show, () => mine === shown && dialog.open);
  } catch (problem) {
    state.textContent = problem.message;
  }
}

retry?.addEventListener('click', async () => {
  try {
    await call('POST', `/api/runs/${dialog.dataset.run}/retry`);
    retry.hidden = true;
  } catch (problem) {
    state.textContent = problem.message;
    return;
  }
  await showRun();
});

// Show the progress beside a message that was just posted, and then how many members were notified.
const watched = [];

export async function watch(button) {
  const small = make('progress', { ariaLabel: 'Members processed' });
  button.closest('.by').append(small);
  watched.push(button);
  if (watched.length > WATCHED) watched.shift();
  await null; // of many messages that arrive at once, only the last ones are requested
  try {
    await follow(button.dataset.run, (run) => {
      progress(small, run);
      if (run.state === 'succeeded') small.replaceWith(make('span', {}, `${count(run.stats.notified)} notified`));
      else if (run.state === 'failed') small.replaceWith(make('span', { className: 'wrong' }, 'Not delivered'));
    }, () => button.isConnected && watched.includes(button));
  } catch { /* the button still opens the dialog */ }
  small.remove();
  if (watched.includes(button)) watched.splice(watched.indexOf(button), 1);
}
