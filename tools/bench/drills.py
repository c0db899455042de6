"""`make drill ARGS="mention stop outage backlog"`: what the documents say of a busy, a broken and an attacked Belfry.

It sets up servers of its own, as the demo does, checks every notification after each as `verify` does, and prints
the figures, and them as JSON in the last line. Without a name, all of them.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis

from tools.bench.cleanup import cleanup
from tools.bench.reconnect import reconnect
from tools.bench.rendering import rendering
from tools.bench.slow_clients import slow_clients
from tools.bench.verify import verify
from tools.dev import CommandError, ports, say, stack, valkey
from tools.dev import signals as asked
from tools.dev.client import Client
from tools.dev.paths import temporary_data_dir
from tools.dev.servers import named, servers

PATIENCE = 120.0  # seconds without any progress
PAUSE = 0.15  # seconds between two mentions
TURNS = 5  # fan-outs during which mentions are posted: enough of them for a p95


class Ground:
    """A web process on servers of its own, an administrator, and communities as they are asked for."""

    def __init__(self, data_dir: Path, env: dict[str, str], address: str) -> None:
        from belfry.identity import tokens, users

        self.data_dir, self.env, self.address = data_dir, env, address
        self.sockets = Path((data_dir / "sockets").read_text())
        self.admin = users.create_user("admin", is_admin=True)
        self.client = Client(address, tokens.create_token(self.admin)[1])

    def community(self, members: int) -> dict[str, Any]:
        """`seeding.seed`, with the admin in it."""
        from belfry.cli import seeding

        say(f"  making a community of {members:,} …")
        return seeding.seed(members, 1)

    @contextmanager
    def workers(self, number: int) -> Iterator[list[Any]]:
        with ExitStack() as running:
            yield [
                running.enter_context(stack.worker(self.env, self.data_dir / f"worker-{one}.log"))
                for one in range(number)
            ]

    def post(self, community: dict[str, Any], content: str) -> dict[str, Any]:
        message: dict[str, Any] = self.client.post(
            "/api/messages", {"channel_id": community["channel_ids"][0], "content": content}
        )
        return message

    def wait(self, run_id: int, condition: Callable[[dict[str, Any]], bool] = lambda run: run["finished_at"]) -> Any:
        give_up = time.monotonic() + PATIENCE
        while not condition(run := self.client.get(f"/api/runs/{run_id}")):
            _give_up_after(give_up, f"run {run_id}")
            asked.sleep(0.05)
        return run


def mention(ground: Ground, members: int, _: int) -> dict[str, Any]:
    """A personal mention posted elsewhere while a message goes to so many members by two workers: until it is in the
    inbox of the mentioned, as they see it over HTTP."""
    from belfry.identity import tokens, users

    large, small = ground.community(members), ground.community(20)
    name = small["usernames"][0]
    reader = Client(ground.address, tokens.create_token(users.find_user_by_username(name))[1])
    took: list[float] = []
    fan_outs, edits = [], []
    with ground.workers(2):
        ground.wait(ground.post(small, "warm")["run"]["id"])
        alone = [_until_it_is_there(ground, small, name, reader) for _ in range(20)]
        for turn in range(TURNS):
            say(f"  fan-out to {members:,}: {turn + 1} of {TURNS}")
            message = ground.post(large, "gold breaks out")
            run_id = message["run"]["id"]
            ground.wait(run_id, lambda run: run["progress"]["done"] > 0)
            began = time.perf_counter()
            ground.client.patch(f"/api/messages/{message['id']}", {"content": "silver breaks out"})
            edits.append(time.perf_counter() - began)
            give_up = time.monotonic() + PATIENCE
            while not ground.client.get(f"/api/runs/{run_id}")["finished_at"]:
                _give_up_after(give_up, f"run {run_id}")
                took.append(_until_it_is_there(ground, small, name, reader))
                time.sleep(random.uniform(0, PAUSE))
            run = ground.wait(run_id)
            fan_outs.append(_seconds(run))
            assert run["state"] == "succeeded", run["error"]
    return {
        "members": members,
        "fan_out_s": round(statistics.median(fan_outs), 2),
        "mentions": len(took),
        "p50_s": _percentile(took, 50),
        "p95_s": _percentile(took, 95),
        "max_s": _percentile(took, 100),
        "without_fan_out_p50_s": _percentile(alone, 50),
        "edit_of_the_large_one_max_s": _percentile(edits, 100),
    }


def _until_it_is_there(ground: Ground, small: dict[str, Any], name: str, reader: Client) -> float:
    began, give_up = time.perf_counter(), time.monotonic() + PATIENCE
    message_id = ground.post(small, f"@{name}")["id"]
    while (page := reader.get("/api/notifications?limit=1")["items"])[:1] == [] or page[0]["message_id"] != message_id:
        _give_up_after(give_up, f"message {message_id} to be in the inbox")
        time.sleep(0.01)
    return time.perf_counter() - began


def stop(ground: Ground, members: int, _: int) -> dict[str, Any]:
    """SIGTERM for the only worker in the midst of a fan-out to so many members; then another one comes."""
    large = ground.community(members)
    with ground.workers(1) as (worker,):
        run_id = ground.post(large, "gold breaks out")["run"]["id"]
        ground.wait(run_id, lambda run: run["progress"]["done"] > members / 4)
        began = time.perf_counter()
        worker.process.send_signal(signal.SIGTERM)
        status = worker.process.wait(60)
        ended = time.perf_counter() - began
    stopped = ground.client.get(f"/api/runs/{run_id}")
    with ground.workers(1):
        run = ground.wait(run_id)
    assert run["state"] == "succeeded", run["error"]
    return {
        "members": members,
        "exit_code": status,
        "ended_after_s": round(ended, 2),
        "done_when_it_ended": stopped["progress"]["done"],
        "done_in_the_end": run["progress"]["done"],
        "attempts": run["attempts"],
    }


def outage(ground: Ground, _: int, __: int) -> dict[str, Any]:
    """100 posts while Redis is down; it comes back empty."""
    small = ground.community(50)
    with ground.workers(2):
        ground.wait(ground.post(small, "warm")["run"]["id"])
        valkey.stop(ground.data_dir, ground.sockets)
        took = []
        runs = []
        for number in range(100):
            began = time.perf_counter()
            message = ground.post(small, f"gold {number}")
            took.append(time.perf_counter() - began)
            assert message["run"]["state"] == "pending", message
            runs.append(message["run"]["id"])
        valkey.start(ground.data_dir, ground.sockets)
        _redis(ground).flushall()
        back = time.perf_counter()
        for run_id in runs:
            assert ground.wait(run_id)["state"] == "succeeded"
    return {
        "posts": len(runs),
        "post_p50_ms": _percentile(took, 50, 1000),
        "post_max_ms": _percentile(took, 100, 1000),
        "all_done_after_it_was_back_s": round(time.perf_counter() - back, 2),
    }


def backlog(ground: Ground, _: int, posts: int) -> dict[str, Any]:
    """So many posts while no worker runs, by four authors at once; then two workers come."""
    small = ground.community(20)
    client = _redis(ground)
    empty, took, lock = _used(client), [], threading.Lock()
    most = empty

    def author(_: int) -> None:
        began = time.perf_counter()
        ground.post(small, "gold")
        with lock:
            took.append(time.perf_counter() - began)

    with ThreadPoolExecutor(4) as authors:
        for first in range(0, posts, 1000):
            asked.check()
            list(authors.map(author, range(min(1000, posts - first))))
            most = max(most, _used(client))
            say(f"  {first + 1000:,} posted, {_used(client) / 2**20:.1f} MiB in Redis")
    waiting = client.llen("rq:queue:notifications")
    began = time.perf_counter()
    with ground.workers(2):
        left, give_up = _unfinished(), time.monotonic() + PATIENCE
        while left:
            say(f"  {left:,} runs to go")
            most = max(most, _used(client))
            asked.sleep(10)
            before, left = left, _unfinished()
            if left < before:
                give_up = time.monotonic() + PATIENCE
            _give_up_after(give_up, f"{left:,} runs")
    edge = max(100, posts // 20)
    return {
        "posts": posts,
        "post_first_p50_ms": _percentile(took[:edge], 50, 1000),
        "post_first_p99_ms": _percentile(took[:edge], 99, 1000),
        "post_last_p50_ms": _percentile(took[-edge:], 50, 1000),
        "post_last_p99_ms": _percentile(took[-edge:], 99, 1000),
        "jobs_in_redis": waiting,
        "redis_most_mib": round((most - empty) / 2**20, 1),
        "redis_bytes_a_job": round((most - empty) / max(1, waiting)),
        "all_done_after_s": round(time.perf_counter() - began),
    }


def _give_up_after(when: float, what: str) -> None:
    if time.monotonic() > when:
        raise CommandError(f"Waited {PATIENCE:.0f} s for {what}.")


def _unfinished() -> int:
    from belfry.fanout.runs import count_unfinished

    states = count_unfinished()["states"]
    return int(states["pending"] + states["queued"] + states["running"])


def _redis(ground: Ground) -> redis.Redis:
    return redis.Redis.from_url(ground.env["REDIS_URL"])


def _used(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _seconds(run: dict[str, Any]) -> float:
    from datetime import datetime

    begun, finished = (datetime.fromisoformat(run[name]) for name in ("started_at", "finished_at"))
    return (finished - begun).total_seconds()


def _percentile(seconds: list[float], percent: int, factor: int = 1) -> float:
    return round(sorted(seconds)[max(0, round(len(seconds) * percent / 100) - 1)] * factor, 3)


DRILLS = {
    drill.__name__: drill
    for drill in (mention, stop, outage, backlog, reconnect, cleanup, rendering, slow_clients, verify)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*DRILLS, []], help="which; all of them unless given")
    parser.add_argument("--members", type=int, default=1_000_000, help="of the large audience (1000000)")
    parser.add_argument("--posts", type=int, default=100_000, help="of the backlog (100000)")
    arguments = parser.parse_args()
    asked.listen()
    try:
        return _drill(arguments)
    except asked.Stopped as stopped:
        return 128 + stopped.signum
    except CommandError as error:
        say(str(error))
        return 1


def _drill(arguments: argparse.Namespace) -> int:
    results = {}
    with _ground() as ground:
        from belfry.integrity import verification  # reads the environment that was just made

        for name in arguments.names or DRILLS:
            say(f"{name}: {' '.join((DRILLS[name].__doc__ or '').split())}")
            results[name] = DRILLS[name](ground, arguments.members, arguments.posts)
            findings = verification.verify()
            assert findings == [], findings
            for figure, value in results[name].items():
                say(f"  {figure:30} {value}")
    say(json.dumps(results))
    return 0


@contextmanager
def _ground() -> Iterator[Ground]:
    if named():
        raise CommandError("It stops its servers: it starts its own. Unset DATABASE_URL and REDIS_URL.")
    with ExitStack() as stage:
        listening = stage.enter_context(ports.listen())
        data_dir = stage.enter_context(temporary_data_dir())
        env = stack.environment(stage.enter_context(servers(data_dir)), ports.address_of(listening))
        env |= {"RATE_LIMIT_MESSAGES": "1000000 per minute", "RATE_LIMIT_DEFAULT": "10000000 per minute"}
        env |= {"LOG_LEVEL": "WARNING"}
        os.environ.update(env)
        stack.migrate(env)
        stage.enter_context(stack.web(env, listening, data_dir / "web.log"))
        yield Ground(data_dir, env, ports.address_of(listening))


if __name__ == "__main__":
    sys.exit(main())
