"""Partitions of the notifications by ranges of message ids: created ahead of need, dropped by retention.

The more messages a partition's key holds, the slower an insert is, because in the end each recipient's row touches
another page. So a partition that is full is left, and the next one begins empty.

- A partition holds at most a million message ids and ends at a multiple of a million: `notification_before_3000000`
  holds those below 3,000,000. PARTITIONS_AHEAD partitions always exist beyond the one in use.
- The one in use is left early when it is full or old: the next message's id is then the next multiple of a million. So
  ids grow with time and have gaps.
- A partition that was left gets an index of its unread notifications, so that counting reads only those. No new
  notification pays for the index, because the partition in use has none.
- A missing partition (detached, dropped, or the sequence was set far ahead) is created at the next sweep. Partitions
  are recognised by their bounds in the catalogue, not by their names, which another table may have.
- A partition is dropped as a whole RETENTION_DAYS after its newest message. The lowest one has no lower bound, and
  stores what is still written about messages that old, until the next one is dropped.
"""

import logging
import re
from dataclasses import dataclass, field

import psycopg
from peewee import IntegrityError, NotSupportedError, ProgrammingError

from belfry.core.db import (
    configure_connection,
    connect_parameters,
    db,
    execute,
    fetch_all,
    fetch_one,
    transaction,
    try_xact_lock,
)
from belfry.core.locks import PARTITION_LOCK
from config import settings, tuning

log = logging.getLogger(__name__)

PARTITION_SPAN = 1_000_000  # message ids
PARTITIONS_AHEAD = 2
ROW_BYTES = 60  # bytes of a notification in its table without its key, as measured
INDEX_TIMEOUT_SECONDS = 600  # a million rows take 0.25 s, but the statement waits for old snapshots
ROLLOVERS_PER_RETENTION = 10  # a partition is left after this share of RETENTION_DAYS, so that little is kept longer


@dataclass(frozen=True)
class Partition:
    """The notifications of messages with `lower <= id < upper`; the lowest has no lower bound (None)."""

    lower: int | None
    upper: int
    name: str = field(default="", compare=False)  # of the table; empty for a partition that is to be created


_BOUNDS = re.compile(r"FOR VALUES FROM \((?:MINVALUE|'?(-?[0-9]+)'?)\) TO \('?(-?[0-9]+)'?\)")


def list_partitions() -> list[Partition]:
    """All partitions with an upper bound, lowest first. A default partition is left out."""
    found = fetch_all(
        "SELECT quote_ident(cls.relname) AS name, pg_get_expr(cls.relpartbound, cls.oid) AS bounds"
        " FROM pg_inherits inh"
        " JOIN pg_class cls ON cls.oid = inh.inhrelid"
        " WHERE inh.inhparent = 'notification'::regclass"
        " AND NOT inh.inhdetachpending"
    )
    bounds = [(one["name"], _BOUNDS.fullmatch(one["bounds"] or "")) for one in found]
    there = [Partition(int(two[1]) if two[1] else None, int(two[2]), name) for name, two in bounds if two]
    return sorted(there, key=lambda one: one.upper)


def missing_ranges(newest: int | None = None, *, ahead: bool = True) -> list[Partition]:
    """The ranges of message ids that have no partition: up to the next after `newest`, and between any two.

    `newest` is the sequence's value, which is read by default. Without `ahead`, only the ranges that the next message
    or an older one needs.
    """
    next_message = (_newest_message() if newest is None else newest) + 1
    found: list[Partition] = []
    end: int | None = None
    for one in [*list_partitions(), Partition(next_message + 1, next_message + 1)]:
        if one.lower is not None and (end is None or end < one.lower):
            found.append(Partition(end, one.lower))
        end = one.upper if end is None else max(end, one.upper)
    return [gap for gap in found if ahead or gap.lower is None or gap.lower <= next_message]


def oldest_retained_message_id() -> int:
    """The message id from which on notifications are kept; 1 without partitions."""
    there = list_partitions()
    if not there:
        return 1
    return there[0].upper if there[0].lower is None else there[0].lower


def block_drops(*, writing: bool) -> None:
    """Let no partition be dropped until the transaction ends; wait for a drop in progress.

    It takes the lock that reading or `writing` takes anyway, but before `oldest_retained_message_id` is read. A drop
    needs an exclusive lock on the table.
    """
    mode = "ROW EXCLUSIVE" if writing else "ACCESS SHARE"
    execute(f"LOCK TABLE ONLY notification IN {mode} MODE")


def maintain() -> None:
    """Create missing partitions, leave the one in use where it is full or old, and drop those past RETENTION_DAYS.

    Does nothing while another worker does it. Raises peewee's OperationalError where it would wait long for a lock,
    because others would wait behind it; where only the drop has to wait, the rest is committed.
    """
    with transaction(lock_timeout="500ms", statement_timeout="20s"):
        if not try_xact_lock(PARTITION_LOCK):
            return
        newest = _newest_message()
        for gap in missing_ranges(newest):
            _fill(gap, newest)
        there = list_partitions()
        used = _in_use(there)
        for lower in range(there[-1].upper, used.upper + PARTITIONS_AHEAD * PARTITION_SPAN, PARTITION_SPAN):
            _create(Partition(lower, lower + PARTITION_SPAN))
        if _is_full(used) or _is_old(used):
            _roll_over(used)
    if settings.retention_days:
        with transaction(lock_timeout="100ms", statement_timeout="20s"):
            if try_xact_lock(PARTITION_LOCK):
                there = list_partitions()
                used = _in_use(there)
                _drop([one for one in there if one.upper < used.upper and _is_expired(one)])


def _in_use(there: list[Partition]) -> Partition:
    newest = _newest_message()
    return next((one for one in there if one.upper > newest), there[-1])


def _newest_message() -> int:
    found = fetch_one("SELECT last_value FROM message_id_seq")
    assert found is not None
    return int(found["last_value"])


def _fill(gap: Partition, newest: int) -> None:
    """Create what one of `missing_ranges(newest)` needs: one partition, or two where the next message is in it.

    The next message's partition has its whole million; what lies before it, because the sequence was set far ahead, is
    another partition.
    """
    next_message = newest + 1
    if (gap.lower is None or gap.lower <= next_message) and next_message < gap.upper:
        start = next_message // PARTITION_SPAN * PARTITION_SPAN
        upper = start + PARTITION_SPAN if gap.upper == next_message + 1 else min(start + PARTITION_SPAN, gap.upper)
        if gap.lower is not None and start > gap.lower:
            _create(Partition(gap.lower, start))
            gap = Partition(start, gap.upper)
        gap = Partition(gap.lower, upper)
    _create(gap)


def _create(new: Partition) -> None:
    """Create a partition, or attach the table that has its name: a detached one knows who was notified.

    It is attached, because creating it as a partition waits for all who read or write the table. A table that has the
    name and cannot be attached is left alone, and the partition gets another name.
    """
    lower = "MINVALUE" if new.lower is None else new.lower
    bounds = f"FOR VALUES FROM ({lower}) TO ({new.upper})"
    wanted = name = f"notification_before_{new.upper}"
    number = 1
    while _name_exists(name):
        if number == 1 and _attach(name, bounds):
            log.warning("%s was detached, and is attached again", name)
            return
        number += 1
        name = f"{wanted}_{number}"
    execute(f"CREATE TABLE {name} (LIKE notification INCLUDING ALL)")
    execute(f"ALTER TABLE notification ATTACH PARTITION {name} {bounds}")
    log.info("made %s", name)


def _name_exists(name: str) -> bool:
    found = fetch_one(
        "SELECT to_regclass(%(name)s) IS NOT NULL OR to_regtype(%(name)s) IS NOT NULL AS taken", {"name": name}
    )
    return bool(found and found["taken"])


def _attach(name: str, bounds: str) -> bool:
    """Attach a table; False, with a log entry, where it does not fit. Raises OperationalError after a time-out."""
    try:
        with db.atomic():
            execute(f"ALTER TABLE notification ATTACH PARTITION {name} {bounds}")
    except (ProgrammingError, IntegrityError, NotSupportedError) as error:
        log.error("the table %s has the name of a partition, which gets another name: %s", name, error)
        return False
    return True


def _is_full(used: Partition) -> bool:
    found = fetch_one(
        "SELECT pg_relation_size(%(name)s::regclass) / %(row_bytes)s"
        " >= GREATEST(%(rows)s, %(messages)s * reltuples, ("
        "  SELECT sum(pg_relation_size(inhrelid)) / %(row_bytes)s / %(number)s"
        "  FROM pg_inherits WHERE inhparent = 'notification'::regclass)) AS full"
        " FROM pg_class"
        " WHERE oid = 'user_account'::regclass",
        {
            "name": used.name,
            "row_bytes": ROW_BYTES,
            "rows": tuning.partition_min_rows,
            "messages": tuning.partition_messages_per_account,
            "number": tuning.partition_soft_max,
        },
    )
    return bool(found and found["full"])


def _is_old(used: Partition) -> bool:
    if not settings.retention_days or used.lower is None:
        return False
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM ("
            " SELECT created_at FROM message WHERE id >= %(from)s ORDER BY id LIMIT 1) oldest"
            " WHERE created_at < now() - make_interval(hours => 24 * %(days)s / %(part)s)",
            {"from": used.lower, "days": settings.retention_days, "part": ROLLOVERS_PER_RETENTION},
        )
    )


def _roll_over(used: Partition) -> None:
    """Make the next message the first of the next partition.

    The sequence is locked first, so that no id is drawn between reading and moving it, which would give one id twice.
    """
    execute("ALTER SEQUENCE message_id_seq INCREMENT BY 1")
    if _newest_message() < used.upper:
        execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {used.upper}")
        log.info("%s is full or old: the next message has the id %s", used.name, used.upper)


def partitions_missing_unread_index() -> list[str]:
    """The partitions that were left and have no valid index of their unread notifications."""
    there = list_partitions()
    used = _in_use(there)
    found = fetch_all(
        "SELECT name FROM unnest(%(left)s::text[]) WITH ORDINALITY AS part (name, number)"
        " LEFT JOIN pg_index idx ON idx.indexrelid = to_regclass(name || '_unread')"
        " WHERE idx.indisvalid IS NOT TRUE"
        " ORDER BY number",
        {"left": [one.name for one in there if one.upper < used.upper and re.fullmatch("[a-z0-9_]+", one.name)]},
    )
    return [one["name"] for one in found]


def create_unread_index(name: str) -> bool:
    """Create the index of the unread notifications of a partition that was left, without delaying readers and writers.

    It is created CONCURRENTLY: outside a transaction, on its own connection, whose time-outs must not stay on a
    connection of the pool. A lock on the partition excludes other workers; an unfinished index is dropped under that
    lock and created again. False, with a log entry, where a lock is not available.
    """
    index = f"{name}_unread"
    try:
        with psycopg.connect(**connect_parameters(), autocommit=True) as own:
            configure_connection(own)
            own.execute(f"SET lock_timeout = '{tuning.partition_index_lock_timeout}'")
            own.execute(f"SET statement_timeout = '{INDEX_TIMEOUT_SECONDS}s'")
            with own.transaction():
                own.execute(f"LOCK TABLE {name} IN SHARE UPDATE EXCLUSIVE MODE")
                if own.execute(
                    "SELECT FROM pg_index WHERE indexrelid = to_regclass(%s) AND NOT indisvalid", (index,)
                ).rowcount:
                    own.execute("SET LOCAL lock_timeout = '100ms'")  # readers and writers wait behind this
                    own.execute(f"DROP INDEX {index}")
            own.execute(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index} ON {name} (user_id, message_id) INCLUDE (reason)"
                " WHERE read_at IS NULL AND dismissed_at IS NULL"
            )
    except psycopg.Error as error:
        log.warning("the unread index of %s is delayed: %s", name, error)
        return False
    log.info("created the unread index of %s", name)
    return True


def _is_expired(one: Partition) -> bool:
    newest = fetch_one(
        "SELECT created_at < now() - make_interval(hours => 24 * %(days)s) AS over"
        " FROM message"
        " WHERE id < %(upper)s"
        " ORDER BY id DESC"
        " LIMIT 1",
        {"upper": one.upper, "days": settings.retention_days},
    )
    return newest is None or bool(newest["over"])


def _drop(over: list[Partition]) -> None:
    """Drop partitions, and put an empty one without a lower bound in their place: every message id has a partition."""
    if len(over) < 2:
        return  # only the lowest one, which is that already
    execute(f"DROP TABLE {', '.join(one.name for one in over)}")
    _create(Partition(None, over[-1].upper))
    log.info("dropped the notifications of messages below %s: they are older than RETENTION_DAYS", over[-1].upper)
