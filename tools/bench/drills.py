"""`make drill ARGS="mention stop outage backlog"`: measure Belfry when it is busy, broken or attacked.

Starts its own servers, runs `verify` after each drill, and prints the figures; the last line has all of them as JSON.
Without a name, it runs all drills.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis

from tools.bench.cleanup import cleanup
from tools.bench.reconnect import reconnect
from tools.bench.rendering import rendering
from tools.bench.slow_clients import slow_clients
from tools.bench.verify import verify
from tools.dev import CommandError, say, signals
from tools.dev.client import Client
from tools.dev.harness import TIMEOUT_SECONDS, UNDER_LOAD, Harness

PAUSE = 0.15  # seconds between two mentions
FANOUTS = 5  # during which mentions are posted: enough mentions for a p95


def mention(harness: Harness, members: int, _: int) -> dict[str, Any]:
    """A mention in another server while two workers process a message to many members: seconds until it is in the
    inbox, over HTTP."""
    from belfry.identity import users

    large = harness.create_server(members)["channel_ids"][0]
    small_server = harness.create_server(20)
    small, name = small_server["channel_ids"][0], small_server["usernames"][0]
    reader = harness.client_of(users.find_user_by_username(name))
    took: list[float] = []
    fan_outs, edits = [], []
    with harness.workers(2):
        harness.wait_for_run(harness.post(small)["run"]["id"])
        alone = [_seconds_to_inbox(harness, small, name, reader) for _ in range(20)]
        for turn in range(FANOUTS):
            say(f"  fan-out to {members:,}: {turn + 1} of {FANOUTS}")
            message = harness.post(large, "gold breaks out")
            run_id = message["run"]["id"]
            harness.wait_for_run(run_id, lambda run: run["progress"]["done"] > 0)
            began = time.perf_counter()
            harness.client.patch(f"/api/messages/{message['id']}", {"content": "silver breaks out"})
            edits.append(time.perf_counter() - began)
            while not harness.client.get(f"/api/runs/{run_id}")["finished_at"]:
                took.append(_seconds_to_inbox(harness, small, name, reader))
                signals.sleep(random.uniform(0, PAUSE))
            run = harness.wait_for_run(run_id)
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


def _seconds_to_inbox(harness: Harness, channel_id: int, name: str, reader: Client) -> float:
    """Mention the user; returns the seconds until the notification is the first item of their inbox."""
    began = time.perf_counter()
    message_id = harness.post(channel_id, f"@{name}")["id"]

    def is_first() -> bool:
        items = reader.get("/api/notifications?limit=1")["items"]
        return bool(items) and items[0]["message_id"] == message_id

    signals.wait_until(is_first, f"message {message_id} in the inbox", TIMEOUT_SECONDS, 0.01)
    return time.perf_counter() - began


def stop(harness: Harness, members: int, _: int) -> dict[str, Any]:
    """SIGTERM for the only worker during a fan-out to many members; then another worker starts."""
    large = harness.create_server(members)["channel_ids"][0]
    with harness.workers(1) as (worker,):
        run_id = harness.post(large, "gold breaks out")["run"]["id"]
        harness.wait_for_run(run_id, lambda run: run["progress"]["done"] > members / 4)
        began = time.perf_counter()
        worker.process.send_signal(signal.SIGTERM)
        status = worker.process.wait(60)
        ended = time.perf_counter() - began
    stopped = harness.client.get(f"/api/runs/{run_id}")
    with harness.workers(1):
        run = harness.wait_for_run(run_id)
    assert run["state"] == "succeeded", run["error"]
    return {
        "members": members,
        "exit_code": status,
        "ended_after_s": round(ended, 2),
        "done_when_it_ended": stopped["progress"]["done"],
        "done_in_the_end": run["progress"]["done"],
        "attempts": run["attempts"],
    }


def outage(harness: Harness, _: int, __: int) -> dict[str, Any]:
    """100 posts while Redis is down; it returns empty."""
    small = harness.create_server(50)["channel_ids"][0]
    with harness.workers(2):
        harness.wait_for_run(harness.post(small)["run"]["id"])
        harness.stop_redis()
        took = []
        runs = []
        for number in range(100):
            began = time.perf_counter()
            message = harness.post(small, f"gold {number}")
            took.append(time.perf_counter() - began)
            assert message["run"]["state"] == "pending", message
            runs.append(message["run"]["id"])
        harness.start_redis(empty=True)
        back = time.perf_counter()
        for run_id in runs:
            assert harness.wait_for_run(run_id)["state"] == "succeeded"
    return {
        "posts": len(runs),
        "post_p50_ms": _percentile(took, 50, 1000),
        "post_max_ms": _percentile(took, 100, 1000),
        "all_done_after_it_was_back_s": round(time.perf_counter() - back, 2),
    }


def backlog(harness: Harness, _: int, posts: int) -> dict[str, Any]:
    """Posts by four authors at once while no worker runs; then two workers start."""
    small = harness.create_server(20)["channel_ids"][0]
    client = harness.redis()
    empty, took, lock = _used(client), [], threading.Lock()
    most = empty

    def author(_: int) -> None:
        began = time.perf_counter()
        harness.post(small, "gold")
        with lock:
            took.append(time.perf_counter() - began)

    with ThreadPoolExecutor(4) as authors:
        for first in range(0, posts, 1000):
            signals.check()
            list(authors.map(author, range(min(1000, posts - first))))
            most = max(most, _used(client))
            say(f"  {first + 1000:,} posted, {_used(client) / 2**20:.1f} MiB in Redis")
    waiting = client.llen("rq:queue:notifications")
    began = time.perf_counter()
    with harness.workers(2):
        left, deadline = _unfinished(), time.monotonic() + TIMEOUT_SECONDS
        while left:
            say(f"  {left:,} unfinished runs")
            most = max(most, _used(client))
            signals.sleep(10)
            before, left = left, _unfinished()
            if left < before:
                deadline = time.monotonic() + TIMEOUT_SECONDS
            if time.monotonic() > deadline:
                raise CommandError(f"No run finished for {TIMEOUT_SECONDS:.0f} s; {left:,} are unfinished.")
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


def _unfinished() -> int:
    from belfry.fanout.runs import count_unfinished

    states = count_unfinished()["states"]
    return int(states["pending"] + states["queued"] + states["running"])


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
    parser.add_argument("names", nargs="*", choices=[*DRILLS, []], help="drills to run (all)")
    parser.add_argument("--members", type=int, default=1_000_000, help="members of the large server (%(default)s)")
    parser.add_argument("--posts", type=int, default=100_000, help="posts of the backlog (%(default)s)")
    arguments = parser.parse_args()
    return signals.exit_status(lambda: _drill(arguments))


def _drill(arguments: argparse.Namespace) -> int:
    results = {}
    with Harness.start("drill", UNDER_LOAD, stops_servers=True) as harness, harness.web():
        from belfry.integrity import verification  # reads the environment that was just made

        for name in arguments.names or DRILLS:
            say(f"{name}: {' '.join((DRILLS[name].__doc__ or '').split())}")
            results[name] = DRILLS[name](harness, arguments.members, arguments.posts)
            findings = verification.verify()
            assert findings == [], findings
            for figure, value in results[name].items():
                say(f"  {figure:30} {value}")
    say(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
