// Completing a member's name while somebody types: a list of options above or below a text field.

import { call } from './api.js';
import { channelId } from './timeline.js';

const PAUSE = 120;

// Whom one may mention in the channel, by the beginning of a username.
export async function findMentionable(prefix) {
  return (await call('GET', `/api/channels/${channelId}/mention-suggestions?limit=8&q=${encodeURIComponent(prefix)}`)).items;
}

// `wanted()`: what is to be completed, or null. `find(prefix)`: the options, each {username, name}.
// `choose(option)`: one was taken. The list is an ARIA listbox; the field keeps the focus.
export function complete({ field, list, wanted, find, choose }) {
  const status = document.getElementById(`${list.id}-status`);
  let options = [];
  let active = -1;
  let asked = null;
  let waiting;

  function close() {
    clearTimeout(waiting);
    asked = null;
    options = [];
    list.hidden = true;
    list.replaceChildren();
    status.textContent = '';
    field.removeAttribute('aria-activedescendant');
    if (field.getAttribute('role') === 'combobox') field.ariaExpanded = 'false';
  }

  function activate(index) {
    active = (index + options.length) % options.length;
    [...list.children].forEach((item, at) => { item.ariaSelected = String(at === active); });
    field.setAttribute('aria-activedescendant', list.children[active].id);
    list.children[active].scrollIntoView({ block: 'nearest' });
  }

  function show(found) {
    options = found;
    if (!options.length) return close();
    list.replaceChildren(...options.map((option, index) => {
      const item = document.createElement('li');
      item.id = `${list.id}-${index}`;
      item.role = 'option';
      const username = document.createElement('strong');
      username.textContent = `@${option.username}`;
      const name = document.createElement('span');
      name.textContent = option.name;
      item.append(username, ' ', name);
      item.addEventListener('pointerdown', (event) => event.preventDefault()); // the field keeps the focus
      item.addEventListener('click', () => take(index));
      return item;
    }));
    list.hidden = false;
    if (field.getAttribute('role') === 'combobox') field.ariaExpanded = 'true';
    status.textContent = options.length === 1 ? 'One suggestion.' : `${options.length} suggestions: choose by arrow keys.`;
    activate(0);
  }

  function take(index) {
    const option = options[index];
    close();
    choose(option);
    field.focus();
  }

  function look() {
    const prefix = wanted();
    if (prefix === null) return close();
    if (prefix === asked) return;
    clearTimeout(waiting);
    asked = prefix;
    waiting = setTimeout(async () => {
      const found = await find(prefix).catch(() => []);
      if (asked === prefix) show(found);
    }, PAUSE);
  }

  field.addEventListener('input', look);
  field.addEventListener('click', look);
  field.addEventListener('blur', close);
  field.addEventListener('keydown', (event) => {
    if (list.hidden || event.isComposing) return;
    const act = {
      ArrowDown: () => activate(active + 1),
      ArrowUp: () => activate(active - 1),
      Enter: () => take(active),
      Tab: () => take(active),
      Escape: close,
    }[event.key];
    if (!act || event.shiftKey) return;
    event.preventDefault();
    event.stopImmediatePropagation(); // Enter here does not send, nor Escape close what is around
    act();
  });
}
