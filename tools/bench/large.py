"""A part of `make bench`: one message to a large audience, compared with a lower limit and with usual solutions.

Each is measured in turn, into an empty table, and the rows are counted:

- the limit: Belfry's own INSERT … SELECT as one statement, into the same table, without a run or its statistics;
- Belfry end to end, with one worker and with two: from sending the POST until another connection sees the finished run;
- the same statement into a table with the usual four indexes;
- django-notifications-hq, `notify.send`; to fewer users, because it inserts the rows one by one.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import psycopg

from belfry.fanout import decision
from tools.bench import machine
from tools.bench.harness import BenchHarness
from tools.bench.measuring import compare
from tools.bench.peer_processes import start_peers
from tools.dev import say
from tools.dev.processes import Child

LIMIT, FOUR, DJANGO = "limit", "four indexes", "django"
BELFRY = {1: "Belfry, one worker", 2: "Belfry, two workers"}
NAMES = {
    LIMIT: "one statement, by psycopg (limit)",
    FOUR: "that statement, four usual indexes",
    DJANGO: "django-notifications-hq",
    **{name: name for name in BELFRY.values()},
}
TARGETS = {LIMIT: 0.9, FOUR: 1.5, DJANGO: 50.0}
"""Targets: Belfry's rows a second, divided by theirs."""
MEMORY_TARGET = 1.1  # the largest peak of a work-horse, divided by the smallest

_NOTIFY_DECISIONS = ", ".join(f"'{reason}'" for reason in decision.NOTIFY_DECISIONS)
BARE_STATEMENT = (
    "INSERT INTO notification (user_id, message_id, reason)"
    f" SELECT user_id, %(message_id)s, decision::reason FROM ({decision.DECISIONS_SQL}) decided"
    f" WHERE decision IN ({_NOTIFY_DECISIONS})"
    " ON CONFLICT (user_id, message_id) DO NOTHING"
)
"""The notifications of one message by Belfry's own rules, without statistics, progress or a run. For
`Subject.parameters`."""
AS_BELFRY = "SET jit = off; SET plan_cache_mode = force_custom_plan"  # the settings of its connections

_FOUR_INDEXES = """
    CREATE TABLE bench_notification (
        LIKE notification INCLUDING DEFAULTS,
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        UNIQUE (user_id, message_id)
    );
    CREATE INDEX bench_notification_inbox ON bench_notification (user_id, created_at DESC);
    CREATE INDEX bench_notification_unread ON bench_notification (user_id) WHERE read_at IS NULL;
"""


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"people", "sizes": {members: figures}, "horse_peak_mib": {members: MiB}}; seconds, rows a second, MiB."""
    with (
        psycopg.connect(harness.env["DATABASE_URL"], autocommit=True) as connection,
        _django(harness, arguments.users) as by_django,
        harness.web(),
    ):
        connection.execute(AS_BELFRY)
        connection.execute(_FOUR_INDEXES)
        for table in ("notification", "bench_notification"):  # the first statement of a connection is slow
            _by_statement(harness, connection, harness.warm_up_channel, table)
        sizes = {
            members: _rounds(harness, connection, by_django, members, _runs(members, arguments.runs))
            for members in arguments.members
        }
        connection.execute("DROP TABLE bench_notification")
        few = 1_000
        with harness.workers(1, large=False) as workers:
            peak = end_to_end(harness, harness.large_channels[few], workers)["horse_peak_mib"]
    peaks = {few: round(peak, 1)} | {members: figures.pop("horse_peak_mib") for members, figures in sizes.items()}
    return {"people": arguments.users, "sizes": sizes, "horse_peak_mib": peaks}


def _runs(members: int, asked: int | None) -> int:
    return asked or (5 if members <= 100_000 else 3)


def _rounds(
    harness: BenchHarness, connection: Any, by_django: Callable[[], dict[str, float]], members: int, runs: int
) -> dict[str, Any]:
    channel_id = harness.large_channels[members]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for number in range(runs):
        say(f"one message to {members:,}: {number + 1} of {runs}")
        found[LIMIT].append(_by_statement(harness, connection, channel_id, "notification"))
        for workers, name in BELFRY.items():
            with harness.workers(workers) as children:
                found[name].append(end_to_end(harness, channel_id, children, int(found[LIMIT][0]["rows"])))
        found[FOUR].append(_by_statement(harness, connection, channel_id, "bench_notification"))
        found[DJANGO].append(by_django())
        assert found[FOUR][-1]["rows"] == found[LIMIT][-1]["rows"] == found[LIMIT][0]["rows"]
    return {
        "runs": runs,
        "rows": int(found[LIMIT][0]["rows"]),
        "figures": {name: _medians(all_) for name, all_ in found.items()},
        "ratios": {name: {other: _ratio(found[name], found[other]) for other in TARGETS} for name in BELFRY.values()},
        "horse_peak_mib": round(max(one["horse_peak_mib"] for name in BELFRY.values() for one in found[name]), 1),
    }


def _medians(all_: list[dict[str, float]]) -> dict[str, Any]:
    used = {
        name: round(statistics.median(one[name] for one in all_), 2)
        for name in ("cpu_s", "pss_mib", "postgres_cpu_s")
        if name in all_[0]
    }
    return {
        "s": round(statistics.median(one["s"] for one in all_), 3),
        "all_s": [round(one["s"], 3) for one in all_],
        "rows_per_s": round(statistics.median(one["rows"] / one["s"] for one in all_)),
        **used,
    }


def _ratio(ours: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """Return the median of pairs of our rows a second, divided by theirs."""
    pairs = zip(ours, others, strict=True)
    return round(statistics.median(one["rows"] / one["s"] / (other["rows"] / other["s"]) for one, other in pairs), 3)


def _by_statement(harness: BenchHarness, connection: Any, channel_id: int, table: str) -> dict[str, float]:
    """Execute BARE_STATEMENT for one of the tables."""
    connection.execute("TRUNCATE bench_notification")
    harness.delete_notifications()
    (message_id,) = harness.insert_messages([channel_id])
    subject = decision.load_fanout_message(message_id)
    assert subject is not None
    server, statement = machine.postmaster(connection), BARE_STATEMENT.replace("INTO notification", f"INTO {table}")
    before, began = machine.cpu_of(server), time.perf_counter()
    rows = connection.execute(statement, subject.parameters()).rowcount
    took = time.perf_counter() - began
    return {"rows": rows, "s": took, "postgres_cpu_s": machine.cpu_of(server) - before}


def end_to_end(
    harness: BenchHarness, channel_id: int, workers: list[Child], expected: int | None = None
) -> dict[str, float]:
    """Post one message and wait for its run. `harness.web` must run. Returns {"rows", "s", "cpu_s", "pss_mib",
    "postgres_cpu_s", "horse_peak_mib"}; checks the number of rows, if it is `expected`."""
    pids = [worker.process.pid for worker in workers]
    server = machine.postmaster(harness.reader)
    harness.delete_notifications()
    with machine.watch(pids) as used:
        before, began = machine.cpu_of(server), time.perf_counter()
        message_id = harness.post(channel_id)["id"]
        run = harness.wait_for_commit(message_id)
        took = time.perf_counter() - began
        by_server = machine.cpu_of(server) - before
    there = harness.count_notifications(message_id)
    inserted = run["notifications_inserted"]
    assert there == inserted == (there if expected is None else expected), (there, inserted, expected)
    horses = [horse.pid for pid in pids for horse in psutil.Process(pid).children()]
    peak = max(map(machine.peak_of, horses))
    return {"rows": there, "s": took, "postgres_cpu_s": by_server, "horse_peak_mib": peak, **used}


@contextmanager
def _django(harness: BenchHarness, users: int) -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that sends a message to that many users by django-notifications-hq, in its own schema."""
    with start_peers(harness, "django") as start:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = start("python", "peer_django.py", str(users), **pipes)

        def send() -> dict[str, float]:
            server = machine.postmaster(harness.reader)
            with machine.watch([process.pid]) as used:
                before = machine.cpu_of(server)
                process.send("\n")
                seconds = float(process.receive())
                by_server = machine.cpu_of(server) - before
            return {"rows": users, "s": seconds, "postgres_cpu_s": by_server, **used}

        assert process.receive() == "ready"
        yield send
        harness.reader.execute("DROP SCHEMA django_peer CASCADE")


def table(results: dict[str, Any]) -> str:
    """Format the results."""
    lines = []
    for members, found in results["sizes"].items():
        lines += [
            f"One message to {int(members):,} members, {found['rows']:,} notified; medians of {found['runs']}",
            f"  {'':38} {'seconds':>8} {'rows/s':>9}   {'own CPU':>9} {'PostgreSQL':>11} {'PSS MiB':>8}",
        ]
        for name, label in NAMES.items():
            one = found["figures"][name]
            label += f", to {results['people']:,}" if name == DJANGO else ""
            ours = f"{one['cpu_s']:7.2f} s" if "cpu_s" in one else " " * 9
            memory = f"{one['pss_mib']:8.1f}" if "pss_mib" in one else ""
            lines.append(
                f"  {label:38} {one['s']:8.3f} {one['rows_per_s']:9,}   {ours} {one['postgres_cpu_s']:9.2f} s {memory}"
            )
        lines.append(f"  Belfry to {'':28} {'target':>8} {'one worker':>15} {'two workers':>17}")
        for other, target in TARGETS.items():
            one, two = (compare(found["ratios"][name][other], target) for name in BELFRY.values())
            lines.append(f"  {NAMES[other]:38} {f'>= {target:g}':>8} {one:>15} {two:>17}")
        lines.append("")
    peaks = {int(members): mib for members, mib in results["horse_peak_mib"].items()}
    figures = ", ".join(f"{mib:.1f} MiB for {members:,}" for members, mib in sorted(peaks.items()))
    most = max(peaks.values()) / min(peaks.values())
    lines.append(
        f"Peak of the work-horse, by members: {figures}; largest to smallest (target: <= {MEMORY_TARGET})"
        f" {compare(most, MEMORY_TARGET, at_most=True)}"
    )
    return "\n".join(lines)
