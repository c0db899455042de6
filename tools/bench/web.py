"""A part of `make bench`: `POST /api/messages` compared with a bare Flask route, under load.

Both run with the same gunicorn.conf.py, alternately, on the same servers, and get the same requests over keep-alive
connections. The bare route (`peers/bare_flask.py`) inserts a message, pushes its id to Redis and answers; Belfry also
checks the token, the rights and the rate limit, writes the run, and enqueues a job of RQ. Then Belfry alone: posts to a
small and to a large server, and during a fan-out to the large one. Rows and jobs are counted after every load: there
must be one for each 201, and no other response.
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
from tools.bench.harness import BenchHarness
from tools.bench.measuring import compare, percentile
from tools.dev import CommandError, say, signals, stack

RESPONSE_SECONDS = 30.0
WARM_UP_SECONDS = 0.5  # of every load, not counted: connections are opened, statements prepared
SMALL = 10
CONNECTIONS, ROUNDS, SECONDS = 8, 5, 1.5
FANOUT_MEMBERS = 3_000_000  # in messages to the large server: they must take longer than the posts meanwhile
TARGET = 0.6  # of the bare route's requests a second
TEXT = "gold breaks out above the last high, and silver follows"


@dataclass(frozen=True)
class Load:
    """The seconds of each request after the warm-up, their rate, and the number of all 201s."""

    times: list[float]
    rate: float
    answered: int


class _Connection:
    """A keep-alive connection for one request at a time."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address, RESPONSE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request, self.received, self.began = request, b"", 0.0

    def send(self) -> None:
        self.received, self.began = b"", time.perf_counter()
        self.socket.sendall(self.request)

    def receive(self) -> bool:
        """Read what has arrived; returns whether it is the whole response. Raises CommandError where it is no 201."""
        self.received += self.socket.recv(65_536)
        head, gap, body = self.received.partition(b"\r\n\r\n")
        if gap and head.startswith(b"HTTP/1.1 201 "):
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            return len(body) == int(length)
        if gap or not self.received:
            raise CommandError(f"A post was answered: {self.received[:2_000].decode(errors='replace')}")
        return False


def load(address: tuple[str, int], request: bytes, connections: int, seconds: float) -> Load:
    """Repeat the request over so many connections for so many seconds, and wait for the last responses."""
    with ExitStack() as open_, selectors.DefaultSelector() as selector:
        for _ in range(connections):
            one = _Connection(address, request)
            open_.enter_context(closing(one.socket))
            selector.register(one.socket, selectors.EVENT_READ, one)
            one.send()
        begin, waiting, answered, times = time.perf_counter() + WARM_UP_SECONDS, connections, 0, []
        last = begin
        while waiting:
            ready = selector.select(RESPONSE_SECONDS)
            if not ready:
                raise CommandError(f"No response came for {RESPONSE_SECONDS:.0f} s.")
            for key, _ in ready:
                if not key.data.receive():
                    continue
                now = time.perf_counter()
                answered += 1
                if now >= begin:
                    times.append(now - key.data.began)
                    last = now
                if now < begin + seconds:
                    key.data.send()
                else:
                    waiting -= 1
        return Load(times, len(times) / (last - begin), answered)


def encode_request(token: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body)
    lines = (
        "POST /api/messages HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}",
        "Content-Type: application/json", f"Content-Length: {len(content)}", "", content,
    )  # fmt: skip
    return "\r\n".join(lines).encode()


class Posting:
    """An administrator who posts, and a channel of a small and of a large server: {members: channel id}."""

    def __init__(self, harness: BenchHarness) -> None:
        self.env, self.data_dir, self.author = harness.env, harness.data_dir, harness.admin
        _, self.token = tokens.create_token(self.author)
        large = max(harness.large_channels)
        self.channels = {SMALL: seeding.seed(SMALL, 1)["channel_ids"][0], large: harness.large_channels[large]}
        self.bare_channel = Channel.create(server=Server.create(name="bare"), name="general").id

    @contextmanager
    def web(self, app: str = "app:create_app()") -> Iterator[tuple[str, int]]:
        """Serve that app by gunicorn while the block runs; yields the address."""
        with socket.create_server(("127.0.0.1", 0)) as listening, stack.web(
            self.env, listening, self.data_dir / "web.log", app
        ):
            yield listening.getsockname()

    def bare(self, address: tuple[str, int], connections: int, seconds: float) -> Load:
        from tools.bench.peers.bare_flask import QUEUE

        asked = encode_request(
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
        """Post to Belfry. Each 201 must have created one message and one run, and nothing else."""
        query = (
            "SELECT count(*) AS messages, count(run.id) AS runs FROM message msg"
            " LEFT JOIN run ON run.message_id = msg.id AND run.kind = 'message' WHERE msg.channel_id = %(id)s"
        )
        before = fetch_one(query, {"id": channel_id})
        request = encode_request(self.token, {"channel_id": channel_id, "content": TEXT})
        done = load(address, request, connections, seconds)
        after = fetch_one(query, {"id": channel_id})
        assert before is not None
        assert after is not None
        made = {name: after[name] - before[name] for name in after}
        assert made == {"messages": done.answered, "runs": done.answered}, (made, done.answered)
        return done

    def posts_without_worker(
        self, address: tuple[str, int], channel_id: int, connections: int, seconds: float
    ) -> Load:
        """As `posts`, while no worker runs: each run must have its job. Deletes the runs and jobs."""
        done = self.posts(address, channel_id, connections, seconds)
        waiting = queues.queue().count
        assert waiting == done.answered, (waiting, done.answered)
        self.delete_runs()
        return done

    def posts_during_fanout(self, address: tuple[str, int], connections: int, seconds: float, messages: int) -> Load:
        """Post to the small server while a worker processes so many messages to the large one."""
        small, large = self.channels[min(self.channels)], self.channels[max(self.channels)]
        with stack.worker(self.env, self.data_dir / "worker.log") as worker:
            ids = [Message.create(channel=large, author=self.author, content=TEXT).id for _ in range(messages)]
            first, *_ = large_runs = [runs.create_run(message_id, "message") for message_id in ids]
            for run_id in large_runs:
                assert queues.enqueue_run(run_id)
            is_running = lambda: worker.check() or runs.find_run(first)["members_processed"]  # noqa: E731
            signals.wait_until(is_running, "the worker", RESPONSE_SECONDS, 0.01)
            done = self.posts(address, small, connections, seconds)
            if runs.find_run(large_runs[-1])["finished_at"]:
                raise CommandError("The large fan-outs ended before the posts: increase FANOUT_MEMBERS.")
        self.delete_runs()
        return done

    def delete_runs(self) -> None:
        """Delete jobs, runs and notifications, so that later measurements do not process them."""
        for name in queues.QUEUES:
            queues.queue(name).empty()
        execute("TRUNCATE notification; TRUNCATE run CASCADE")


def _figures(loads: list[Load]) -> dict[str, float]:
    """Return the medians over the loads of the rate and the percentiles."""
    p50, p99 = (statistics.median(percentile(one.times, share) * 1000 for one in loads) for share in (0.5, 0.99))
    return {
        "requests_per_s": round(statistics.median(one.rate for one in loads), 1),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
    }


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"bare", "belfry", "ratio", "audiences": {members: figures}, "during_a_fanout"}: posts compared with the bare
    route; to both servers; and to the small one during a fan-out to the large one."""
    posting = Posting(harness)
    bare: list[Load] = []
    belfry: list[Load] = []
    audiences: dict[int, list[Load]] = {size: [] for size in posting.channels}
    with posting.web() as ours, posting.web("tools.bench.peers.bare_flask:create_app()") as theirs:
        for number in range(ROUNDS):
            say(f"POST and a bare route: {number + 1} of {ROUNDS}")
            bare.append(posting.bare(theirs, CONNECTIONS, SECONDS))
            small = posting.channels[SMALL]
            belfry.append(posting.posts_without_worker(ours, small, CONNECTIONS, SECONDS))
        for number in range(ROUNDS):
            say(f"POST to a small and a large server: {number + 1} of {ROUNDS}")
            for size, channel_id in posting.channels.items():
                audiences[size].append(posting.posts_without_worker(ours, channel_id, CONNECTIONS, SECONDS))
        say("POST during a fan-out")
        meanwhile = posting.posts_during_fanout(ours, CONNECTIONS, SECONDS, -(-FANOUT_MEMBERS // max(posting.channels)))
    return {
        "connections": CONNECTIONS,
        "bare": _figures(bare),
        "belfry": _figures(belfry),
        "ratio": round(statistics.median(b.rate / a.rate for a, b in zip(bare, belfry, strict=True)), 3),
        "audiences": {size: _figures(loads) for size, loads in audiences.items()},
        "during_a_fanout": {"members": max(posting.channels), **_figures([meanwhile])},
    }


def table(results: dict[str, Any]) -> str:
    """Format the results."""
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
