// A channel's page: what its parts have to do with each other.

import * as compose from './compose.js';
import { live, start as startLive } from './live.js';
import * as reading from './reading.js';
import { isOver, openRun, watch } from './run.js';
import * as setting from './setting.js';
import * as timeline from './timeline.js';
import { tellOfNew } from './toast.js';
import './unread.js';
import * as why from './why.js';

// Milliseconds between two fetches of a channel without notifications for the reader, and of other channels, for
// messages that notify nobody, such as one's own.
const QUIET = 15_000;
const ANYWAY = 60_000;
const me = document.body.dataset.user;
const list = document.getElementById('messages');

timeline.start();
timeline.jump();
reading.start();
compose.start();
setting.start();
why.start();

window.addEventListener('hashchange', timeline.jump);
list.addEventListener('click', ({ target }) => {
  const button = target.closest('button');
  const item = target.closest('li.message');
  if (button?.classList.contains('why')) why.why(item);
  else if (button?.classList.contains('run')) openRun(item, button);
});
for (const dialog of document.querySelectorAll('dialog')) {
  dialog.addEventListener('click', ({ target }) => target === dialog && dialog.close()); // beside it
}

// The progress of the author's own messages: of new ones, and of those whose run is not finished.
function watchRuns(items, isNew) {
  for (const item of items) {
    const button = item.querySelector('button.run');
    if (button && item.dataset.author === me && (isNew || !isOver(button.dataset))) watch(button);
  }
}
watchRuns(list.children, false);
timeline.timeline.addEventListener('added', ({ detail }) => watchRuns(detail.items, detail.isNew));

const visible = () => document.visibilityState === 'visible';
const quietly = (promise) => promise?.catch?.(() => {}); // the connection's state says what is wrong
live.addEventListener('notification', ({ detail }) => {
  if (detail.channel.id === timeline.channelId) quietly(timeline.lookFor(detail.message_id));
});
live.addEventListener('tick', () => visible() && quietly(timeline.lookForNew()));
live.addEventListener('ping', () => visible() && timeline.isBehind() && quietly(timeline.lookAnew()));
live.addEventListener('reset', () => quietly(timeline.lookAnew()));
let looked = performance.now();
(function lookNowAndThen() {
  const wait = setting.isQuiet() ? QUIET : ANYWAY;
  if (visible() && performance.now() - looked >= wait) {
    looked = performance.now();
    quietly(timeline.lookForNew());
  }
  setTimeout(lookNowAndThen, QUIET * (1 + Math.random()));
})();
tellOfNew((notification) => notification.channel.id === timeline.channelId && timeline.reachesNewest());
startLive();
