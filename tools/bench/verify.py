"""A drill: how long `verify` takes on a table with 50,000,000 notifications.

A message to 100,000 members is fanned out, and copied with its run and its notifications until the table has so many
rows, in partitions as Belfry creates them. The data is correct, so `verify` reads all of it.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.dev import say

MEMBERS = 100_000
ROWS = 50_000_000
PER_PARTITION = 15  # messages, as in tools/bench/table.py


def verify(*_: Any) -> dict[str, Any]:
    """A full check of 50,000,000 notifications in partitions."""
    from belfry.integrity.verification import check

    filled = fill()
    began = time.perf_counter()
    report = check()
    took = time.perf_counter() - began
    assert report.findings == [], report.findings
    began = time.perf_counter()
    report = check(decisions=10)
    return {
        "rows": filled,
        "verify_s": round(took, 1),
        "verify_decisions_of_10_runs_s": round(time.perf_counter() - began, 1),
        "notes": report.notes,
    }


def fill(members: int = MEMBERS, rows: int = ROWS) -> int:
    """Fill the tables; returns the number of notifications."""
    from belfry.cli import seeding
    from belfry.core import partitions
    from belfry.core.db import db, execute, fetch_one
    from belfry.fanout import claims, fanout
    from belfry.fanout.claims import WorkItem
    from belfry.identity import users
    from belfry.messages import messages

    db.connect(reuse_if_open=True)
    author = users.create_user("author-of-many", is_admin=True)
    channel_id = seeding.seed(members, 1)["channel_ids"][0]
    posted = messages.post_message(author, channel_id, "gold breaks out")
    items = [WorkItem(posted.run_id)]
    while items:
        item = items.pop()
        items += fanout.process_work_item(item, claims.claim(item) or 0) or []
    template = fetch_one(
        "SELECT id, message_id, notifications_inserted FROM run WHERE id = %(id)s", {"id": posted.run_id}
    )
    assert template is not None
    first = partitions.list_partitions()[-1].upper
    number = max(1, round(rows / (template["notifications_inserted"] * PER_PARTITION)))
    notifications = number * PER_PARTITION * template["notifications_inserted"]
    say(f"  inserting {notifications:,} notifications in {number} partitions …")
    with ThreadPoolExecutor(2) as pool:
        bounds = [first + one * partitions.PARTITION_SPAN for one in range(number)]
        list(pool.map(lambda lower: _fill_partition(template, lower), bounds))
    execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {first + number * partitions.PARTITION_SPAN}")
    partitions.maintain()
    execute("VACUUM (ANALYZE)")
    found = fetch_one("SELECT count(*) AS number FROM notification")
    assert found is not None
    return int(found["number"])


def _fill_partition(template: dict[str, Any], lower: int) -> None:
    """Insert copies of the template's message, run and notifications, as messages from `lower` on."""
    import psycopg

    from config import settings
    from tools.bench.measuring import fill_partition

    here = {**template, "lower": lower, "upper": lower + PER_PARTITION - 1}
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO message (id, channel_id, author_id, content)"
            " SELECT n, channel_id, author_id, content"
            " FROM message, generate_series(%(lower)s::bigint, %(upper)s::bigint) AS n"
            " WHERE id = %(message_id)s",
            here,
        )
        connection.execute(
            "INSERT INTO run (message_id, kind, state, attempts, attempts_left, members_processed, members_total,"
            " notifications_inserted, decisions, sweep_after,"
            " started_at, finished_at)"
            " SELECT n, kind, state, attempts, attempts_left, members_processed, members_total,"
            " notifications_inserted, decisions, sweep_after, now(), now()"
            " FROM run, generate_series(%(lower)s::bigint, %(upper)s::bigint) AS n"
            " WHERE run.id = %(id)s",
            here,
        )
    fill_partition(
        settings.database_url,
        lower,
        "SELECT user_id, copy AS message_id, NULL::timestamptz AS read_at"
        " FROM notification, generate_series(%(lower)s::bigint, %(upper)s::bigint) AS copy"
        " WHERE message_id = %(message_id)s",
        here,
    )
