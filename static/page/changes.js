// Edit and delete messages in place.

import { call } from './api.js';
import { count, excerpt } from './format.js';
import { updateMessages } from './timeline.js';

const list = document.getElementById('messages');
const dialog = document.getElementById('delete');
const confirm = document.getElementById('delete-confirm');
const status = document.getElementById('delete-status');
const me = document.body.dataset.user;
let deleting; // the message in the dialog

export async function edit(item) {
  if (item.querySelector('form')) return;
  let message;
  try {
    message = await call('GET', `/api/messages/${item.dataset.id}`);
  } catch {
    return updateMessages([item.dataset.id]); // it was deleted
  }
  const content = item.querySelector('.content');
  const form = document.createElement('form');
  const field = document.createElement('textarea');
  const problem = document.createElement('p');
  const save = document.createElement('button');
  const cancel = document.createElement('button');
  field.ariaLabel = 'Edited message';
  field.value = message.content;
  field.rows = Math.min(8, message.content.split('\n').length);
  problem.setAttribute('role', 'status');
  save.textContent = 'Save';
  cancel.textContent = 'Cancel';
  cancel.type = 'button';
  form.className = 'edit-form row';
  form.append(field, save, cancel, problem);
  content.hidden = true;
  content.after(form);
  field.focus();

  function close() {
    form.remove();
    item.querySelector('.content').hidden = false;
    item.querySelector('button.edit')?.focus();
  }
  cancel.addEventListener('click', close);
  form.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') close();
    else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing && event.target === field) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    save.disabled = true;
    try {
      if (field.value !== message.content) {
        await call('PATCH', `/api/messages/${message.id}`, { content: field.value });
        await updateMessages([message.id]).catch(() => {}); // it is saved; the next update shows it
      }
      close();
    } catch (error) {
      problem.textContent = error.message;
      save.disabled = false;
    }
  });
}

export function editLast() {
  const own = [...list.children].findLast((item) => item.dataset.author === me && item.querySelector('button.edit'));
  if (own) edit(own);
  return Boolean(own);
}

export function askToDelete(item) {
  deleting = item;
  dialog.querySelector('.excerpt').textContent = excerpt(item);
  dialog.querySelector('h2').textContent = 'Delete this message?';
  status.textContent = '';
  confirm.hidden = false;
  dialog.querySelector('.row form button').textContent = 'Cancel';
  dialog.showModal();
}

const said = ({ retracted, read }) =>
  retracted === null ? 'Its notifications are not shown any more.'
    : `${count(retracted)} unread ${retracted === 1 ? 'notification was' : 'notifications were'} retracted; ${count(read)} had been read.`;

async function deleteIt() {
  confirm.disabled = true;
  try {
    const answer = await call('DELETE', `/api/messages/${deleting.dataset.id}`);
    dialog.querySelector('h2').textContent = 'Deleted';
    status.textContent = said(answer);
    confirm.hidden = true;
    dialog.querySelector('.row form button').textContent = 'Close';
    dialog.querySelector('.row form button').focus();
    await updateMessages([deleting.dataset.id]);
  } catch (problem) {
    if (!confirm.hidden) status.textContent = problem.message;
  } finally {
    confirm.disabled = false;
  }
}

export function start() {
  confirm.addEventListener('click', deleteIt);
}
