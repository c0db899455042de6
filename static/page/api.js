// Requests to the server: JSON of the API, and parts of its pages.

const csrf = document.querySelector('meta[name="csrf"]').content;

export class Problem extends Error {
  // `status` 0: there was no answer. The message is a sentence for the user.
  constructor(status, { detail, errors } = {}) {
    const why = errors && Object.values(errors).flat().join(' ');
    super(why || detail || 'Belfry cannot be reached. Check your connection.');
    this.status = status;
  }
}

export async function call(method, address, body, { headers = {}, signal } = {}) {
  const options = { method, headers: { ...headers }, cache: 'no-store', signal };
  if (method !== 'GET') options.headers['X-CSRF-Token'] = csrf;
  if (body !== undefined) {
    options.headers['Content-Type'] = 'application/json';
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Problem(0);
  }
  if (answer.status === 204) return null;
  const given = await answer.json().catch(() => ({}));
  if (answer.status === 403 && given.detail?.includes('CSRF')) given.detail = 'You have signed in again. Reload this page.';
  if (!answer.ok) throw new Problem(answer.status, { detail: `The answer was ${answer.status}.`, ...given });
  return given;
}

// A function that runs `work` once at a time. Calls during a run cause one more run, which starts at least `gap`
// milliseconds after the start of the last one.
export function coalesce(work, gap) {
  let going = null;
  let again = false;
  let next = 0;
  const turn = async () => {
    try {
      while (again) {
        if (performance.now() < next) await new Promise((resolve) => { setTimeout(resolve, next - performance.now()); });
        again = false;
        next = performance.now() + gap;
        await work();
      }
    } finally {
      going = null;
      again = false;
    }
  };
  return () => {
    again = true;
    return (going ??= turn());
  };
}

// A part of a page, as a document in which nothing runs. The browser parses it from the answer itself, so that no
// script here ever makes HTML of a text: the policy's Trusted Types forbid that altogether.
export function part(address) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open('GET', address);
    request.responseType = 'document';
    request.onload = () =>
      request.status === 200 && request.response
        ? resolve(request.response)
        : reject(new Problem(request.status, { detail: `The answer was ${request.status}.` }));
    request.onerror = () => reject(new Problem(0));
    request.send();
  });
}
