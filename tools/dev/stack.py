"""Run Belfry's commands, web process and workers."""

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tools.dev import CommandError, ports, signals
from tools.dev.client import not_ready
from tools.dev.paths import secret_key
from tools.dev.processes import Child, output_of, running

FLASK = ("-m", "flask", "--app", "app")
GUNICORN_OPTIONS = ("--graceful-timeout=10", "--log-level=warning")  # a live stream ends only with its client
READY_SECONDS = 60
TOKEN_DAYS = 7  # until a token expires that `make run` prints


def environment(urls: Mapping[str, str], address: str | None = None) -> dict[str, str]:
    """Return the environment of Belfry's processes: the caller's, the URLs of the servers, and development defaults.

    Variables that the caller has set are not changed. `address` is the URL of the web process, if there is one.
    """
    defaults = {
        "SECRET_KEY": secret_key(),
        "SESSION_COOKIE_SECURE": "0",  # browsers get http:// here
    }
    if address is not None:
        defaults["PUBLIC_URL"] = address
    unset = {name: value for name, value in defaults.items() if not os.environ.get(name, "").strip()}
    return {**os.environ, **unset, **urls}


def migrate(env: Mapping[str, str]) -> None:
    """Bring the schema up to date."""
    output_of((*FLASK, "migrate"), env)


def has_no_users(database_url: str) -> bool:
    """Whether the migrated database has no users, except an `admin` from an interrupted start."""
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        row = connection.execute(
            "SELECT NOT EXISTS (SELECT FROM user_account WHERE username <> 'admin')"
        ).fetchone()
    return bool(row and row[0])


def create_admin_and_server(env: Mapping[str, str], members: int) -> tuple[str, dict[str, Any]]:
    """Create an administrator `admin` and a server of that many members; returns the token and what `seed` printed."""
    token = new_token(env, "admin")
    if token is None:
        created = _json((*FLASK, "create-user", "admin", "--admin", "--token", "--json"), env)
        token = str(created["token"])
    seed = (*FLASK, "seed", "--members", str(members), "--channels", "3", "--json")
    return token, _json(seed, env, seconds=300, show_errors=sys.stderr.isatty())


def new_token(env: Mapping[str, str], username: str) -> str | None:
    """Create a token that expires after TOKEN_DAYS; returns None where there is no such user."""
    with psycopg.connect(env["DATABASE_URL"], connect_timeout=10) as connection:
        if not connection.execute("SELECT FROM user_account WHERE username = %s", (username,)).rowcount:
            return None
    made = _json((*FLASK, "create-token", username, f"--days={TOKEN_DAYS}", "--json"), env)
    return str(made["token"])


def revoke_tokens(env: Mapping[str, str], tokens: Sequence[str]) -> None:
    """Revoke tokens that `new_token` created."""
    hashes = [hashlib.sha256(token.encode()).digest() for token in tokens]
    with psycopg.connect(env["DATABASE_URL"], connect_timeout=10) as connection:
        connection.execute("UPDATE api_token SET revoked_at = now() WHERE token_hash = ANY(%s)", (hashes,))


def login_link(env: Mapping[str, str], username: str) -> str:
    """Create a link that signs a user in once."""
    return str(_json((*FLASK, "login-link", username, "--json"), env)["link"])


def _json(
    arguments: tuple[str, ...], env: Mapping[str, str], *, seconds: float = 120, show_errors: bool = False
) -> dict[str, Any]:
    text = output_of(arguments, env, seconds=seconds, show_errors=show_errors)
    try:
        return dict(json.loads(text))
    except ValueError:
        raise CommandError(f"`{' '.join(arguments)}` printed no JSON:\n{text[:2_000]}") from None


@contextmanager
def web_process(
    env: Mapping[str, str],
    listening: socket.socket,
    log: Path | None = None,
    *,
    app: str = "app:create_app()",
    through: Sequence[str] = (),
    options: Sequence[str] = GUNICORN_OPTIONS,
) -> Iterator[Child]:
    """Run a web process as gunicorn.conf.py configures it; it may not be ready when the block begins.

    `through` is a module, with its arguments, that runs gunicorn instead of Python.
    """
    descriptor = listening.fileno()
    arguments = ("-m", *through, "gunicorn", f"--bind=fd://{descriptor}", *options, app)
    with running("web process", arguments, env, log=log, pass_fds=(descriptor,)) as child:
        yield child


@contextmanager
def web(
    env: Mapping[str, str], listening: socket.socket, log: Path | None = None, app: str = "app:create_app()"
) -> Iterator[Child]:
    """Run a web process, which is ready when the block begins."""
    with web_process(env, listening, log, app=app) as child:
        wait_until_ready(ports.address_of(listening), child.check)
        yield child


def wait_until_ready(address: str, check: Callable[[], object]) -> None:
    """Wait until /readyz answers 200, and call `check` between two attempts. Raises CommandError after a minute."""
    deadline = time.monotonic() + READY_SECONDS
    while (answer := not_ready(address)) is not None:
        check()
        if time.monotonic() > deadline:
            raise CommandError(f"The web process was not ready after {READY_SECONDS} seconds: {answer}")
        signals.sleep(0.1)


@contextmanager
def worker(env: Mapping[str, str], log: Path | None = None, *, through: Sequence[str] = ()) -> Iterator[Child]:
    """Run a worker, as in production. `through` as for `web_process`."""
    with running("worker", ("-m", *through, *FLASK[1:], "worker"), env, log=log) as child:
        yield child
