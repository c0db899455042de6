// What has just come in, for a moment, where it is not in view anyway.

import { live } from './live.js';

const STAYS = 12_000;
const toast = document.getElementById('toast');
let going;

// `here()`: whether the reader sees the notification's message already.
export function tellOfNew(here) {
  live.addEventListener('notification', ({ detail: notification }) => {
    if (here(notification)) return;
    const link = document.createElement('a');
    link.href = notification.url;
    link.className = notification.type;
    const title = document.createElement('strong');
    title.textContent = notification.title;
    const body = document.createElement('span');
    body.textContent = notification.body;
    link.append(title, ' ', body);
    const close = document.createElement('button');
    close.type = 'button';
    close.textContent = 'Dismiss';
    close.addEventListener('click', clear);
    toast.replaceChildren(link, close);
    clearTimeout(going);
    going = setTimeout(leave, STAYS);
  });
  document.addEventListener('keydown', (event) => event.key === 'Escape' && clear());
}

function leave() {
  if (toast.matches(':hover, :focus-within')) going = setTimeout(leave, STAYS);
  else clear();
}

function clear() {
  toast.replaceChildren();
}
