"""A part of `make bench`: the table of notifications, empty and with 50,000,000 rows in it.

- Messages to 100,000, one after another, end to end by one worker: each into an empty table; a partition of them,
  starting with an empty table; and a partition of them, starting with all those rows.
- A page of the inbox and the unread count over HTTP, of a user who has read all but the newest: with a few messages in
  the table, and with all those rows, of which 1 in 70,000 is the user's.
- Marking the notifications of one message as read, one by one, by fillfactor: the rate, the share of updates that
  needed no new index entry (HOT), and the rate of inserts.

The rows are inserted as Belfry does: partition by partition, PER_PARTITION messages each. This part runs last:
afterwards the table is empty, and ids of messages are high.
"""

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg

from belfry.core import partitions
from belfry.core.db import execute
from belfry.fanout import decision
from models import Notification
from tools.bench.harness import BenchHarness
from tools.bench.large import AS_BELFRY, BARE_STATEMENT
from tools.bench.measuring import compare, create_subscriber_tokens, fill_partition, maintain_partitions, time_requests
from tools.dev import say
from tools.dev.client import Client

PER_PARTITION = 15  # messages to 100,000 members, of whom 70,000 are notified: a million rows
EMPTY_RUNS = 8
READS = 250
WARM_UP = 400  # requests, after which each database connection has its plans, as in production
UNREAD = 10  # messages
MARKED = 3_000
RATE_TARGET, READ_TARGET = 0.85, 1.5


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"rows", "partitions", "empty_rows_per_s", "full_rows_per_s", "reads_ms", "marking"}."""
    members = 100_000 if 100_000 in harness.large_channels else max(harness.large_channels)
    channel_id = harness.large_channels[members]
    harness.delete_notifications()
    (user_id,), (token,) = create_subscriber_tokens(channel_id, 1)
    reader = Client(harness.address, token)
    reads: dict[str, dict[str, dict[str, float]]] = {}
    with harness.web(), harness.workers(1):
        say(f"one message to {members:,}, into an empty table")
        empty = [_notified(harness, channel_id, emptied=True) for _ in range(EMPTY_RUNS)]
        harness.delete_notifications()
        begun = [_notified(harness, channel_id) for _ in range(PER_PARTITION)]
    _mark_older_read(user_id, begun)
    reads["few"] = _reads(harness, reader)
    marking = _marking(harness, channel_id)
    filled, seconds = _fill(harness, channel_id, members, arguments.rows)
    with harness.web(), harness.workers(1, large=False):
        say(f"one message to {members:,}, into a table of {filled:,}")
        full = [_notified(harness, channel_id) for _ in range(PER_PARTITION)]
    _mark_older_read(user_id, full)
    reads["many"] = _reads(harness, reader)
    number = len(partitions.list_partitions())
    execute("TRUNCATE notification")
    return {
        "members": members,
        "rows": filled,
        "fill_s": round(seconds),
        "partitions": number,
        "empty_rows_per_s": [round(one["rows_per_s"]) for one in empty],
        "begun_rows_per_s": [round(one["rows_per_s"]) for one in begun],
        "full_rows_per_s": [round(one["rows_per_s"]) for one in full],
        "reads_ms": reads,
        "marking": marking,
    }


def _notified(harness: BenchHarness, channel_id: int, *, emptied: bool = False) -> dict[str, Any]:
    """Measure one message end to end."""
    if emptied:
        harness.delete_notifications()
    began = time.perf_counter()
    message_id = harness.post(channel_id)["id"]
    run = harness.wait_for_commit(message_id)
    return {"message_id": message_id, "rows_per_s": run["notifications_inserted"] / (time.perf_counter() - began)}


def _mark_older_read(user_id: int, notified: list[dict[str, Any]]) -> None:
    execute(
        "UPDATE notification SET read_at = now() WHERE user_id = %(user_id)s AND message_id <= %(to)s",
        {"user_id": user_id, "to": notified[-UNREAD - 1]["message_id"]},
    )


def _reads(harness: BenchHarness, reader: Client) -> dict[str, dict[str, float]]:
    """Measure requests with a new web process: the plans of older database connections are those of another number of
    partitions. In production no connection is older than five minutes."""
    paths = {
        "own user": "/api/me",  # a request without notifications, for comparison
        "page of the inbox": "/api/notifications?limit=10",
        "unread count": "/api/notifications/unread-count",
    }
    with harness.web():
        unread = reader.get("/api/notifications/unread-count")["unread"]
        assert unread == UNREAD, unread
        return {name: time_requests(partial(reader.get, path), READS, warm_up=WARM_UP) for name, path in paths.items()}


def _fill(harness: BenchHarness, channel_id: int, members: int, rows: int) -> tuple[int, float]:
    """Insert so many read notifications, in partitions; returns their number, and the seconds it took."""
    execute("TRUNCATE notification")
    partitions.maintain()
    first = partitions.list_partitions()[-1].upper  # after the existing ones
    notified = members * 7 // 10
    number = max(1, round(rows / (notified * PER_PARTITION)))
    say(f"inserting {number * notified * PER_PARTITION:,} notifications in {number} partitions …")
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        bounds = [first + one * partitions.PARTITION_SPAN for one in range(number)]
        list(pool.map(lambda lower: _fill_partition(harness, channel_id, notified, lower), bounds))
    execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {first + number * partitions.PARTITION_SPAN}")
    maintain_partitions()
    execute("VACUUM (ANALYZE)")
    execute("CHECKPOINT")
    return harness.count_notifications(), time.perf_counter() - began


def _fill_partition(harness: BenchHarness, channel_id: int, notified: int, lower: int) -> None:
    here = {"channel_id": channel_id, "notified": notified, "lower": lower, "upper": lower + PER_PARTITION - 1}
    with psycopg.connect(harness.env["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "INSERT INTO message (id, channel_id, author_id, content)"
            " SELECT n, %(channel_id)s, %(author_id)s, 'gold'"
            " FROM generate_series(%(lower)s::bigint, %(upper)s::bigint) AS n",
            {**here, "author_id": harness.admin.id},
        )
    fill_partition(
        harness.env["DATABASE_URL"],
        lower,
        "SELECT user_id, message_id, now() AS read_at FROM ("
        "  SELECT m.user_id FROM member m JOIN channel c ON c.server_id = m.server_id WHERE c.id = %(channel_id)s"
        "  ORDER BY m.user_id LIMIT %(notified)s) people,"
        " generate_series(%(lower)s::bigint, %(upper)s::bigint) AS message_id",
        here,
    )


def _marking(harness: BenchHarness, channel_id: int) -> dict[int, dict[str, float]]:
    """Return for each fillfactor the rate of the bare statement, and of marking as read in random order."""
    found: dict[int, dict[str, float]] = {}
    with psycopg.connect(harness.env["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(AS_BELFRY)
        for fillfactor in (100, 90):
            say(f"marking read with fillfactor {fillfactor}")
            rates = []
            for _ in range(3):
                harness.delete_notifications()
                for one in partitions.list_partitions():
                    connection.execute(f"ALTER TABLE {one.name} SET (fillfactor = {fillfactor})")
                (message_id,) = harness.insert_messages([channel_id])
                subject = decision.load_fanout_message(message_id)
                assert subject is not None
                began = time.perf_counter()
                rows = connection.execute(BARE_STATEMENT, subject.parameters()).rowcount
                rates.append(rows / (time.perf_counter() - began))
            user_ids = [
                one[0]
                for one in connection.execute("SELECT user_id FROM notification WHERE message_id = %s", (message_id,))
            ]
            before = _updates(connection)
            began = time.perf_counter()
            for user_id in random.Random(1).sample(user_ids, min(MARKED, len(user_ids))):
                connection.execute(
                    "UPDATE notification SET read_at = now() WHERE user_id = %s AND message_id = %s",
                    (user_id, message_id),
                )
            took = time.perf_counter() - began
            updates, hot = (after - was for after, was in zip(_updates(connection), before, strict=True))
            found[fillfactor] = {
                "insert_rows_per_s": round(statistics.median(rates)),
                "marked_per_s": round(min(MARKED, len(user_ids)) / took),
                "hot_share": round(hot / max(1, updates), 3),
            }
        for one in partitions.list_partitions():
            connection.execute(f"ALTER TABLE {one.name} RESET (fillfactor)")
    Notification.truncate_table()
    return found


def _updates(connection: Any) -> tuple[int, int]:
    connection.execute("SELECT pg_stat_force_next_flush()")
    found = connection.execute(
        "SELECT sum(n_tup_upd)::bigint, sum(n_tup_hot_upd)::bigint FROM pg_stat_user_tables"
        " WHERE relname ~ '^notification_before_'"
    ).fetchone()
    return found[0], found[1]


def table(results: dict[str, Any]) -> str:
    """Format the results."""
    empty, begun, full = (statistics.median(results[f"{name}_rows_per_s"]) for name in ("empty", "begun", "full"))
    lines = [
        f"The table with {results['rows']:,} rows in {results['partitions']} partitions; medians, by one worker",
        f"  one message to {results['members']:,}, each into an empty table     {empty:9,.0f} rows/s",
        f"  {PER_PARTITION}, one after the other, from an empty table         {begun:9,.0f} rows/s",
        f"  {PER_PARTITION}, one after the other, from all those rows         {full:9,.0f} rows/s",
        f"  compared with the same from an empty table (target: >= {RATE_TARGET}) {compare(full / begun, RATE_TARGET)};"
        f" to an empty table each {compare(full / empty, RATE_TARGET)}",
        f"  {'over HTTP':28} {'few: p50':>9} {'p95':>8}   {'many: p50':>10} {'p95':>8}"
        f"   p95 (target: <= {READ_TARGET})",
    ]
    for name, few in results["reads_ms"]["few"].items():
        many = results["reads_ms"]["many"][name]
        lines.append(
            f"  {name:28} {few['p50']:6.2f} ms {few['p95']:5.2f} ms   {many['p50']:7.2f} ms {many['p95']:5.2f} ms"
            f"   {compare(many['p95'] / few['p95'], READ_TARGET, at_most=True)}"
        )
    for fillfactor, one in results["marking"].items():
        lines.append(
            f"  fillfactor {fillfactor:>3}: {one['insert_rows_per_s']:9,} rows/s inserted,"
            f" {one['marked_per_s']:6,} marked/s one by one, {one['hot_share']:.0%} of them HOT"
        )
    return "\n".join(lines)
