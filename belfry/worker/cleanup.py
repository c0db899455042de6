"""Delete rows that are kept for a limited time, in batches, so that no statement takes long."""

import time
from collections.abc import Callable

from belfry.core.db import execute, transaction, try_xact_lock
from belfry.core.idempotency import RETENTION
from belfry.core.locks import CLEANUP_LOCK
from belfry.identity import sessions
from belfry.stream import updates
from config import tuning


def delete_older(table: str, column: str, age: str) -> Callable[[int], int]:
    """Create a function that deletes at most `limit` rows of a table, the oldest first, and returns how many.

    It deletes rows whose `column`, a time with an index, is more than `age` (an interval of PostgreSQL) ago.
    """
    # The age is checked twice, so that a row that was renewed after the inner statement read it is kept.
    statement = f"""
        DELETE FROM {table}
        WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM {table} WHERE {column} < now() - interval '{age}' ORDER BY {column} LIMIT %(limit)s))
        AND {column} < now() - interval '{age}'
    """
    return lambda limit: execute(statement, {"limit": limit})


CLEANUPS: dict[str, Callable[[int], int]] = {
    "idempotency_keys": delete_older("idempotency_key", "created_at", RETENTION),
    "stream_log": updates.purge_log,
    "sessions": sessions.delete_idle_sessions,
}
"""{step of the sweep: function that deletes at most `limit` rows and returns how many}."""


def clean_up(name: str) -> int | None:
    """Delete rows by one of CLEANUPS, batch by batch, for its share of the time; how many.

    None while another worker does it. Raises peewee's OperationalError where a batch takes more than 5 s; the batches
    before it are committed.
    """
    deleted, until = 0, time.monotonic() + tuning.cleanup_seconds / len(CLEANUPS)
    while True:
        # No wait for the disk: after a crash the same rows are found again.
        with transaction(statement_timeout="5s", synchronous_commit="off"):
            if not try_xact_lock(CLEANUP_LOCK):
                return deleted or None
            batch = CLEANUPS[name](tuning.cleanup_batch_rows)
        deleted += batch
        if batch < tuning.cleanup_batch_rows or time.monotonic() >= until:
            return deleted
