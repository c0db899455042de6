"""Real processes for tests: web processes, workers, and proxies that cut or delay their connections."""

import contextlib
import json
import os
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from psycopg.conninfo import conninfo_to_dict
from redis.connection import parse_url

from tools.chaos.process_under_test import KILL
from tools.dev import processes
from tools.dev.client import not_ready
from tools.dev.processes import Child

RQ_WORKER = ("rq.cli", "worker", "-S", "json", "--job-class", "belfry.queue.job_class.BelfryJob")
WAIT_SECONDS = 30.0  # only a limit for waiting, never an assertion about speed


def wait_until(condition: Callable[[], object], description: str, seconds: float = WAIT_SECONDS) -> None:
    """Return as soon as the condition is true; fail with the description if it is still false after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for: {description}")


class Process:
    """A child process of a test and its log."""

    def __init__(self, child: Child) -> None:
        self._process, self._log = child.process, child.log
        self.pid = child.process.pid

    def log(self) -> str:
        assert self._log is not None
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The log's lines that are JSON."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        return self._process.wait(timeout=seconds)


@contextmanager
def running(arguments: list[str], **environment: str) -> Iterator[Process]:
    """Run `python -m ARGUMENTS`. The process ends with the block, and also when the tests are killed."""
    env = {**os.environ, "LOG_FORMAT": "json", **environment}
    with (
        tempfile.NamedTemporaryFile(prefix="belfry-test-") as log,
        processes.running(arguments[0], ["-m", *arguments], env, log=Path(log.name)) as child,
    ):
        process = Process(child)
        try:
            yield process
        except BaseException:
            print(f"--- {' '.join(arguments)} ---\n{process.log()[-6000:]}")
            raise


@contextmanager
def worker_process(*, through: tuple[str, ...] = (), **environment: str) -> Iterator[Process]:
    """Run `flask --app app worker` with short intervals for retries and sweeps."""
    short_intervals = {"RETRY_BASE_DELAY_SECONDS": "1", "SWEEP_INTERVAL_SECONDS": "1"}
    with running([*through, "flask", "--app", "app", "worker"], **short_intervals | environment) as process:
        wait_until(lambda: "Listening on" in process.log(), "the worker to listen")
        yield process


@contextmanager
def worker_with_failpoints(directory: Path, **environment: str) -> Iterator[Process]:
    """Run a worker as `worker_process` does, whose failpoints `arm_failpoint` arms."""
    (directory / "armed").mkdir(exist_ok=True)
    with worker_process(through=("tools.chaos.process_under_test", str(directory)), **environment) as process:
        yield process


def arm_failpoint(directory: Path, point: str, action: str = KILL) -> Callable[[], bool]:
    """Arm a failpoint: the first process that reaches it applies the action to itself.

    Return a function that says whether a process has reached it.
    """
    armed = directory / "armed" / point
    armed.write_text(action)
    return lambda: not armed.exists()


@contextmanager
def web_process(*, through: tuple[str, ...] = (), **environment: str) -> Iterator[str]:
    """Run gunicorn as the Procfile does; yield its address."""
    with web_process_with_log(through=through, **environment) as (address, _):
        yield address


@contextmanager
def web_process_with_log(
    *, through: tuple[str, ...] = (), **environment: str
) -> Iterator[tuple[str, Process]]:
    """Run a web process as `web_process` does; yield its address and the process with its log."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with running(
        [*through, "gunicorn", "--bind", f"127.0.0.1:{port}", "app:create_app()"],
        **{"WEB_CONCURRENCY": "1", **environment},
    ) as process:
        wait_until(lambda: not_ready(address) is None, "the web process to be ready")
        yield address, process


class Proxy:
    """A proxy in front of a server, which can cut all connections and refuse new ones for a while."""

    delay_seconds = 0.0  # seconds by which each response is delayed

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self.accept_connections()

    def accept_connections(self) -> None:
        self._listener = self._listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut_connections(self) -> None:
        listener, self._listener = self._listener, None
        if listener:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut_connections()

    def _listen(self) -> socket.socket:
        raise NotImplementedError

    def _connect(self) -> socket.socket:
        raise NotImplementedError

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                pair = (client, self._connect())
            except OSError:  # the server behind the proxy is not reachable
                client.close()
                continue
            with self._lock:
                self._pairs.append(pair)
            threading.Thread(target=_forward, args=(*pair, self.delay_seconds), daemon=True).start()


class RedisProxy(Proxy):
    """A proxy in front of Redis. It listens at a Unix socket, also if Redis listens at a TCP port."""

    def __init__(self, target_url: str) -> None:
        self._target = parse_url(target_url)
        self._directory = tempfile.TemporaryDirectory(prefix="belfry-proxy-")
        self._path = str(Path(self._directory.name) / "redis.sock")
        password = self._target.get("password")
        credentials = f"{self._target.get('username') or ''}:{password}@" if password else ""
        self.url = f"unix://{credentials}{self._path}?db={self._target.get('db', 0)}"
        super().__init__()

    def cut_connections(self) -> None:
        super().cut_connections()
        Path(self._path).unlink(missing_ok=True)

    def close(self) -> None:
        super().close()
        self._directory.cleanup()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        listener.listen()
        return listener

    def _connect(self) -> socket.socket:
        if "path" in self._target:
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(self._target["path"])
            return upstream
        return socket.create_connection((self._target.get("host", "localhost"), self._target.get("port", 6379)))


class WebProxy(Proxy):
    """A proxy in front of a web process. It keeps its address while it refuses connections."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self._port = 0
        super().__init__()
        self.address = f"http://127.0.0.1:{self._port}"

    def _listen(self) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", self._port), backlog=64)
        self._port = listener.getsockname()[1]
        return listener

    def _connect(self) -> socket.socket:
        return socket.create_connection((self.target.hostname, self.target.port))


class PostgresProxy(Proxy):
    """A proxy in front of PostgreSQL, which delays each response by `delay_seconds` seconds."""

    def __init__(self, target_url: str, delay_seconds: float) -> None:
        self.delay_seconds = delay_seconds
        self._target = conninfo_to_dict(target_url)
        self._directory = tempfile.TemporaryDirectory(prefix="belfry-proxy-")
        user, password = (quote(str(self._target.get(name) or ""), safe="") for name in ("user", "password"))
        self.url = (
            f"postgresql://{user}{':' if password else ''}{password}@/{self._target['dbname']}"
            f"?host={quote(self._directory.name, safe='')}&port=5432"
        )
        super().__init__()

    def close(self) -> None:
        super().close()
        self._directory.cleanup()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self._directory.name}/.s.PGSQL.5432")
        listener.listen()
        return listener

    def _connect(self) -> socket.socket:
        host, port = str(self._target.get("host") or "localhost"), int(self._target.get("port") or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(f"{host}/.s.PGSQL.{port}")
        return upstream


def _forward(client: socket.socket, server: socket.socket, delay_seconds: float) -> None:
    with client, server, selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ, server)
        selector.register(server, selectors.EVENT_READ, client)
        while True:
            for key, _ in selector.select():
                try:
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    if key.fileobj is server:
                        time.sleep(delay_seconds)
                    key.data.sendall(data)
                except OSError:
                    return


@contextmanager
def open_redis_proxy(target_url: str) -> Iterator[RedisProxy]:
    proxy = RedisProxy(target_url)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def slow_database(delay_seconds: float) -> Iterator[str]:
    """The URL of a proxy to the tests' PostgreSQL that delays each response by `delay_seconds` seconds."""
    proxy = PostgresProxy(os.environ["DATABASE_URL"], delay_seconds)
    try:
        yield proxy.url
    finally:
        proxy.close()
