"""`run`, `web` and `worker`: run Belfry until Ctrl-C; its data stays in `.belfry/`."""

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
    """Run a web process and a worker, and print commands to try."""
    web_log, worker_log = data_dir() / "web.log", data_dir() / "worker.log"
    with ports.listen() as listening:
        address = ports.address_of(listening)
        with (
            prepared(address) as env,
            stack.worker(env, worker_log) as worker,
            stack.web(env, listening, web_log) as web,
        ):
            tokens = _guide(env, address)
            say(f"Logs           {_short(web_log)}  {_short(worker_log)}")
            say("Ctrl-C stops everything; the data stays.")
            try:
                _until_stopped(web, worker)
            finally:
                stack.revoke_tokens(env, tokens)
    return 0


def web() -> int:
    """Run the web process alone, with its log on the terminal."""
    with ports.listen() as listening:
        address = ports.address_of(listening)
        with prepared(address) as env, stack.web(env, listening) as process:
            tokens = _guide(env, address)
            say("No user is notified until a worker runs (`make worker`, in another terminal). Ctrl-C stops this one.")
            try:
                _until_stopped(process)
            finally:
                stack.revoke_tokens(env, tokens)
    return 0


def worker() -> int:
    """Run a worker alone, with its log on the terminal. Any number of them may run."""
    with prepared() as env, stack.worker(env) as process:
        say("The worker processes the messages of `make web`. Ctrl-C stops it.")
        _until_stopped(process)
    return 0


@contextmanager
def prepared(address: str | None = None) -> Iterator[dict[str, str]]:
    """Run the servers and migrate the database; yields the environment for Belfry.

    A database without users gets an administrator and a small server.
    """
    sweep()
    with servers(data_dir()) as urls:
        env = stack.environment(urls, address)
        with exclusive(data_dir() / "setup.lock", pause=signals.sleep):  # two commands at once create one server
            stack.migrate(env)
            if stack.has_no_users(env["DATABASE_URL"]):
                say(f"Creating a server of {MEMBERS} members …")
                stack.create_admin_and_server(env, MEMBERS)
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


def _guide(env: dict[str, str], address: str) -> list[str]:
    """Print the address, and commands to paste, which work unchanged on the data that `prepared` created.

    Returns the tokens in the commands, which are to be revoked in the end.
    """
    admin, member = stack.new_token(env, "admin"), stack.new_token(env, "member-1")
    say(f"\nBelfry serves  {address}")
    if admin is None or member is None:
        say("This database has other users. Create a token for one of them to sign in:")
        say(f"    .venv/bin/python -m tools.dev flask create-token NAME --days {stack.TOKEN_DAYS}\n")
        return []
    say(f"Admin          {stack.login_link(env, 'admin')}")
    say(f"Member         {stack.login_link(env, 'member-1')}")
    say("               (each link works once, within ten minutes; for another: make flask ARGS=\"login-link admin\")")
    say(f"""
In the browser:
    1. Open the admin's link; then the member's (member-1) in a private window, and put the windows side by side.
    2. As the admin write something in #general. The member's window shows it, and the bell shows the count.
    3. As the member mute #general: the button left of the bell, "All messages". As the admin write again: the
       message appears, and the count does not change.
    4. "Why?" at that message shows the member why they were not notified; "Recipients" shows the admin all decisions.
The queues are at {address}/rq (for the admin), the API documentation at {address}/docs.""")
    channels = Client(address, admin).get("/api/channels")["items"]
    user_id = Client(address, member).get("/api/me")["id"]
    if not channels:
        return [admin, member]
    message_id, run_id = _next_ids(env["DATABASE_URL"])
    body = f'{{"channel_id": {channels[0]["id"]}, "content": "gold breaks out, @member-1"}}'
    say(f"""
Without a browser, paste into another terminal:

    BELFRY={address}
    ADMIN="Authorization: Bearer {admin}"
    MEMBER="Authorization: Bearer {member}"

A message to a whole channel, and to one of its members by name:
    curl -H "$ADMIN" -H 'Content-Type: application/json' -d '{body}' $BELFRY/api/messages

Its fan-out, by the id of the run in the response above, with the number of members for each decision:
    curl -H "$ADMIN" $BELFRY/api/runs/{run_id}

The inbox of the member:
    curl -H "$MEMBER" "$BELFRY/api/notifications?unread=1"

Why the member was notified, by the id of the message:
    curl -H "$ADMIN" "$BELFRY/api/messages/{message_id}/explain?user_id={user_id}"

A test notification to yourself; then the same as a command:
    curl -X POST -H "$ADMIN" $BELFRY/api/test-notifications
    make flask ARGS="send-test-notification --sender admin --wait"

The tokens are revoked when this command stops.
""")
    return [admin, member]


def _next_ids(database_url: str) -> tuple[int, int]:
    """Return the ids of the next message and the next run, if no other user writes."""
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        row = connection.execute(
            "SELECT (SELECT coalesce(max(id), 0) + 1 FROM message), (SELECT coalesce(max(id), 0) + 1 FROM run)"
        ).fetchone()
    return (int(row[0]), int(row[1])) if row else (1, 1)


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))
