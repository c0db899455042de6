"""A part of `make bench`: 1,000 live streams on one web process.

The clients are members of a server of 10,000, to which 100 messages a minute are posted, alternately with and without
streams. Measured are the milliseconds from each post until each client has read the notification, the posts' own times,
and the memory of the process. Then the same while other connections post to another server as fast as they can.
"""

import argparse
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil

from tools.bench.harness import BenchHarness
from tools.bench.measuring import compare, create_subscriber_tokens, percentiles
from tools.bench.web import CONNECTIONS, SMALL, TEXT, Load, Posting, encode_request, load
from tools.dev import say, signals, stack
from tools.dev.client import Client

MAX_STREAMS_PER_PROCESS = 1_000
MEMBERS = 10_000
PER_MINUTE = 100
SECONDS = 20.0
ROUNDS = 2
TIMEOUT_SECONDS = 60.0
TARGET = 1_000.0  # ms, at the 95th percentile


class Clients:
    """Open streams, read by one thread. `arrived` has for each message id the times at which a client received it."""

    def __init__(self, address: tuple[str, int], tokens: list[str]) -> None:
        self._selector = selectors.DefaultSelector()
        self._open: list[socket.socket] = []
        self.arrived: dict[int, list[float]] = {}
        self._begun: set[int] = set()
        self._stop = False
        for token in tokens:
            one = socket.create_connection(address, TIMEOUT_SECONDS)
            one.sendall(
                b"GET /api/notifications/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Authorization: Bearer %b\r\n\r\n" % token.encode()
            )
            self._open.append(one)
            self._selector.register(one, selectors.EVENT_READ, bytearray())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop:
            for key, _ in self._selector.select(0.2):
                now, received = time.perf_counter(), key.fileobj.recv(65_536)  # type: ignore[union-attr]
                assert received, "a stream was ended"
                key.data.extend(received)
                whole, end, rest = key.data.rpartition(b"\n\n")
                if b"event: unread" in whole:
                    self._begun.add(key.fd)
                for part in whole.split(b'"message_id": ')[1:]:
                    self.arrived.setdefault(int(part.partition(b",")[0]), []).append(now)
                if end:
                    key.data[:] = rest

    def all_have_begun(self) -> bool:
        """Whether each has received the count that a stream begins with."""
        return len(self._begun) == len(self._open)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for one in self._open:
            one.close()


@contextmanager
def connected_clients(address: tuple[str, int], tokens: list[str]) -> Iterator[Clients]:
    """Keep a stream open for each token while the block runs."""
    clients = Clients(address, tokens)
    signals.wait_until(clients.all_have_begun, "the streams", TIMEOUT_SECONDS)
    try:
        yield clients
    finally:
        clients.close()


def _post_at_rate(client: Client, channel_id: int) -> tuple[dict[int, float], list[float]]:
    """Post PER_MINUTE for SECONDS; returns the time of each message's post, and the milliseconds that each took."""
    began, took = {}, []
    first = time.perf_counter()
    for number in range(round(SECONDS * PER_MINUTE / 60)):
        time.sleep(max(0.0, first + number * 60 / PER_MINUTE - time.perf_counter()))
        at = time.perf_counter()
        began[client.post("/api/messages", {"channel_id": channel_id, "content": TEXT})["id"]] = at
        took.append((time.perf_counter() - at) * 1000)
    return began, took


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"streams", "quiet": {"reached_ms", "posts_ms", "memory_mib", "others_per_s", "others_ms"}, "busy": the like}."""
    posting, channel_id = Posting(harness), harness.large_channels[MEMBERS]
    _, tokens = create_subscriber_tokens(channel_id, MAX_STREAMS_PER_PROCESS)
    found: dict[str, Any] = {"streams": MAX_STREAMS_PER_PROCESS, "members": MEMBERS, "per_minute": PER_MINUTE}
    env = {**harness.env, "WEB_CONCURRENCY": "1"}
    with ExitStack() as running:
        listening = running.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        address = listening.getsockname()
        child = running.enter_context(stack.web(env, listening, harness.data_dir / "live.log"))
        running.enter_context(stack.worker(env, harness.data_dir / "live-worker.log"))
        web = psutil.Process(child.process.pid).children()[0]
        client = Client(f"http://127.0.0.1:{address[1]}", posting.token)
        elsewhere = encode_request(posting.token, {"channel_id": posting.channels[SMALL], "content": TEXT})
        for _ in range(20):
            client.post("/api/messages", {"channel_id": channel_id, "content": TEXT})
        for name, others in (("quiet", None), ("busy", elsewhere)):
            found[name] = _rounds(address, tokens, client, channel_id, web, others)
    posting.delete_runs()
    return found


def _rounds(
    address: tuple[str, int],
    tokens: list[str],
    client: Client,
    channel_id: int,
    web: psutil.Process,
    others: bytes | None,
) -> dict[str, Any]:
    """Post alternately without and with streams, while other connections send the request `others`, if any."""
    posts: dict[bool, list[float]] = {False: [], True: []}
    loads: dict[bool, list[Load]] = {False: [], True: []}
    memory: dict[bool, float] = {}
    delays: list[float] = []
    for number in range(2 * ROUNDS):
        streams = number % 2 == 1
        busy = ", busy" if others else ""
        say(f"{MAX_STREAMS_PER_PROCESS if streams else 'no'} streams{busy}: {number // 2 + 1} of {ROUNDS}")
        with ExitStack() as round_:
            clients = round_.enter_context(connected_clients(address, tokens)) if streams else None
            asking = _OtherPosts(address, others) if others else None
            if asking:
                round_.callback(asking.join)
            began, took = _post_at_rate(client, channel_id)
            posts[streams] += took
            if clients:
                delays += _delays(clients, began)
            memory[streams] = web.memory_info().rss / 2**20
        if asking:
            loads[streams].append(asking.done)
    found: dict[str, Any] = {
        "reached_ms": _percentiles(delays),
        "posts_ms": _both(lambda streams: _percentiles(posts[streams])),
        "memory_mib": _both(lambda streams: round(memory[streams], 1)),
        "others_per_s": None,
        "others_ms": None,
    }
    if others:
        found["others_per_s"] = _both(lambda streams: round(statistics.median(one.rate for one in loads[streams]), 1))
        found["others_ms"] = _both(
            lambda streams: _percentiles([seconds * 1000 for one in loads[streams] for seconds in one.times])
        )
    return found


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    return percentiles(milliseconds, 0.5, 0.95, 0.99, digits=1)


def _both(figure: Callable[[bool], Any]) -> dict[str, Any]:
    return {"with": figure(True), "without": figure(False)}


class _OtherPosts:
    """Send a request over several connections as fast as they are answered, for nearly SECONDS."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.done: Load

        def run() -> None:
            self.done = load(address, request, CONNECTIONS, SECONDS - 1)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()


def _delays(clients: Clients, began: dict[int, float]) -> list[float]:
    """Return the milliseconds from each post to each client, after all have received it."""
    signals.wait_until(
        lambda: all(len(clients.arrived.get(id_, [])) >= MAX_STREAMS_PER_PROCESS for id_ in began),
        "the notifications on all streams",
        TIMEOUT_SECONDS,
    )
    assert all(len(clients.arrived[id_]) == MAX_STREAMS_PER_PROCESS for id_ in began), "a client received one twice"
    return [(at - when) * 1000 for id_, when in began.items() for at in clients.arrived[id_]]


def table(results: dict[str, Any]) -> str:
    """Format the results."""
    lines = [
        f"{results['streams']:,} live streams on one web process, {results['per_minute']} messages a minute to"
        f" {results['members']:,} members"
    ]
    for name in ("quiet", "busy"):
        one = results[name]
        reached_ms, posts, memory = one["reached_ms"], one["posts_ms"], one["memory_mib"]
        lines += [
            f"  {name}: from the post to the browser, ms: p50 {reached_ms['p50']:.0f}, p99 {reached_ms['p99']:.0f};"
            f" p95 (target: <= {TARGET:.0f}) {compare(reached_ms['p95'], TARGET, at_most=True)}",
            f"    a post, ms: p50 {posts['with']['p50']:.1f}, p99 {posts['with']['p99']:.1f};"
            f" without streams {posts['without']['p50']:.1f}, {posts['without']['p99']:.1f}",
            f"    memory of the process, MiB: {memory['with']:.0f}; without streams {memory['without']:.0f}",
        ]
        if one["others_per_s"]:
            lines.append(
                f"    posts to another server, as fast as possible: {one['others_per_s']['with']:,.0f}/s,"
                f" p99 {one['others_ms']['with']['p99']:.1f} ms; without streams"
                f" {one['others_per_s']['without']:,.0f}/s, p99 {one['others_ms']['without']['p99']:.1f} ms"
            )
    return "\n".join(lines)
