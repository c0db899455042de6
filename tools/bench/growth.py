"""A part of `make bench`: growth with the audience, and with the number of servers.

- One message to 1,000 members, and to ten, a hundred and a thousand times as many, end to end, with one worker and two.
- The same number of messages at once to one server of 57, and to 100 such servers: from the first enqueueing to the
  last committed row, by one worker and by two, which are running and warm.
"""

import argparse
import statistics
import time
from typing import Any

from belfry.core.db import fetch_one
from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from tools.bench.harness import SERVERS, TIMEOUT_SECONDS, BenchHarness
from tools.bench.large import end_to_end
from tools.bench.small import queued_runs
from tools.dev import say, signals
from tools.dev.processes import Child

RUNS = 3
BURST = 4_000  # messages at once: less than a queue holds


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"audiences": {workers: {members: figures}}, "servers": {workers: {servers: messages a second}}}."""
    found: dict[str, Any] = {"audiences": {}, "servers": {}, "messages": BURST, "runs": RUNS}
    with harness.web():
        for number in (1, 2):
            with harness.workers(number) as workers:
                found["audiences"][number] = {
                    members: _audience(harness, members, workers) for members in sorted(harness.large_channels)
                }
                say(f"{BURST:,} messages at once, {number} worker(s)")
                rates: dict[int, list[float]] = {1: [], SERVERS: []}
                for _ in range(RUNS):
                    for servers, all_ in rates.items():
                        all_.append(_burst(harness, harness.small_channels[:servers]))
                found["servers"][number] = {servers: round(statistics.median(all_)) for servers, all_ in rates.items()}
    return found


def _audience(harness: BenchHarness, members: int, workers: list[Child]) -> dict[str, float]:
    say(f"one message to {members:,}, {len(workers)} worker(s)")
    runs = RUNS if members <= 100_000 else 1
    all_ = [end_to_end(harness, harness.large_channels[members], workers) for _ in range(runs)]
    return {
        "s": round(statistics.median(one["s"] for one in all_), 4),
        "rows_per_s": round(statistics.median(one["rows"] / one["s"] for one in all_)),
        "cpu_s": round(statistics.median(one["cpu_s"] for one in all_), 2),
        "pss_mib": round(max(one["pss_mib"] for one in all_), 1),
    }


def _burst(harness: BenchHarness, channel_ids: list[int]) -> float:
    """Return the messages a second."""
    harness.delete_notifications()
    ids = harness.insert_messages(channel_ids, BURST // len(channel_ids))
    parts = [WorkItem(run_id) for run_id in queued_runs(ids)]
    began = time.perf_counter()
    assert queues.enqueue(parts)
    signals.wait_until(_all_finished, "the runs", TIMEOUT_SECONDS, 0.01)
    took = time.perf_counter() - began
    found = fetch_one(
        "SELECT count(*) AS done, sum(notifications_inserted) AS added"
        " FROM run WHERE state = 'succeeded' AND message_id = ANY(%(ids)s)",
        {"ids": ids},
    )
    assert found == {"done": len(ids), "added": harness.count_notifications()}, found
    return len(ids) / took


def _all_finished() -> bool:
    return not fetch_one("SELECT id FROM run WHERE state IN ('pending', 'queued', 'running') LIMIT 1")


def table(results: dict[str, Any]) -> str:
    """Format the results."""
    one, two = (results["audiences"][workers] for workers in ("1", "2"))
    lines = [
        f"One message end to end; medians of {results['runs']}, above 100,000 once",
        f"  {'members':>10} {'one worker':>12} {'rows/s':>10} {'two workers':>13} {'rows/s':>10}",
    ]
    for members in sorted(one, key=int):
        seconds = f"{one[members]['s']:10.3f} s {one[members]['rows_per_s']:10,}"
        lines.append(f"  {int(members):10,} {seconds} {two[members]['s']:11.3f} s {two[members]['rows_per_s']:10,}")
    lines.append(f"{results['messages']:,} messages at once, messages/s through the queue")
    for servers in sorted(results["servers"]["1"], key=int):
        rates = [results["servers"][workers][servers] for workers in ("1", "2")]
        lines.append(f"  to {int(servers):3} server(s)      one worker {rates[0]:7,}    two workers {rates[1]:7,}")
    return "\n".join(lines)
