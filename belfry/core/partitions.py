"""The table of notifications in parts, by ranges of message ids: made ahead of need, and dropped by retention.

Each insert finds its place in the key of its partition, and that is the slower the more messages are in there: it
touches a page for each recipient, in the end. So a partition is left when it is full, and the next one is empty.

- A partition holds a million message ids at most, and always ends at a whole million: `notification_before_3000000`
  has those below it. PARTITIONS_AHEAD of them are always there beyond the one in use.
- The one in use is left early, when it is full or old: the next message's id is the next whole million. So ids grow
  with time, and have gaps.
- One that was left gets an index of what is unread in it: who has read nearly all of 100,000 is not counted row by row.
  Nobody is told there any more, so nobody waits for it; the one in use has none.
- Where one is missing (somebody detached or dropped it, or the sequence is far ahead), it is made at the next sweep.
  Which there are is read from the catalogue's bounds, not from their names: another table may have the name.
- RETENTION_DAYS after its newest message a partition is dropped whole: no row is deleted one by one. The lowest one has
  no lower bound, and takes what is still written about messages that old, until the next one goes.
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
ROW_BYTES = 60  # of a notification in its table, as measured; without its key
INDEX_TIMEOUT_SECONDS = 600  # a million rows take a quarter of a second, but old snapshots are waited for
ROLLOVERS_PER_RETENTION = 10  # a partition is left after this part of RETENTION_DAYS, so that not much is kept longer


@dataclass(frozen=True)
class Partition:
    """Notifications of the messages with `after_or_at <= id < below`; the lowest has no lower bound (None)."""

    after_or_at: int | None
    below: int
    name: str = field(default="", compare=False)  # the table's; of one that is to be made there is none yet


_BOUNDS = re.compile(r"FOR VALUES FROM \((?:MINVALUE|'?(-?[0-9]+)'?)\) TO \('?(-?[0-9]+)'?\)")


def list_partitions() -> list[Partition]:
    """All that have an upper bound, lowest first. A default partition is not among them."""
    found = fetch_all(
        "SELECT quote_ident(cls.relname) AS name, pg_get_expr(cls.relpartbound, cls.oid) AS bounds"
        " FROM pg_inherits inh"
        " JOIN pg_class cls ON cls.oid = inh.inhrelid"
        " WHERE inh.inhparent = 'notification'::regclass"
        " AND NOT inh.inhdetachpending"
    )
    bounds = [(one["name"], _BOUNDS.fullmatch(one["bounds"] or "")) for one in found]
    there = [Partition(int(two[1]) if two[1] else None, int(two[2]), name) for name, two in bounds if two]
    return sorted(there, key=lambda one: one.below)


def missing_ranges(newest: int | None = None, *, ahead: bool = True) -> list[Partition]:
    """The ranges of message ids for which no partition is there: up to the next after `newest`, and between any two.

    `newest` is the sequence's value, which is read unless it is given. Without `ahead` only those that the next
    message needs, or an older one.
    """
    next_message = (_newest_message() if newest is None else newest) + 1
    found: list[Partition] = []
    end: int | None = None
    for one in [*list_partitions(), Partition(next_message + 1, next_message + 1)]:
        if one.after_or_at is not None and (end is None or end < one.after_or_at):
            found.append(Partition(end, one.after_or_at))
        end = one.below if end is None else max(end, one.below)
    return [gap for gap in found if ahead or gap.after_or_at is None or gap.after_or_at <= next_message]


def oldest_retained_message_id() -> int:
    """The message id from which on notifications are kept: those of older messages are gone, if there were any.

    1 where there is no partition at all.
    """
    there = list_partitions()
    if not there:
        return 1
    return there[0].below if there[0].after_or_at is None else there[0].after_or_at


def block_drops(*, writing: bool) -> None:
    """Let no partition be dropped until the transaction ends; waits for a drop that is under way.

    It takes the lock on the table that reading or `writing` it takes anyway, before `oldest_retained_message_id` is
    asked: a drop needs an exclusive lock on the table.
    """
    mode = "ROW EXCLUSIVE" if writing else "ACCESS SHARE"
    execute(f"LOCK TABLE ONLY notification IN {mode} MODE")


def maintain() -> None:
    """Make what is missing, leave the one in use where it is full or old, and drop what is older than RETENTION_DAYS.

    Does nothing while another worker does it. Raises peewee's OperationalError where it would have to wait for a lock
    for long, since others would wait behind it; what is made and left stays so where only the drop has to wait.
    """
    with transaction(lock_timeout="500ms", statement_timeout="20s"):
        if not try_xact_lock(PARTITION_LOCK):
            return
        newest = _newest_message()
        for gap in missing_ranges(newest):
            _fill(gap, newest)
        there = list_partitions()
        used = _in_use(there)
        for below in range(there[-1].below, used.below + PARTITIONS_AHEAD * PARTITION_SPAN, PARTITION_SPAN):
            _create(Partition(below, below + PARTITION_SPAN))
        if _is_full(used) or _is_old(used):
            _roll_over(used)
    if settings.retention_days:
        with transaction(lock_timeout="100ms", statement_timeout="20s"):
            if try_xact_lock(PARTITION_LOCK):
                there = list_partitions()
                used = _in_use(there)
                _drop([one for one in there if one.below < used.below and _is_expired(one)])


def _in_use(there: list[Partition]) -> Partition:
    newest = _newest_message()
    return next((one for one in there if one.below > newest), there[-1])


def _newest_message() -> int:
    found = fetch_one("SELECT last_value FROM message_id_seq")
    assert found is not None
    return int(found["last_value"])


def _fill(gap: Partition, newest: int) -> None:
    """Make what one of `missing(newest)` needs: one partition, or two where the next message is in it.

    That one has its whole million; what lies before it, since the sequence was set far ahead, is in another.
    """
    next_message = newest + 1
    if (gap.after_or_at is None or gap.after_or_at <= next_message) and next_message < gap.below:
        start = next_message // PARTITION_SPAN * PARTITION_SPAN
        below = start + PARTITION_SPAN if gap.below == next_message + 1 else min(start + PARTITION_SPAN, gap.below)
        if gap.after_or_at is not None and start > gap.after_or_at:
            _create(Partition(gap.after_or_at, start))
            gap = Partition(start, gap.below)
        gap = Partition(gap.after_or_at, below)
    _create(gap)


def _create(new: Partition) -> None:
    """Make a partition, or attach the table that has its name: one that was detached keeps who was notified.

    It is attached, not created as a part of the table: that would wait for everybody who reads or writes it. What has
    the name and cannot be attached stays as it is, and the partition has another name.
    """
    lower = "MINVALUE" if new.after_or_at is None else new.after_or_at
    bounds = f"FOR VALUES FROM ({lower}) TO ({new.below})"
    wanted = name = f"notification_before_{new.below}"
    number = 1
    while _name_exists(name):
        if number == 1 and _attach(name, bounds):
            log.warning("%s was no partition any more, and is attached again", name)
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
    """Attach a table; False, and logged, where it does not fit. Raises OperationalError where that takes too long."""
    try:
        with db.atomic():
            execute(f"ALTER TABLE notification ATTACH PARTITION {name} {bounds}")
    except (ProgrammingError, IntegrityError, NotSupportedError) as error:
        log.error("%s is in the way of a partition, which gets another name: %s", name, error)
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
    if not settings.retention_days or used.after_or_at is None:
        return False
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM ("
            " SELECT created_at FROM message WHERE id >= %(from)s ORDER BY id LIMIT 1) oldest"
            " WHERE created_at < now() - make_interval(hours => 24 * %(days)s / %(part)s)",
            {"from": used.after_or_at, "days": settings.retention_days, "part": ROLLOVERS_PER_RETENTION},
        )
    )


def _roll_over(used: Partition) -> None:
    """Let the next message be the first of the next partition.

    The sequence is locked first, so that nobody draws an id between the look at it and its move: twice the same id
    would be an error for whoever posts.
    """
    execute("ALTER SEQUENCE message_id_seq INCREMENT BY 1")
    if _newest_message() < used.below:
        execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {used.below}")
        log.info("%s is full or old: the next message has the id %s", used.name, used.below)


def partitions_missing_unread_index() -> list[str]:
    """The partitions that were left and have no index of what is unread in them, or one that is not finished."""
    there = list_partitions()
    used = _in_use(there)
    found = fetch_all(
        "SELECT name FROM unnest(%(left)s::text[]) WITH ORDINALITY AS part (name, number)"
        " LEFT JOIN pg_index idx ON idx.indexrelid = to_regclass(name || '_unread')"
        " WHERE idx.indisvalid IS NOT TRUE"
        " ORDER BY number",
        {"left": [one.name for one in there if one.below < used.below and re.fullmatch("[a-z0-9_]+", one.name)]},
    )
    return [one["name"] for one in found]


def create_unread_index(name: str) -> bool:
    """Make the index of what is unread in a partition that was left. Nobody who reads or writes waits meanwhile.

    So it is made CONCURRENTLY: out of a transaction, by a connection of its own, for its patience must not stay on one
    that others get after us. Whoever makes it holds the partition's lock; where that ended half-way, what is left is
    dropped, under that same lock, and made again. False, and logged, where something stands in its way.
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
                    own.execute("SET LOCAL lock_timeout = '100ms'")  # whoever reads or writes waits behind us
                    own.execute(f"DROP INDEX {index}")
            own.execute(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index} ON {name} (user_id, message_id) INCLUDE (reason)"
                " WHERE read_at IS NULL AND dismissed_at IS NULL"
            )
    except psycopg.Error as error:
        log.warning("the index of what is unread in %s has to wait: %s", name, error)
        return False
    log.info("made the index of what is unread in %s", name)
    return True


def _is_expired(one: Partition) -> bool:
    newest = fetch_one(
        "SELECT created_at < now() - make_interval(hours => 24 * %(days)s) AS over"
        " FROM message"
        " WHERE id < %(below)s"
        " ORDER BY id DESC"
        " LIMIT 1",
        {"below": one.below, "days": settings.retention_days},
    )
    return newest is None or bool(newest["over"])


def _drop(over: list[Partition]) -> None:
    """Drop them, and put an empty one without a lower bound in their place: every message id has a partition always."""
    if len(over) < 2:
        return  # the lowest one alone, which is already that
    execute(f"DROP TABLE {', '.join(one.name for one in over)}")
    _create(Partition(None, over[-1].below))
    log.info("dropped the notifications of messages below %s: they are older than RETENTION_DAYS", over[-1].below)
