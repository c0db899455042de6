// Keyboard shortcuts of every page, and the dialog that lists them.

const dialog = document.getElementById('shortcuts');
const open = (id) => document.getElementById(id)?.click();
const ACTIONS = {
  '?': () => dialog.showModal(),
  '/': () => open('search'),
  i: () => open('bell'),
  m: () => document.getElementById('content')?.focus(),
  n: () => document.getElementById('to-newest')?.click(),
};

document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
  if (event.target.matches('input, textarea, select') || !ACTIONS[event.key]) return;
  event.preventDefault();
  ACTIONS[event.key]();
});
document.getElementById('show-shortcuts').addEventListener('click', () => dialog.showModal());
dialog.addEventListener('click', ({ target }) => target === dialog && dialog.close()); // the backdrop
