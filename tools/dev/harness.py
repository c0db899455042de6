"""A complete Belfry for one command: servers, an empty database, a web process and workers, all removed at the end.

The demo, the screenshots, the benchmarks, the drills and the chaos run use it.
"""

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import psycopg
import redis

from tools.dev import CommandError, ports, postgres, say, signals, stack, valkey
from tools.dev.client import Client
from tools.dev.paths import temporary_data_dir
from tools.dev.processes import Child
from tools.dev.scratch_databases import private
from tools.dev.servers import named, servers

TIMEOUT_SECONDS = 120.0  # without any progress
UNDER_LOAD = {
    "RATE_LIMIT_MESSAGES": "1000000 per minute",
    "RATE_LIMIT_DEFAULT": "10000000 per minute",
    "LOG_LEVEL": "WARNING",
}
"""Settings of commands that send as many requests as they can."""


class Harness:
    """Belfry on a migrated, empty database and an empty Redis database that nothing else uses.

    `env` is the environment of its processes, `listening` the web process's socket and `address` its URL. No process
    runs until `web` or `workers` starts it. `start` makes one.
    """

    def __init__(self, data_dir: Path, env: dict[str, str], listening: socket.socket) -> None:
        self.data_dir, self.env, self.listening = data_dir, env, listening
        self.address = ports.address_of(listening)

    @classmethod
    @contextmanager
    def start(
        cls, purpose: str, settings: Mapping[str, str] | None = None, *, stops_servers: bool = False
    ) -> Iterator[Self]:
        """Yield a harness. Its processes and this one have `settings` in their environment.

        Import Belfry's modules inside the block: they read the environment once. With `stops_servers` the servers
        must be embedded ones: raises CommandError where DATABASE_URL or REDIS_URL names another.
        """
        if stops_servers and named():
            raise CommandError("This command stops its servers. Unset DATABASE_URL and REDIS_URL.")
        with ExitStack() as resources:
            listening = resources.enter_context(ports.listen())
            data_dir = resources.enter_context(temporary_data_dir())
            urls = resources.enter_context(private(resources.enter_context(servers(data_dir)), purpose))
            env = stack.environment(urls, ports.address_of(listening)) | dict(settings or {})
            os.environ.update(env)
            stack.migrate(env)
            yield cls(data_dir, env, listening)

    # Processes --------------------------------------------------------------------------------------------

    @contextmanager
    def web(self) -> Iterator[Child]:
        """Run a web process, which is ready when the block begins."""
        with stack.web(self.env, self.listening, self.data_dir / "web.log") as child:
            yield child

    @contextmanager
    def workers(self, number: int) -> Iterator[list[Child]]:
        """Run that many workers."""
        with ExitStack() as running:
            logs = [self.data_dir / f"worker-{index}.log" for index in range(number)]
            yield [running.enter_context(stack.worker(self.env, log)) for log in logs]

    # Data -------------------------------------------------------------------------------------------------

    @cached_property
    def admin(self) -> Any:
        """An administrator, who is a member of each server that is created later."""
        from belfry.identity import users

        return users.create_user("admin", is_admin=True)

    @cached_property
    def client(self) -> Client:
        """The HTTP client of `admin`."""
        return self.client_of(self.admin)

    def client_of(self, user: Any) -> Client:
        """An HTTP client with a new token of that user."""
        from belfry.identity import tokens

        return Client(self.address, tokens.create_token(user)[1])

    def create_server(self, members: int, channels: int = 1) -> dict[str, Any]:
        """Create a server with that many members; returns what `seeding.seed` does."""
        from belfry.cli import seeding

        _ = self.admin
        if members >= 1_000:
            say(f"  creating a server of {members:,} members …")
        return seeding.seed(members, channels)

    def post(self, channel_id: int, content: str = "gold breaks out") -> dict[str, Any]:
        """Post a message as `admin`; returns it with its run."""
        message: dict[str, Any] = self.client.post("/api/messages", {"channel_id": channel_id, "content": content})
        return message

    def wait_for_run(
        self, run_id: int, condition: Callable[[dict[str, Any]], object] = lambda run: run["finished_at"]
    ) -> dict[str, Any]:
        """Wait until the run fulfils the condition, by default until it is finished; returns it."""

        def read() -> dict[str, Any] | None:
            run: dict[str, Any] = self.client.get(f"/api/runs/{run_id}")
            return run if condition(run) else None

        return signals.wait_until(read, f"run {run_id}", TIMEOUT_SECONDS)

    # Embedded servers, of which nobody else has data ------------------------------------------------------

    @cached_property
    def _sockets(self) -> Path:
        return Path((self.data_dir / "sockets").read_text())

    def redis(self) -> redis.Redis:
        """A connection to Redis."""
        return redis.Redis.from_url(self.env["REDIS_URL"], socket_timeout=5)

    def stop_redis(self) -> None:
        valkey.stop(self.data_dir, self._sockets)

    def start_redis(self, *, empty: bool = False) -> None:
        """Start Redis with the data that it had, or without any."""
        valkey.start(self.data_dir, self._sockets)
        if empty:
            self.empty_redis()

    def empty_redis(self) -> None:
        """Delete all data of Redis, unless it is down."""
        with suppress(redis.RedisError), self.redis() as client:
            client.flushall()

    def restart_postgresql(self) -> None:
        """Disconnect all clients and restart PostgreSQL, which takes about a second."""
        postgres.stop(self.data_dir, self._sockets)
        postgres.start(self.data_dir, self._sockets)

    def crash_postgresql(self, rng: random.Random) -> None:
        """Kill one of its sessions: PostgreSQL ends all of them and recovers from its log."""
        found: list[tuple[int]] = []
        with suppress(psycopg.OperationalError), psycopg.connect(self.env["DATABASE_URL"]) as connection:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ).fetchall()
        if found:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(found)[0], signal.SIGKILL)
