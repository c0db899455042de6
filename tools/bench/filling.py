"""What parts of `make bench` fill the table of notifications with, and how they time requests."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from belfry.core import partitions


def fill_partition(url: str, lower: int, people_and_messages: str, parameters: Mapping[str, Any]) -> None:
    """Make the partition that begins with message `lower`, of a SELECT of (user_id, message_id, read_at), ordered by
    message: the rows lie as fan-outs leave them, and the key is made at once."""
    name, upper = partitions.Partition(lower, lower + partitions.PARTITION_SPAN).name, lower + partitions.PARTITION_SPAN
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {name} (LIKE notification INCLUDING DEFAULTS)")
        connection.execute(
            f"INSERT INTO {name} (user_id, message_id, reason, read_at)"
            f" SELECT user_id, message_id, 'message', read_at FROM ({people_and_messages}) notified"
            " ORDER BY message_id, user_id",
            parameters,
        )
        connection.execute(f"ALTER TABLE {name} ADD PRIMARY KEY (user_id, message_id)")
        connection.execute(f"ALTER TABLE notification ATTACH PARTITION {name} FOR VALUES FROM ({lower}) TO ({upper})")


def leave_partitions() -> None:
    """What the sweeper does in time when partitions were left: those ahead are made, and indexes of the unread."""
    partitions.maintain()
    for name in partitions.partitions_missing_unread_index():
        assert partitions.create_unread_index(name), name


def timed(
    ask: Callable[[], Any], times: int, *, warm: int = 0, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """{"p50", "p95"} in ms, of so many requests after `warm` that do not count; `before` each is not timed."""
    took = []
    for number in range(warm + times):
        if before:
            before()
        began = time.perf_counter()
        ask()
        if number >= warm:
            took.append((time.perf_counter() - began) * 1000)
    took.sort()
    return {"p50": round(took[times // 2], 2), "p95": round(took[int(times * 0.95)], 2)}
