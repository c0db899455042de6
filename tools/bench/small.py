"""A part of `make bench`: many small messages, processed by Belfry's worker, a loop and the peers.

All process the same messages to the same server of 57, in a database with all the other servers, into an empty table,
with one worker process: the statement in a loop without a queue; Belfry; and RQ's default worker and its SimpleWorker,
Celery, Dramatiq and Huey with that statement as their task, each in its own environment.

- A rate is measured from the first committed notification to the last, so it does not include the start of a process.
- A lone message is measured from enqueueing until another connection sees its rows. The workers alternate in ROUNDS,
  each in a new process that has processed WARM_UP messages before.

The rows are counted each time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import psycopg

from belfry.core.db import execute, fetch_all, fetch_one
from belfry.fanout import decision
from tools.bench import machine
from tools.bench.harness import POLL_SECONDS, TIMEOUT_SECONDS, WARM_UP, BenchHarness
from tools.bench.large import AS_BELFRY, BARE_STATEMENT
from tools.bench.measuring import compare
from tools.bench.peer_processes import WORKERS, queue_peer
from tools.dev import CommandError, say, signals, stack

LOOP, BELFRY, SIMPLE = "the statement in a loop, no queue", "Belfry", "RQ, SimpleWorker"
FEWER = {"RQ, default worker": 40, SIMPLE: 10, "Celery, prefork": 2}  # divisors; all messages take minutes
ROUNDS = 3
RATE_TARGET = 3.3  # times the rate of the loop
LONE_TARGET = 1.1  # times the p50 of RQ's SimpleWorker
PAUSE = 0.05  # seconds between two lone messages


class Small:
    """A small server, and messages to it without notifications."""

    def __init__(self, harness: BenchHarness) -> None:
        self.harness, self.channel_id = harness, harness.small_channels[0]
        (message_id,) = self.messages(1)
        subject = decision.load_fanout_message(message_id)
        assert subject is not None
        self.parameters = subject.parameters()
        statement = {"sql": BARE_STATEMENT, "parameters": self.parameters}
        (harness.data_dir / "statement.json").write_text(json.dumps(statement))
        execute(BARE_STATEMENT, self.parameters)
        self.recipients = harness.count_notifications()
        found = fetch_one("SELECT min(user_id) AS first FROM notification")
        assert found is not None
        self.first_recipient = found["first"]  # the rows of a message are committed together

    def messages(self, number: int) -> list[int]:
        self.harness.delete_notifications()
        execute("TRUNCATE run CASCADE")
        return self.harness.insert_messages([self.channel_id], number)

    def done(self, message_id: int | None = None) -> int:
        """Count the messages with notifications, or this one, by the rows of one recipient: to count all rows would
        use CPU time that the measured processes need."""
        query = "SELECT count(*) AS number FROM notification WHERE user_id = %s"
        which = () if message_id is None else (message_id,)
        found = self.harness.reader.execute(
            query + " AND message_id = %s" * len(which), (self.first_recipient, *which)
        ).fetchone()
        assert found is not None
        return int(found["number"])

    def rate(self, messages: int, pids: list[int]) -> dict[str, float]:
        """Return the messages a second, from the first commit to the last, and what the processes used meanwhile."""
        first = signals.wait_until(self.done, "the first message", TIMEOUT_SECONDS, POLL_SECONDS)
        began = time.perf_counter()
        with machine.watch(pids) as used:
            signals.wait_until(lambda: self.done() >= messages, "all messages", TIMEOUT_SECONDS, 0.005)
            took = time.perf_counter() - began
        self.check(messages)
        counted = messages - first
        if not counted:
            raise CommandError(f"{messages} messages were notified between two polls: use more --messages.")
        return {
            "rate": counted / took,
            "cpu_ms": used["cpu_s"] * 1000 / counted,
            "cpu_s": machine.cpu_of(pids),
            "pss_mib": used["pss_mib"],
        }

    def check(self, messages: int) -> None:
        there = self.harness.count_notifications()
        assert there == messages * self.recipients, (there, messages, self.recipients)

    def lone(self, enqueue: Callable[[int], object], message_ids: list[int]) -> list[float]:
        """Return the seconds of each message, without the first WARM_UP."""
        took = []
        for message_id in message_ids:
            began = time.perf_counter()
            enqueue(message_id)
            is_done = partial(self.done, message_id)
            signals.wait_until(is_done, f"message {message_id}", TIMEOUT_SECONDS, 0.0002)
            took.append(time.perf_counter() - began)
            time.sleep(PAUSE)
        self.check(len(message_ids))
        return took[WARM_UP:]


def loop_rate(small: Small, messages: int) -> dict[str, float]:
    """Execute the statement for one message after the other, each in its own transaction."""
    ids = small.messages(messages)
    with psycopg.connect(small.harness.env["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(AS_BELFRY)
        began = time.perf_counter()
        for message_id in ids:
            connection.execute(BARE_STATEMENT, {**small.parameters, "message_id": message_id})
        took = time.perf_counter() - began
    small.check(messages)
    return {"rate": messages / took}


def queued_runs(message_ids: Iterable[int]) -> list[int]:
    """Insert a run for each message, as the POST does."""
    statement = (
        "INSERT INTO run (message_id, kind, state) SELECT unnest(%(ids)s::bigint[]), 'message', 'queued' RETURNING id"
    )
    return [one["id"] for one in fetch_all(statement, {"ids": list(message_ids)})]


def belfry_rate(small: Small, messages: int) -> dict[str, float]:
    """All are in the queue before the worker starts. The time includes the states and statistics of the runs."""
    from belfry.fanout.claims import WorkItem
    from belfry.queue import queues

    assert queues.enqueue([WorkItem(run_id) for run_id in queued_runs(small.messages(messages))], lost=True)
    with stack.worker(small.harness.env, small.harness.data_dir / "worker.log") as worker:
        found = small.rate(messages, [worker.process.pid])
    assert fetch_one("SELECT count(*) AS done FROM run WHERE state = 'succeeded'") == {"done": messages}
    return found


def belfry_lone(small: Small, number: int) -> list[float]:
    from belfry.queue import queues

    ids = small.messages(number + WARM_UP)
    runs = dict(zip(ids, queued_runs(ids), strict=True))
    with stack.worker(small.harness.env, small.harness.data_dir / "worker.log"):
        return small.lone(lambda message_id: queues.enqueue_run(runs[message_id]), ids)


def peer_rate(small: Small, name: str, messages: int) -> dict[str, float]:
    with queue_peer(small.harness, name) as (enqueue, start_worker):
        enqueue(small.messages(messages))
        return small.rate(messages, [start_worker()])


def peer_lone(small: Small, name: str, number: int) -> list[float]:
    with queue_peer(small.harness, name) as (enqueue, start_worker):
        ids = small.messages(number + WARM_UP)
        start_worker()
        return small.lone(lambda message_id: enqueue([message_id], wait=False), ids)


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all of them in turn; returns the medians of the rates, and of the times of a lone message."""
    small, messages = Small(harness), arguments.messages
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in (LOOP, BELFRY, *WORKERS)}
    counts = {name: max(20, messages // FEWER.get(name, 1)) for name in rates}
    for repeat in range(arguments.repeats):
        say(f"small messages: {repeat + 1} of {arguments.repeats}")
        rates[LOOP].append(loop_rate(small, messages))
        rates[BELFRY].append(belfry_rate(small, messages))
        for name in WORKERS:
            rates[name].append(peer_rate(small, name, counts[name]))
    times: dict[str, list[list[float]]] = {name: [] for name in (BELFRY, *WORKERS)}
    each = max(1, arguments.lone // ROUNDS)
    for number in range(ROUNDS):
        say(f"lone messages: {number + 1} of {ROUNDS}")
        times[BELFRY].append(belfry_lone(small, each))
        for name in WORKERS:
            times[name].append(peer_lone(small, name, each))
    ratios = [ours["rate"] / loop["rate"] for ours, loop in zip(rates[BELFRY], rates[LOOP], strict=True)]
    lone_ratios = [
        statistics.median(ours) / statistics.median(simple)
        for ours, simple in zip(times[BELFRY], times[SIMPLE], strict=True)
    ]
    return {
        "recipients": small.recipients,
        "messages": messages,
        "beside": max(harness.large_channels),
        "lone": each * ROUNDS,
        "ratio_to_the_loop": round(statistics.median(ratios), 2),
        "lone_ratio_to_simple": round(statistics.median(lone_ratios), 2),
        "messages_per_s": {name: _medians(all_) | {"messages": counts[name]} for name, all_ in rates.items()},
        "lone_ms": {
            name: {
                "p50": round(statistics.median(chain(*rounds)) * 1000, 2),
                "p95": round(sorted(chain(*rounds))[int(each * ROUNDS * 0.95)] * 1000, 2),
                "p50_of_rounds": [round(statistics.median(one) * 1000, 2) for one in rounds],
            }
            for name, rounds in times.items()
        },
    }


def _medians(all_: list[dict[str, float]]) -> dict[str, float]:
    found = {
        "median": round(statistics.median(one["rate"] for one in all_), 1),
        "least": round(min(one["rate"] for one in all_), 1),
    }
    for name in ("cpu_ms", "cpu_s", "pss_mib"):
        if name in all_[0]:
            found[name] = round(statistics.median(one[name] for one in all_), 2)
    return found


def table(results: dict[str, Any]) -> str:
    """Format the results."""
    lone = results["lone_ms"]
    lines = [
        f"{results['messages']:,} messages to {results['recipients']} recipients each, one worker process, in a"
        f" database with a server of {results['beside']:,}",
        f"  {'':36} {'messages/s':>10} {'lone p50':>10} {'p95':>10} {'CPU a message':>14} {'PSS MiB':>8}",
    ]
    for name, found in results["messages_per_s"].items():
        label = name if found["messages"] == results["messages"] else f"{name} ({found['messages']:,})"
        times = f"{lone[name]['p50']:7.2f} ms {lone[name]['p95']:7.2f} ms" if name in lone else " " * 21
        used = f"{found['cpu_ms']:11.2f} ms {found['pss_mib']:8.1f}" if "cpu_ms" in found else ""
        lines.append(f"  {label:36} {found['median']:10,.0f} {times} {used}")
    return "\n".join(
        [
            *lines,
            f"  Belfry to the loop, median of pairs (target: >= {RATE_TARGET:g}):"
            f" {compare(results['ratio_to_the_loop'], RATE_TARGET)}",
            f"  p50 of a lone message to SimpleWorker's, median of rounds (target: <= {LONE_TARGET:g}):"
            f" {compare(results['lone_ratio_to_simple'], LONE_TARGET, at_most=True)}",
        ]
    )
