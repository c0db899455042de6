// Show a new notification for a moment, unless its message is in view.

import { live } from './live.js';

const STAYS = 12_000;
const toast = document.getElementById('toast');
let timer;

// `isShown(notification)`: whether its message is in view.
export function showToastFor(isShown) {
  live.addEventListener('notification', ({ detail: notification }) => {
    if (isShown(notification)) return;
    const link = document.createElement('a');
    link.href = notification.url;
    link.className = notification.type;
    const title = document.createElement('small');
    title.textContent = notification.title;
    const body = document.createElement('span');
    body.textContent = notification.body;
    link.append(body, ' ', title);
    const close = document.createElement('button');
    close.type = 'button';
    close.textContent = 'Dismiss';
    close.addEventListener('click', clear);
    toast.replaceChildren(link, close);
    clearTimeout(timer);
    timer = setTimeout(hide, STAYS);
  });
  document.addEventListener('keydown', (event) => event.key === 'Escape' && clear());
}

function hide() {
  if (toast.matches(':hover, :focus-within')) timer = setTimeout(hide, STAYS);
  else clear();
}

function clear() {
  toast.replaceChildren();
}
