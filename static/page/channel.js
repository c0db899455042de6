// A channel's page: connects its parts.

import * as changes from './changes.js';
import * as compose from './compose.js';
import { isDelayed, live, start as startLive } from './live.js';
import * as readTracking from './read_tracking.js';
import { isOver, openRun, watch } from './run_dialog.js';
import * as preference from './preference_dialog.js';
import * as timeline from './timeline.js';
import { showToastFor } from './toast.js';
import './shortcuts.js';
import './unread.js';
import * as explanation from './explain_dialog.js';

const FETCH_INTERVAL = 60_000; // milliseconds; new messages are normally announced by the stream
const me = document.body.dataset.user;
const list = document.getElementById('messages');

timeline.start();
timeline.jump();
timeline.goToUnread();
readTracking.start();
compose.start();
preference.start();
explanation.start();
changes.start();

window.addEventListener('hashchange', timeline.jump);
list.addEventListener('click', ({ target }) => {
  const button = target.closest('button');
  const item = target.closest('li.message');
  if (button?.classList.contains('why')) explanation.open(item);
  else if (button?.classList.contains('run')) openRun(item, button);
  else if (button?.classList.contains('edit')) changes.edit(item);
  else if (button?.classList.contains('delete')) changes.askToDelete(item);
});
for (const dialog of document.querySelectorAll('dialog')) {
  dialog.addEventListener('click', ({ target }) => target === dialog && dialog.close()); // the backdrop
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
const quietly = (promise) => promise?.catch?.(() => {}); // the connection's state is shown
live.addEventListener('notification', ({ detail }) => {
  if (detail.channel.id === timeline.channelId) quietly(timeline.fetchMessage(detail.message_id));
});
live.addEventListener('messages', ({ detail }) => quietly(timeline.updateMessages(detail.ids)));
live.addEventListener('tick', () => visible() && quietly(timeline.fetchNewer()));
live.addEventListener('ping', () => {
  if (!visible()) return;
  if (timeline.hasPending()) quietly(timeline.refresh());
  else if (isDelayed()) quietly(timeline.fetchNewer()); // messages are announced by the workers
});
live.addEventListener('reset', () => quietly(timeline.refresh()));
(function fetchPeriodically() {
  setTimeout(() => {
    if (visible()) quietly(timeline.fetchNewer());
    fetchPeriodically();
  }, FETCH_INTERVAL * (1 + Math.random()));
})();
showToastFor((notification) => notification.channel.id === timeline.channelId && timeline.reachesNewest());
startLive();
