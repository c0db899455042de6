"""A few helpers over peewee's connection for statements that are written as SQL.

A query that needs one of PostgreSQL's own guarantees (a lock, a conflict clause, a statement that writes
and counts) is written as SQL with named parameters; everything simple goes through the models.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from config import settings
from models import db

Row = dict[str, Any]

IDLE_SECONDS = 5
"""How long a transaction may hear nothing from its process, at least. Between two statements lie a few milliseconds."""
ROUND_TRIPS = 8
"""So many round trips are waited for before a silent process is taken for dead. On a slow network, or with
a slow database, each takes seconds; from the claim of a work item to its lock are four."""


def not_for_long(round_trip: float) -> dict[str, str]:
    """PostgreSQL's parameters for a transaction that does not keep its locks when its process hangs.

    `round_trip` is how many seconds PostgreSQL took for an answer just now: the silence between two statements is at
    least as long. No longer than a job may run, however long that was.
    """
    seconds = max(IDLE_SECONDS, min(ROUND_TRIPS * round_trip, settings.job_timeout))
    return {"idle_in_transaction_session_timeout": f"{seconds * 1000:.0f}ms"}


def _utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def rows(statement: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
    """Run one statement; its rows as dicts, times in UTC. [] when there are none."""
    cursor = db.execute_sql(statement, parameters)
    result = cursor.pgresult  # its names alone: `cursor.description` makes an object of each column, with its type
    names = [result.fname(number).decode() for number in range(result.nfields)]
    return [dict(zip(names, map(_utc, values), strict=True)) for values in cursor.fetchall()]


def row(statement: str, parameters: Mapping[str, Any] | None = None) -> Row | None:
    """The first row of one statement as a dict; None when there is none."""
    found = rows(statement, parameters)
    return found[0] if found else None


def execute(statement: str, parameters: Mapping[str, Any] | None = None) -> int:
    """Run one statement that returns no rows; the number of rows that it touched."""
    return int(db.execute_sql(statement, parameters).rowcount)


def lock_for_this_transaction(key: int) -> bool:
    """Take an advisory lock until the transaction ends; False, and nobody waits, where another one has it."""
    held = row("SELECT pg_try_advisory_xact_lock(%(key)s) AS held", {"key": key})
    return bool(held and held["held"])


def set_locally(parameters: Mapping[str, str]) -> str:
    """What sets these parameters of PostgreSQL for one transaction, as expressions for a SELECT that is said anyway."""
    return ", ".join(f"set_config('{name}', '{value}', true)" for name, value in parameters.items())


@contextmanager
def timed_transaction() -> Iterator[float]:
    """A transaction; yields how many seconds PostgreSQL took to answer BEGIN, which waits for nothing."""
    began = time.perf_counter()
    with db.atomic():
        yield time.perf_counter() - began


@contextmanager
def transaction(**parameters: str) -> Iterator[float]:
    """A transaction that does not keep its locks when its process hangs. Yields as `timed_transaction`.

    PostgreSQL ends it, and takes back what it wrote, when nothing is heard of the process for IDLE_SECONDS, or for
    ROUND_TRIPS where those take longer; of a process that died it hears at once. `parameters` are PostgreSQL's, for
    this transaction alone.
    """
    with timed_transaction() as round_trip:
        row(f"SELECT {set_locally(not_for_long(round_trip) | parameters)}")
        yield round_trip
