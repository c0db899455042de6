// Complete names while the user types: a list of options above or below a text field.

import { call } from './api.js';
import { channelId } from './timeline.js';

const PAUSE = 120;

// The members, roles and @everyone that may be mentioned in the channel, by a prefix.
export async function findSuggestions(prefix, signal) {
  const address = `/api/channels/${channelId}/mention-suggestions?limit=8&q=${encodeURIComponent(prefix)}`;
  return (await call('GET', address, undefined, { signal })).items;
}

// `getPrefix()`: the text to complete, or null. `find(prefix, signal)`: the options, each {username, name}.
// `choose(option)`: one was chosen. The list is an ARIA listbox; the field keeps the focus. `close()` of the returned
// object closes the list and cancels a request for it.
export function complete({ field, list, getPrefix, find, choose }) {
  const status = document.getElementById(`${list.id}-status`);
  let options = [];
  let active = -1;
  let requested = null;
  let waiting;
  let request = new AbortController();

  function close() {
    clearTimeout(waiting);
    request.abort();
    requested = null;
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
      item.addEventListener('click', () => select(index));
      return item;
    }));
    list.hidden = false;
    if (field.getAttribute('role') === 'combobox') field.ariaExpanded = 'true';
    status.textContent = options.length === 1 ? 'One suggestion.' : `${options.length} suggestions: choose by arrow keys.`;
    activate(0);
  }

  function select(index) {
    const option = options[index];
    close();
    choose(option);
    field.focus();
  }

  function update() {
    const prefix = getPrefix();
    if (prefix === null) return close();
    if (prefix === requested) return;
    clearTimeout(waiting);
    request.abort();
    request = new AbortController();
    requested = prefix;
    const { signal } = request;
    waiting = setTimeout(async () => {
      const found = await find(prefix, signal).catch(() => []);
      if (!signal.aborted) show(found);
    }, PAUSE);
  }

  field.addEventListener('input', update);
  field.addEventListener('click', update);
  field.addEventListener('keyup', ({ key }) => ['ArrowLeft', 'ArrowRight', 'Home', 'End'].includes(key) && update());
  field.addEventListener('blur', close);
  field.addEventListener('keydown', (event) => {
    if (list.hidden || event.isComposing) return;
    const act = {
      ArrowDown: () => activate(active + 1),
      ArrowUp: () => activate(active - 1),
      Enter: () => select(active),
      Tab: () => select(active),
      Escape: close,
    }[event.key];
    if (!act || event.shiftKey) return;
    event.preventDefault();
    event.stopImmediatePropagation(); // Enter must not send here, nor Escape close the dialog
    act();
  });
  return { close };
}
