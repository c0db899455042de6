"""Belfry as the development commands run it: its commands, its web process, its worker."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tools.dev import CommandError, ports, signals
from tools.dev.client import not_ready
from tools.dev.paths import secret_key, temporary_data_dir
from tools.dev.processes import Child, output_of, running
from tools.dev.scratch_databases import private
from tools.dev.servers import servers

FLASK = ("-m", "flask", "--app", "app")
READY_SECONDS = 60
TOKEN_DAYS = 7  # until a token expires that `make run` prints


def environment(urls: Mapping[str, str], address: str | None = None) -> dict[str, str]:
    """What Belfry's processes get: the caller's environment, the servers' URLs, and development's defaults.

    What the caller has set is left as it is. `address` is where the web process listens, if there is one.
    """
    defaults = {
        "SECRET_KEY": secret_key(),
        "SESSION_COOKIE_SECURE": "0",  # browsers get http:// here
    }
    if address is not None:
        defaults["PUBLIC_URL"] = address
    unset = {name: value for name, value in defaults.items() if not os.environ.get(name, "").strip()}
    return {**os.environ, **unset, **urls}


@contextmanager
def of_its_own(purpose: str) -> Iterator[tuple[socket.socket, Path, dict[str, str]]]:
    """Where a web process can listen, a directory, and the environment of an empty database, up to date, and a Redis.

    All of it is nobody else's, and gone when the block ends.
    """
    with ExitStack() as stage:
        listening = stage.enter_context(ports.listen())
        data_dir = stage.enter_context(temporary_data_dir())
        urls = stage.enter_context(private(stage.enter_context(servers(data_dir)), purpose))
        env = environment(urls, ports.address_of(listening))
        migrate(env)
        yield listening, data_dir, env


def migrate(env: Mapping[str, str]) -> None:
    """Bring the schema up to date."""
    output_of((*FLASK, "migrate"), env)


def nobody_is_there(database_url: str) -> bool:
    """Whether the migrated database has no people yet, an `admin` from an interrupted start excepted."""
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        row = connection.execute(
            "SELECT NOT EXISTS (SELECT FROM user_account WHERE username <> 'admin')"
        ).fetchone()
    return bool(row and row[0])


def make_community(env: Mapping[str, str], members: int) -> tuple[str, dict[str, Any]]:
    """An administrator `admin` and a community of that many; the admin's token, and what `seed` printed."""
    token = new_token(env, "admin")
    if token is None:
        created = _json((*FLASK, "create-user", "admin", "--admin", "--token", "--json"), env)
        token = str(created["token"])
    seed = (*FLASK, "seed", "--members", str(members), "--channels", "3", "--json")
    return token, _json(seed, env, seconds=300, show_errors=sys.stderr.isatty())


def new_token(env: Mapping[str, str], username: str) -> str | None:
    """A new token that expires after TOKEN_DAYS; None where there is nobody of that name."""
    with psycopg.connect(env["DATABASE_URL"], connect_timeout=10) as connection:
        if not connection.execute("SELECT FROM user_account WHERE username = %s", (username,)).rowcount:
            return None
    made = _json((*FLASK, "create-token", username, f"--days={TOKEN_DAYS}", "--json"), env)
    return str(made["token"])


def _json(
    arguments: tuple[str, ...], env: Mapping[str, str], *, seconds: float = 120, show_errors: bool = False
) -> dict[str, Any]:
    text = output_of(arguments, env, seconds=seconds, show_errors=show_errors)
    try:
        return dict(json.loads(text))
    except ValueError:
        raise CommandError(f"`{' '.join(arguments)}` printed no JSON:\n{text[:2_000]}") from None


@contextmanager
def web(
    env: Mapping[str, str], listening: socket.socket, log: Path | None = None, app: str = "app:create_app()"
) -> Iterator[Child]:
    """A web process as gunicorn.conf.py has it, ready to answer when the block begins."""
    descriptor = listening.fileno()
    options = {
        "bind": f"fd://{descriptor}",
        "graceful-timeout": "10",  # live streams have no end of their own
        "log-level": "warning",
    }
    arguments = ["-m", "gunicorn", *(f"--{name}={value}" for name, value in options.items())]
    arguments.append(app)
    with running("web process", arguments, env, log=log, pass_fds=(descriptor,)) as child:
        deadline = time.monotonic() + READY_SECONDS
        while (answer := not_ready(ports.address_of(listening))) is not None:
            child.check()
            if time.monotonic() > deadline:
                raise CommandError(f"The web process was not ready after {READY_SECONDS} seconds: {answer}")
            signals.sleep(0.1)
        yield child


@contextmanager
def worker(env: Mapping[str, str], log: Path | None = None) -> Iterator[Child]:
    """A worker like production's."""
    with running("worker", (*FLASK, "worker"), env, log=log) as child:
        yield child
