"""What several parts of `make bench` and the drills share: figures, timed requests, subscribers, filled partitions."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg

from tools.dev import signals


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed, from 0 to 1."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def percentiles(milliseconds: Sequence[float], *shares: float, digits: int = 2) -> dict[str, float]:
    """Return {"p50": …} for each share, rounded."""
    return {f"p{round(share * 100)}": round(percentile(milliseconds, share), digits) for share in shares}


def compare(value: float, target: float, *, at_most: bool = False) -> str:
    """Format a figure with the result of its comparison with the target."""
    good = value <= target if at_most else value >= target
    return f"{value:.2f} {'reached' if good else 'MISSED'}"


def time_requests(
    request: Callable[[], Any], times: int, *, warm_up: int = 0, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Return {"p50", "p95"} in ms of so many requests, after `warm_up` others. `before` is not timed."""
    milliseconds = []
    for number in range(warm_up + times):
        signals.check()
        if before:
            before()
        started = time.perf_counter()
        request()
        if number >= warm_up:
            milliseconds.append((time.perf_counter() - started) * 1000)
    return percentiles(milliseconds, 0.5, 0.95)


def create_subscriber_tokens(channel_id: int, number: int) -> tuple[list[int], list[str]]:
    """Create tokens of so many members who are notified of every message; returns their ids and the tokens."""
    from belfry.core.db import execute, fetch_all
    from belfry.identity.tokens import TOKEN_PREFIX, hash_token

    found = fetch_all(
        "SELECT mem.user_id FROM channel chan JOIN member mem ON mem.server_id = chan.server_id"
        " JOIN subscription sub ON sub.user_id = mem.user_id AND sub.status = 'active'"
        " AND COALESCE(sub.current_period_end > now(), true)"
        " WHERE chan.id = %(id)s AND NOT EXISTS (SELECT FROM preference pref WHERE pref.user_id = mem.user_id)"
        " ORDER BY mem.user_id LIMIT %(number)s",
        {"id": channel_id, "number": number},
    )
    assert len(found) == number, len(found)
    user_ids = [row["user_id"] for row in found]
    tokens = [TOKEN_PREFIX + secrets.token_urlsafe(32) for _ in found]
    execute(
        "INSERT INTO api_token (user_id, token_hash) SELECT * FROM unnest(%(user_ids)s::bigint[], %(hashes)s::bytea[])",
        {"user_ids": user_ids, "hashes": [hash_token(token) for token in tokens]},
    )
    return user_ids, tokens


def fill_partition(url: str, lower: int, select: str, parameters: Mapping[str, Any]) -> None:
    """Create the partition that begins with message `lower` from a SELECT of (user_id, message_id, read_at).

    The rows are ordered by message, as fan-outs insert them.
    """
    from belfry.core import partitions

    upper = lower + partitions.PARTITION_SPAN
    name = f"notification_before_{upper}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {name} (LIKE notification INCLUDING DEFAULTS)")
        connection.execute(
            f"INSERT INTO {name} (user_id, message_id, reason, read_at)"
            f" SELECT user_id, message_id, 'message', read_at FROM ({select}) selected"
            " ORDER BY message_id, user_id",
            parameters,
        )
        connection.execute(f"ALTER TABLE {name} ADD PRIMARY KEY (user_id, message_id)")
        connection.execute(f"ALTER TABLE notification ATTACH PARTITION {name} FOR VALUES FROM ({lower}) TO ({upper})")


def maintain_partitions() -> None:
    """Do what the sweeper does in time: create partitions ahead, and indexes of the unread notifications."""
    from belfry.core import partitions

    partitions.maintain()
    for name in partitions.partitions_missing_unread_index():
        assert partitions.create_unread_index(name), name
