"""A part of `make bench`: 1,000 live streams on one web process.

The streams are of members of a community of 10,000, in which somebody posts 100 messages a minute, in turn with and
without streams: from each post, the milliseconds until every listener has read the notification; the posts' own times;
and the process's memory. Then the same while others keep the API busy with posts elsewhere.
"""

import argparse
import secrets
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil

from belfry.core.db import fetch_all
from belfry.identity.tokens import TOKEN_PREFIX, hash_token
from tools.bench.harness import BenchHarness, compare
from tools.bench.web import CONNECTIONS, TEXT, Bench, Load, load, request_of
from tools.dev import say, signals, stack
from tools.dev.client import Client

MAX_STREAMS_PER_PROCESS = 1_000
MEMBERS = 10_000
PER_MINUTE = 100
SECONDS = 20.0
ROUNDS = 2
PATIENCE = 60.0
TARGET = 1_000.0  # ms, at the 95th percentile


class Listeners:
    """So many open streams, read by one thread. `arrived` has, by message id, when each had its notification."""

    def __init__(self, address: tuple[str, int], tokens: list[str]) -> None:
        self._selector = selectors.DefaultSelector()
        self._open: list[socket.socket] = []
        self.arrived: dict[int, list[float]] = {}
        self._begun: set[int] = set()
        self._stop = False
        for token in tokens:
            one = socket.create_connection(address, PATIENCE)
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
        """Whether each has had the count that a stream begins with."""
        return len(self._begun) == len(self._open)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for one in self._open:
            one.close()


@contextmanager
def listening(address: tuple[str, int], tokens: list[str]) -> Iterator[Listeners]:
    """While the block runs, each token's person listens."""
    listeners = Listeners(address, tokens)
    signals.wait_until(listeners.all_have_begun, "the streams", PATIENCE)
    try:
        yield listeners
    finally:
        listeners.close()


def _people(channel_id: int) -> list[str]:
    """Tokens of members who are notified of every message."""
    found = fetch_all(
        "SELECT m.user_id FROM channel c JOIN member m ON m.server_id = c.server_id"
        " JOIN subscription s ON s.user_id = m.user_id AND s.status = 'active'"
        " AND COALESCE(s.current_period_end > now(), true)"
        " WHERE c.id = %(id)s AND NOT EXISTS (SELECT FROM preference p WHERE p.user_id = m.user_id)"
        " ORDER BY m.user_id LIMIT %(streams)s",
        {"id": channel_id, "streams": MAX_STREAMS_PER_PROCESS},
    )
    assert len(found) == MAX_STREAMS_PER_PROCESS, len(found)
    tokens = [TOKEN_PREFIX + secrets.token_urlsafe(32) for _ in found]
    fetch_all(
        "INSERT INTO api_token (user_id, token_hash)"
        " SELECT * FROM unnest(%(user_ids)s::bigint[], %(hashes)s::bytea[]) RETURNING id",
        {"user_ids": [one["user_id"] for one in found], "hashes": [hash_token(token) for token in tokens]},
    )
    return tokens


def _paced(client: Client, channel_id: int) -> tuple[dict[int, float], list[float]]:
    """PER_MINUTE for SECONDS: when each message's post began, and the milliseconds that each took."""
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
    bench, channel_id = Bench(harness), harness.large_channels[MEMBERS]
    tokens = _people(channel_id)
    found: dict[str, Any] = {"streams": MAX_STREAMS_PER_PROCESS, "members": MEMBERS, "per_minute": PER_MINUTE}
    env = {**harness.env, "WEB_CONCURRENCY": "1"}
    with ExitStack() as running:
        listening_socket = running.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        address = listening_socket.getsockname()
        child = running.enter_context(stack.web(env, listening_socket, harness.data_dir / "live.log"))
        running.enter_context(stack.worker(env, harness.data_dir / "live-worker.log"))
        web = psutil.Process(child.process.pid).children()[0]
        client = Client(f"http://127.0.0.1:{address[1]}", bench.token)
        elsewhere = request_of(bench.token, {"channel_id": bench.channels[min(bench.channels)], "content": TEXT})
        for _ in range(20):
            client.post("/api/messages", {"channel_id": channel_id, "content": TEXT})
        for name, others in (("quiet", None), ("busy", elsewhere)):
            found[name] = _rounds(address, tokens, client, channel_id, web, others)
    bench.forget()
    return found


def _rounds(
    address: tuple[str, int],
    tokens: list[str],
    client: Client,
    channel_id: int,
    web: psutil.Process,
    others: bytes | None,
) -> dict[str, Any]:
    """The paced posts without and with streams in turn, beside others who ask for `others`, if that is given."""
    posts: dict[bool, list[float]] = {False: [], True: []}
    loads: dict[bool, list[Load]] = {False: [], True: []}
    memory: dict[bool, float] = {}
    delays: list[float] = []
    for number in range(2 * ROUNDS):
        streams = number % 2 == 1
        busy = ", busy" if others else ""
        say(f"{MAX_STREAMS_PER_PROCESS if streams else 'no'} streams{busy}: {number // 2 + 1} of {ROUNDS}")
        with ExitStack() as round_:
            listeners = round_.enter_context(listening(address, tokens)) if streams else None
            asking = _Others(address, others) if others else None
            if asking:
                round_.callback(asking.join)
            began, took = _paced(client, channel_id)
            posts[streams] += took
            if listeners:
                delays += _delays(listeners, began)
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


def _both(figure: Callable[[bool], Any]) -> dict[str, Any]:
    return {"with": figure(True), "without": figure(False)}


class _Others:
    """They post elsewhere as fast as they are answered, as long as the paced posts last."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.done: Load

        def ask() -> None:
            self.done = load(address, request, CONNECTIONS, SECONDS - 1)

        self._thread = threading.Thread(target=ask)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()


def _delays(listeners: Listeners, began: dict[int, float]) -> list[float]:
    """Milliseconds from each post to each listener, all of whom have had it."""
    signals.wait_until(
        lambda: all(len(listeners.arrived.get(id_, [])) >= MAX_STREAMS_PER_PROCESS for id_ in began),
        "the notifications on all streams",
        PATIENCE,
    )
    assert all(len(listeners.arrived[id_]) == MAX_STREAMS_PER_PROCESS for id_ in began), "somebody was sent one twice"
    return [(at - when) * 1000 for id_, when in began.items() for at in listeners.arrived[id_]]


def _percentiles(times: list[float]) -> dict[str, float]:
    in_order = sorted(times)
    return {
        name: round(in_order[min(len(in_order) - 1, int(len(in_order) * share))], 1)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


def table(results: dict[str, Any]) -> str:
    """The results for people."""
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
                f"    posts elsewhere, as fast as they go: {one['others_per_s']['with']:,.0f}/s,"
                f" p99 {one['others_ms']['with']['p99']:.1f} ms; without streams"
                f" {one['others_per_s']['without']:,.0f}/s, p99 {one['others_ms']['without']['p99']:.1f} ms"
            )
    return "\n".join(lines)
