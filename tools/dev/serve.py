"""`run`, `web` and `worker`: Belfry on this machine until somebody stops it; its data stays in `.belfry/`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tools.dev import ROOT, ports, say, signals, stack
from tools.dev.client import Client
from tools.dev.locks import exclusive
from tools.dev.paths import data_dir, sweep
from tools.dev.processes import Child
from tools.dev.servers import servers

MEMBERS = 50
STOPPING = "\nStopping …"


def run() -> int:
    """A web process and a worker, and what to try on them."""
    web_log, worker_log = data_dir() / "web.log", data_dir() / "worker.log"
    with ports.listen() as listening:
        address = ports.address_of(listening)
        with (
            prepared(address) as env,
            stack.worker(env, worker_log) as worker,
            stack.web(env, listening, web_log) as web,
        ):
            _guide(env, address)
            say(f"Logs           {_short(web_log)}  {_short(worker_log)}")
            say("Ctrl-C ends all of it; what you made stays.")
            _until_stopped(web, worker)
    return 0


def web() -> int:
    """The web process alone, its log on the terminal."""
    with ports.listen() as listening:
        address = ports.address_of(listening)
        with prepared(address) as env, stack.web(env, listening) as process:
            _guide(env, address)
            say("Nobody is notified before a worker runs: `make worker` in another terminal. Ctrl-C ends this one.")
            _until_stopped(process)
    return 0


def worker() -> int:
    """A worker alone, its log on the terminal. Any number of them may run."""
    with prepared() as env, stack.worker(env) as process:
        say("A worker is at work for the web process of `make web`. Ctrl-C ends it.")
        _until_stopped(process)
    return 0


@contextmanager
def prepared(address: str | None = None) -> Iterator[dict[str, str]]:
    """While the block runs, the servers do; yields the environment for Belfry, with its schema up to date.

    A database without people gets an administrator and a small community; one that has some is left alone.
    """
    sweep()
    with servers(data_dir()) as urls:
        env = stack.environment(urls, address)
        with exclusive(data_dir() / "setup.lock", pause=signals.sleep):  # two at once make one community
            stack.migrate(env)
            if stack.nobody_is_there(env["DATABASE_URL"]):
                say(f"Making a community of {MEMBERS} …")
                stack.make_community(env, MEMBERS)
        yield env


def _until_stopped(*children: Child) -> None:
    """Wait for Ctrl-C or SIGTERM. Raises CommandError when one of the children ends by itself."""
    try:
        while True:
            for child in children:
                child.check()
            signals.sleep(0.5)
    except signals.Stopped:
        say(STOPPING)


def _guide(env: dict[str, str], address: str) -> None:
    """Print where Belfry is, and commands to paste. They work as they stand on what `prepared` made."""
    admin, member = stack.new_token(env, "admin"), stack.new_token(env, "member-1")
    say(f"\nBelfry serves  {address}")
    if admin is None or member is None:
        say("This database has people of its own. To sign in there, a token for one of them:")
        say(f"    .venv/bin/python -m tools.dev flask create-token NAME --days {stack.TOKEN_DAYS}\n")
        return
    say(f"Admin's token  {admin}")
    say(f"Member's       {member}")
    say(f"               (both expire in {stack.TOKEN_DAYS} days; the next start prints new ones)")
    say(f"""
To see it at work, in the browser:
    1. Open {address} and sign in with the admin's token; then once more in a private window, with the
       member's (who is member-1), and put the two side by side.
    2. As the admin write something in #general. The member's window shows it, and the bell counts it.
    3. As the member mute #general: the button left of the bell, "All messages". As the admin write again: within
       seconds the message is there, and the bell is silent.
    4. "Why?" at that message notifies the member why they were not notified, and "Recipients" the admin, of everybody.
The queues are at {address}/rq (for the admin), the API's documentation at {address}/docs.""")
    channels = Client(address, admin).get("/api/channels")["items"]
    person = Client(address, member).get("/api/me")["id"]
    if not channels:
        return
    message_id, run_id = _next_ids(env["DATABASE_URL"])
    body = f'{{"channel_id": {channels[0]["id"]}, "content": "gold breaks out, @member-1"}}'
    say(f"""
Or without a browser; to paste into another terminal, first:

    BELFRY={address}
    ADMIN="Authorization: Bearer {admin}"
    MEMBER="Authorization: Bearer {member}"

A message to a whole channel, and to one of its members by name:
    curl -H "$ADMIN" -H 'Content-Type: application/json' -d '{body}' $BELFRY/api/messages

Its fan-out, by the run's id in the answer above: who was notified, and who was not, for which reason:
    curl -H "$ADMIN" $BELFRY/api/runs/{run_id}

What the member finds:
    curl -H "$MEMBER" "$BELFRY/api/notifications?unread=1"

Why that member was notified, by the message's id:
    curl -H "$ADMIN" "$BELFRY/api/messages/{message_id}/explain?user_id={person}"

A test of the whole path, to oneself; then the same as a command, as all others can be given:
    curl -X POST -H "$ADMIN" $BELFRY/api/test-notifications
    .venv/bin/python -m tools.dev flask send-test-notification --sender admin --wait
""")


def _next_ids(database_url: str) -> tuple[int, int]:
    """The ids that the next message and the next run will have, if nobody else writes."""
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        row = connection.execute(
            "SELECT (SELECT coalesce(max(id), 0) + 1 FROM message), (SELECT coalesce(max(id), 0) + 1 FROM run)"
        ).fetchone()
    return (int(row[0]), int(row[1])) if row else (1, 1)


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))
