"""A drill: requests of other users while slow and silent clients keep as many connections open as they can.

SLOW_HEADS send a byte of a request head every few seconds, SLOW_BODIES a byte of a body (half `POST /login`, half
`POST /api/messages`; every fourth announces a body and sends nothing), SILENT nothing. All have the
same IP address, and reopen a closed connection at once. Meanwhile `/healthz` is requested and messages are posted, each
over a new connection. `WEB_CONCURRENCY=1 make drill ARGS=slow_clients` runs it with one web process.
"""

import resource
import selectors
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from tools.dev import CommandError, say
from tools.dev.harness import Harness

SLOW_HEADS, SLOW_BODIES, SILENT = 200, 200, 2_000
SECONDS = 60.0  # longer than all time limits of the server, except that of silent connections
PACE_SECONDS = 3.0  # between two bytes of one slow client
PROBE_SECONDS = 0.1
RESPONSE_SECONDS = 10.0
TARGET_SECONDS = 2.0


class SlowClients:
    """Keep the connections open, and send their bytes, in a thread until `close`."""

    def __init__(self, address: tuple[str, int], token: str) -> None:
        self.address = address
        self.reopened = 0
        head = f"Host: localhost\r\nAuthorization: Bearer {token}\r\nContent-Length: 60000\r\n"
        login = f"POST /login HTTP/1.1\r\n{head}Content-Type: application/x-www-form-urlencoded\r\n\r\n".encode()
        post = f"POST /api/messages HTTP/1.1\r\n{head}Content-Type: application/json\r\n\r\n".encode()
        starts: list[tuple[bytes, bool]] = [(b"GET /healthz HTTP/1.1\r\nX-Slow: ", True)] * SLOW_HEADS
        starts += [((login, post)[number % 2], number % 4 < 3) for number in range(SLOW_BODIES)]
        starts += [(b"", False)] * SILENT
        self._starts = starts
        self._selector = selectors.DefaultSelector()
        self._open: list[socket.socket | None] = [None] * len(starts)
        self._stop = threading.Event()
        for number in range(len(starts)):
            self._connect(number)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _connect(self, number: int) -> None:
        one = socket.socket()
        self._open[number] = one
        one.setblocking(False)
        with suppress(BlockingIOError):
            one.connect(self.address)
        self._selector.register(one, selectors.EVENT_WRITE, number)

    def _reconnect(self, number: int, one: socket.socket) -> None:
        self._selector.unregister(one)
        one.close()
        self.reopened += 1
        self._connect(number)

    def _run(self) -> None:
        due = time.monotonic() + PACE_SECONDS
        connected: set[int] = set()
        while not self._stop.is_set():
            for key, mask in self._selector.select(0.1):
                number: int = key.data
                one: socket.socket = key.fileobj  # type: ignore[assignment]
                try:
                    if mask & selectors.EVENT_WRITE:
                        one.send(self._starts[number][0])
                        self._selector.modify(one, selectors.EVENT_READ, number)
                        connected.add(number)
                    elif not one.recv(4096):
                        raise ConnectionResetError
                except BlockingIOError:
                    continue
                except OSError:
                    connected.discard(number)
                    self._reconnect(number, one)
            if time.monotonic() >= due:
                due += PACE_SECONDS
                for number in list(connected):
                    slow, sender = self._open[number], self._starts[number][1]
                    if sender and slow:
                        with suppress(OSError):
                            slow.send(b"x")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for one in self._open:
            if one:
                one.close()


def slow_clients(harness: Harness, _: int, __: int) -> dict[str, Any]:
    """`/healthz` and posts before, and while 200 slow heads, 200 slow bodies and 2,000 silent connections are open."""
    needed = 2 * (SLOW_HEADS + SLOW_BODIES + SILENT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise CommandError(f"The drill needs {needed} open files (ulimit -Hn).")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    where = urlsplit(harness.address)
    address = (where.hostname or "", where.port or 0)
    channel_id = harness.create_server(20)["channel_ids"][0]
    harness.post(channel_id)
    found: dict[str, Any] = {}
    found |= _figures("before", *_probe(harness, address, channel_id, SECONDS / 4))
    say(f"  {SLOW_HEADS} slow heads, {SLOW_BODIES} slow bodies, {SILENT:,} silent connections …")
    clients = SlowClients(address, harness.client.token)
    try:
        found |= _figures("during", *_probe(harness, address, channel_id, SECONDS))
        found["during_connections_reopened"] = clients.reopened
    finally:
        clients.close()
    return found


def _probe(
    harness: Harness, address: tuple[str, int], channel_id: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Return the seconds of each `/healthz` and of each post, at least RESPONSE_SECONDS for one that failed."""
    healthz: list[float] = []
    posts: list[float] = []

    def request_healthz() -> None:
        connection = HTTPConnection(*address, timeout=RESPONSE_SECONDS)
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise CommandError(f"/healthz answered {answer.status}.")
        finally:
            connection.close()

    def repeat(took: list[float], request: Any) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            try:
                request()
                took.append(time.perf_counter() - began)
            except (OSError, CommandError):
                took.append(max(RESPONSE_SECONDS, time.perf_counter() - began))
            time.sleep(PROBE_SECONDS)

    threads = [
        threading.Thread(target=repeat, args=(healthz, request_healthz)),
        threading.Thread(target=repeat, args=(posts, lambda: harness.post(channel_id))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return healthz, posts


def _figures(when: str, healthz: list[float], posts: list[float]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, took in (("healthz", healthz), ("post", posts)):
        in_order = sorted(took)
        for label, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            figures[f"{when}_{name}_{label}_ms"] = round(in_order[int((len(in_order) - 1) * share)] * 1000, 1)
        figures[f"{when}_{name}_asked"] = len(took)
        figures[f"{when}_{name}_over_2_s"] = sum(one > TARGET_SECONDS for one in took)
    return figures
