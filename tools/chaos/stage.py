"""The processes and servers of the play: started, kept running as a platform would, and brought to their ends."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import psycopg
import redis

from tools.chaos.process_under_test import KILL
from tools.dev import CommandError, ports, postgres, stack, valkey
from tools.dev.client import not_ready
from tools.dev.paths import temporary_data_dir
from tools.dev.processes import Child, running
from tools.dev.servers import named, servers

WEB, WORKERS = "web", ("worker-1", "worker-2")
READY_SECONDS = 60
ARMED_SECONDS = 3.0  # that an order waits at a point for somebody to come by

GUNICORN = ("gunicorn", "--graceful-timeout=5", "--timeout=15", "--threads=4", "--workers=2", "app:create_app()")
WORKER = ("flask", "--app", "app", "worker")


class Death(NamedTuple):
    """What a process did to itself at a failpoint, with or without a current work item. `after` as of a Sign."""

    when: float
    pid: int
    run_id: int | None
    after: str
    point: str
    action: str


class Sign(NamedTuple):
    """Somebody took up a part of a run, or was done with it: its own ("None"), or the slice after a user id."""

    when: float
    run_id: int
    after: str
    point: str


class Stage:
    """A web process and two workers on a PostgreSQL and a Redis of their own. Made by `staged`."""

    def __init__(self, data_dir: Path, env: Mapping[str, str], listening: socket.socket) -> None:
        self.directory = data_dir / "chaos"
        (self.directory / "armed").mkdir(parents=True)
        self.env = dict(env)
        self.address = ports.address_of(listening)
        self._data_dir, self._listening = data_dir, listening
        self._sockets = Path((data_dir / "sockets").read_text())
        self._running: dict[str, tuple[Child, ExitStack]] = {}
        self.restarts = 0

    # Processes --------------------------------------------------------------------------------------------

    def keep_running(self) -> None:
        """Start every process that does not run, at once, as a platform does."""
        for name in (WEB, *WORKERS):
            if name in self._running:
                child, resources = self._running[name]
                if child.process.poll() is None:
                    continue
                resources.close()
                self.restarts += 1
            self._running[name] = self._start(name)

    def _start(self, name: str) -> tuple[Child, ExitStack]:
        arguments = ["-m", "tools.chaos.process_under_test", str(self.directory)]
        descriptors = ()
        if name == WEB:
            descriptors = (self._listening.fileno(),)
            arguments += [*GUNICORN[:1], f"--bind=fd://{descriptors[0]}", "--log-level=warning", *GUNICORN[1:]]
        else:
            arguments += WORKER
        resources = ExitStack()
        log = self.directory / f"{name}.log"
        child = resources.enter_context(running(name, arguments, self.env, log=log, pass_fds=descriptors))
        return child, resources

    def wait_until_ready(self) -> None:
        """Raises CommandError when the web process does not answer within a minute."""
        give_up = time.monotonic() + READY_SECONDS
        while (answer := not_ready(self.address)) is not None:
            self.keep_running()
            if time.monotonic() > give_up:
                raise CommandError(f"The web process was not ready after {READY_SECONDS} seconds: {answer}")
            time.sleep(0.1)

    def close(self) -> None:
        for _, resources in self._running.values():
            resources.close()

    def main_pid(self, name: str) -> int:
        return self._running[name][0].process.pid

    def children_of(self, name: str) -> list[int]:
        """Of a worker, its work-horse; of the web process, those that answer requests."""
        with suppress(psutil.Error):
            return [child.pid for child in psutil.Process(self.main_pid(name)).children()]
        return []

    def send(self, pid: int, signum: signal.Signals) -> bool:
        """Whether there was such a process of ours."""
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
            return True
        return False

    # Points -----------------------------------------------------------------------------------------------

    def strike(self, point: str, action: str = KILL) -> bool:
        """Have the first process that comes to a point do that to itself; whether one came."""
        order = self.directory / "armed" / point
        unfinished = order.with_name(f".{point}")
        unfinished.write_text(action)
        unfinished.rename(order)
        give_up = time.monotonic() + ARMED_SECONDS
        while order.exists():
            self.keep_running()
            if time.monotonic() > give_up:
                with suppress(FileNotFoundError):
                    order.unlink()
                    return False
                break
            time.sleep(0.02)
        return True

    def deaths(self) -> list[Death]:
        """All that happened at points."""
        found = (line.split(" ", 5) for line in self._lines("deaths"))
        return [
            Death(float(when), int(pid), int(run_id) or None, after, point, action)
            for when, pid, run_id, after, point, action in found
        ]

    def signs_of_life(self) -> list[Sign]:
        """Whenever somebody took care of a run."""
        found = (line.split() for line in self._lines("life"))
        return [Sign(float(when), int(run_id), after, point) for when, run_id, after, point in found]

    def _lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    # Servers ----------------------------------------------------------------------------------------------

    def restart_postgresql(self) -> None:
        """Everybody is disconnected, and it is back in a second."""
        postgres.stop(self._data_dir, self._sockets)
        postgres.start(self._data_dir, self._sockets)

    def crash_postgresql(self, rng: random.Random) -> None:
        """One of its sessions is killed, on which all of it crashes and recovers from its log."""
        found: list[tuple[int]] = []
        with suppress(psycopg.OperationalError), psycopg.connect(self.env["DATABASE_URL"]) as connection:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ).fetchall()
        if found:
            self.send(rng.choice(found)[0], signal.SIGKILL)

    def empty_redis(self) -> None:
        with suppress(redis.RedisError), redis.Redis.from_url(self.env["REDIS_URL"], socket_timeout=5) as client:
            client.flushall()

    def restart_redis(self, *, empty: bool, pause: float) -> None:
        """It is away for `pause` seconds, and comes back with what it had, or empty."""
        valkey.stop(self._data_dir, self._sockets)
        time.sleep(pause)
        valkey.start(self._data_dir, self._sockets)
        if empty:
            self.empty_redis()


@contextmanager
def staged() -> Iterator[Stage]:
    """A stage with a migrated database, and nothing running but the servers. All of it is gone after the block."""
    if named():
        raise CommandError("Its servers are killed: it starts its own. Unset DATABASE_URL and REDIS_URL.")
    with ExitStack() as resources:
        listening = resources.enter_context(ports.listen())
        data_dir = resources.enter_context(temporary_data_dir())
        # Durable, as in production: what was answered must outlive a crash of PostgreSQL.
        urls = resources.enter_context(servers(data_dir))
        env = stack.environment(urls, ports.address_of(listening))
        env |= dict.fromkeys(
            ("RATE_LIMIT_MESSAGES", "RATE_LIMIT_DEFAULT", "RATE_LIMIT_ANONYMOUS"), "1000000 per minute"
        )
        env |= {"LOG_LEVEL": "WARNING", "FANOUT_SLICE_SIZE": "200"}
        os.environ.update(env)  # what the harness itself imports of Belfry reads it
        stack.migrate(env)
        stage = Stage(data_dir, env, listening)
        resources.callback(stage.close)
        yield stage
