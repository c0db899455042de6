"""A part of `make bench`: `POST /api/messages` beside a bare Flask route, under load.

Both behind the same gunicorn.conf.py, in turn, on the same servers, asked by the same loop over keep-alive connections.
The bare route (`peers/bare_flask.py`) inserts a message, pushes its id to Redis and answers; Belfry also asks who it is
and what they may, counts them, writes the run, and enqueues a job that RQ can run. Then Belfry alone: posts to a small
and to a large server, and while a worker notifies the large one. Rows and jobs are counted after every load: there is
one for each 201, and no other answer.
"""

import argparse
import json
import selectors
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from belfry.cli import seeding
from belfry.core import redis
from belfry.core.db import execute, fetch_one
from belfry.fanout import runs
from belfry.identity import tokens
from belfry.queue import queues
from models import Channel, Message, Server
from tools.bench.harness import BenchHarness, compare
from tools.dev import CommandError, say, stack

PATIENCE = 30.0  # seconds for one answer
WARM_SECONDS = 0.5  # of every load, not counted: connections are opened, statements prepared
SMALL = 10
CONNECTIONS, ROUNDS, SECONDS = 8, 5, 1.5
FANOUT_MEMBERS = 3_000_000  # of the large server, in messages to all of it: longer than the posts beside them last
TARGET = 0.6  # of the bare route's requests a second
TEXT = "gold breaks out above the last high, and silver follows"


@dataclass(frozen=True)
class Load:
    """What came of asking for a while: seconds of each answer that counts, a rate, and how many 201s in all."""

    times: list[float]
    rate: float
    answered: int


class _Connection:
    """One keep-alive connection, which asks the same again as soon as it is answered."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address, PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request, self.received, self.began = request, b"", 0.0

    def ask(self) -> None:
        self.received, self.began = b"", time.perf_counter()
        self.socket.sendall(self.request)

    def answer(self) -> bool:
        """Take what has come; whether it is the whole answer. Raises CommandError where it is no 201."""
        self.received += self.socket.recv(65_536)
        head, gap, body = self.received.partition(b"\r\n\r\n")
        if gap and head.startswith(b"HTTP/1.1 201 "):
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            return len(body) == int(length)
        if gap or not self.received:
            raise CommandError(f"A post was answered: {self.received[:2_000].decode(errors='replace')}")
        return False


def load(address: tuple[str, int], request: bytes, connections: int, seconds: float) -> Load:
    """Ask over so many connections at once, for so long; all that was asked is answered at the end."""
    with ExitStack() as open_, selectors.DefaultSelector() as selector:
        for _ in range(connections):
            one = _Connection(address, request)
            open_.enter_context(closing(one.socket))
            selector.register(one.socket, selectors.EVENT_READ, one)
            one.ask()
        begin, waiting, answered, times = time.perf_counter() + WARM_SECONDS, connections, 0, []
        last = begin
        while waiting:
            ready = selector.select(PATIENCE)
            if not ready:
                raise CommandError(f"No answer came for {PATIENCE:.0f} s.")
            for key, _ in ready:
                if not key.data.answer():
                    continue
                now = time.perf_counter()
                answered += 1
                if now >= begin:
                    times.append(now - key.data.began)
                    last = now
                if now < begin + seconds:
                    key.data.ask()
                else:
                    waiting -= 1
        return Load(times, len(times) / (last - begin), answered)


def request_of(token: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body)
    lines = (
        "POST /api/messages HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}",
        "Content-Type: application/json", f"Content-Length: {len(content)}", "", content,
    )  # fmt: skip
    return "\r\n".join(lines).encode()


class Bench:
    """An admin who posts, and a channel of each size: {members: channel id}."""

    def __init__(self, harness: BenchHarness) -> None:
        self.env, self.data_dir, self.author = harness.env, harness.data_dir, harness.admin
        _, self.token = tokens.create_token(self.author)
        large = max(harness.large_channels)
        self.channels = {SMALL: seeding.seed(SMALL, 1)["channel_ids"][0], large: harness.large_channels[large]}
        self.bare_channel = Channel.create(server=Server.create(name="bare"), name="general").id

    @contextmanager
    def web(self, app: str = "app:create_app()") -> Iterator[tuple[str, int]]:
        """While the block runs, gunicorn serves that app; its address."""
        with socket.create_server(("127.0.0.1", 0)) as listening, stack.web(
            self.env, listening, self.data_dir / "web.log", app
        ):
            yield listening.getsockname()

    def bare(self, address: tuple[str, int], connections: int, seconds: float) -> Load:
        from tools.bench.peers.bare_flask import QUEUE

        asked = request_of(
            self.token, {"channel_id": self.bare_channel, "author_id": self.author.id, "content": TEXT}
        )
        before = Message.select().where(Message.channel == self.bare_channel).count()
        done = load(address, asked, connections, seconds)
        made = Message.select().where(Message.channel == self.bare_channel).count() - before
        pushed = redis.redis_connection().llen(QUEUE)
        redis.redis_connection().delete(QUEUE)
        assert made == pushed == done.answered, (made, pushed, done.answered)
        return done

    def posts(self, address: tuple[str, int], channel_id: int, connections: int, seconds: float) -> Load:
        """Belfry's. Each 201 has made one message and one run of its own, and there is nothing else."""
        question = (
            "SELECT count(*) AS messages, count(r.id) AS runs FROM message g"
            " LEFT JOIN run r ON r.message_id = g.id AND r.kind = 'message' WHERE g.channel_id = %(id)s"
        )
        before = fetch_one(question, {"id": channel_id})
        done = load(address, request_of(self.token, {"channel_id": channel_id, "content": TEXT}), connections, seconds)
        after = fetch_one(question, {"id": channel_id})
        assert before is not None
        assert after is not None
        made = {name: after[name] - before[name] for name in after}
        assert made == {"messages": done.answered, "runs": done.answered}, (made, done.answered)
        return done

    def posts_that_wait(self, address: tuple[str, int], channel_id: int, connections: int, seconds: float) -> Load:
        """As `posts` while no worker runs: each run has its job. Empties the queue, before it is full."""
        done = self.posts(address, channel_id, connections, seconds)
        waiting = queues.queue().count
        assert waiting == done.answered, (waiting, done.answered)
        self.forget()
        return done

    def posts_meanwhile(self, address: tuple[str, int], connections: int, seconds: float, messages: int) -> Load:
        """Posts to the small community while a worker notifies the large one of so many messages."""
        small, large = self.channels[min(self.channels)], self.channels[max(self.channels)]
        with stack.worker(self.env, self.data_dir / "worker.log") as worker:
            ids = [Message.create(channel=large, author=self.author, content=TEXT).id for _ in range(messages)]
            first, *_ = large_runs = [runs.create_run(message_id, "message") for message_id in ids]
            for run_id in large_runs:
                assert queues.enqueue_run(run_id)
            give_up = time.monotonic() + PATIENCE
            while not runs.find_run(first)["members_processed"]:
                worker.check()
                if time.monotonic() > give_up:
                    raise CommandError("The worker did not begin.")
                time.sleep(0.01)
            done = self.posts(address, small, connections, seconds)
            if runs.find_run(large_runs[-1])["finished_at"]:
                raise CommandError("The large fan-outs ended before the posts did: use more messages.")
        self.forget()
        return done

    def forget(self) -> None:
        """What is queued and notified: nothing that comes later shall find it."""
        for name in queues.QUEUES:
            queues.queue(name).empty()
        execute("TRUNCATE notification; TRUNCATE run CASCADE")


def _figures(loads: list[Load]) -> dict[str, float]:
    """Medians over the loads, of each one's own rate and percentiles."""
    def percentile(share: float) -> float:
        return statistics.median(sorted(one.times)[int(len(one.times) * share)] * 1000 for one in loads)

    return {
        "requests_per_s": round(statistics.median(one.rate for one in loads), 1),
        "p50_ms": round(percentile(0.5), 2),
        "p99_ms": round(percentile(0.99), 2),
    }


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"bare", "belfry", "ratio", "audiences": {members: figures}, "during_a_fanout"}: posts beside the bare route; to
    both communities; and to the small one while a worker notifies the large one."""
    bench = Bench(harness)
    bare: list[Load] = []
    belfry: list[Load] = []
    audiences: dict[int, list[Load]] = {size: [] for size in bench.channels}
    with bench.web() as ours, bench.web("tools.bench.peers.bare_flask:create_app()") as theirs:
        for number in range(ROUNDS):
            say(f"POST beside a bare route: {number + 1} of {ROUNDS}")
            bare.append(bench.bare(theirs, CONNECTIONS, SECONDS))
            belfry.append(bench.posts_that_wait(ours, bench.channels[SMALL], CONNECTIONS, SECONDS))
        for number in range(ROUNDS):
            say(f"POST to small and large: {number + 1} of {ROUNDS}")
            for size, channel_id in bench.channels.items():
                audiences[size].append(bench.posts_that_wait(ours, channel_id, CONNECTIONS, SECONDS))
        say("POST during a fan-out")
        meanwhile = bench.posts_meanwhile(ours, CONNECTIONS, SECONDS, -(-FANOUT_MEMBERS // max(bench.channels)))
    return {
        "connections": CONNECTIONS,
        "bare": _figures(bare),
        "belfry": _figures(belfry),
        "ratio": round(statistics.median(b.rate / a.rate for a, b in zip(bare, belfry, strict=True)), 3),
        "audiences": {size: _figures(loads) for size, loads in audiences.items()},
        "during_a_fanout": {"members": max(bench.channels), **_figures([meanwhile])},
    }


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"POST /api/messages, {results['connections']} connections",
        f"  {'':34} {'requests/s':>11} {'p50':>9} {'p99':>10}",
    ]
    during = results["during_a_fanout"]
    named = {"a bare Flask route": results["bare"], "Belfry": results["belfry"]}
    named |= {f"Belfry, to {int(size):,} members": found for size, found in results["audiences"].items()}
    named[f"Belfry, while {during['members']:,} are notified"] = during
    for name, found in named.items():
        lines.append(
            f"  {name:34} {found['requests_per_s']:11,.0f} {found['p50_ms']:6.2f} ms {found['p99_ms']:7.2f} ms"
        )
    lines.append(
        f"  Belfry to the bare route, median of pairs (target: >= {TARGET}): {compare(results['ratio'], TARGET)}"
    )
    return "\n".join(lines)
