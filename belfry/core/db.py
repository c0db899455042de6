"""A few helpers over peewee's connection for statements that are written as SQL.

A query that needs one of PostgreSQL's own guarantees (a lock, a conflict clause, a statement that writes
and counts) is written as SQL with named parameters; everything simple goes through the models.
"""

import os
import select
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
from peewee import (
    Psycopg3Adapter,
)
from playhouse.pool import PooledPostgresqlDatabase
from psycopg.conninfo import conninfo_to_dict

from config import settings

Row = dict[str, Any]

IDLE_IN_TRANSACTION_SECONDS = 5
"""How long a transaction may hear nothing from its process, at least. Between two statements lie a few milliseconds."""
ROUND_TRIPS = 8
"""So many round trips are waited for before a silent process is taken for dead. On a slow network, or with
a slow database, each takes seconds; from the claim of a work item to its lock are four."""


def idle_timeout(round_trip: float) -> dict[str, str]:
    """PostgreSQL's parameters for a transaction that does not keep its locks when its process hangs.

    `round_trip` is how many seconds PostgreSQL took for an answer just now: the silence between two statements is at
    least as long. No longer than a job may run, however long that was.
    """
    seconds = max(IDLE_IN_TRANSACTION_SECONDS, min(ROUND_TRIPS * round_trip, settings.job_timeout_seconds))
    return {"idle_in_transaction_session_timeout": f"{seconds * 1000:.0f}ms"}


def _utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def fetch_all(statement: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
    """Run one statement; its rows as dicts, times in UTC. [] when there are none."""
    cursor = db.execute_sql(statement, parameters)
    result = cursor.pgresult  # its names alone: `cursor.description` makes an object of each column, with its type
    names = [result.fname(number).decode() for number in range(result.nfields)]
    return [dict(zip(names, map(_utc, values), strict=True)) for values in cursor.fetchall()]


def fetch_one(statement: str, parameters: Mapping[str, Any] | None = None) -> Row | None:
    """The first row of one statement as a dict; None when there is none."""
    found = fetch_all(statement, parameters)
    return found[0] if found else None


def execute(statement: str, parameters: Mapping[str, Any] | None = None) -> int:
    """Run one statement that returns no rows; the number of rows that it touched."""
    return int(db.execute_sql(statement, parameters).rowcount)


def try_xact_lock(key: int) -> bool:
    """Take an advisory lock until the transaction ends; False, and nobody waits, where another one has it."""
    held = fetch_one("SELECT pg_try_advisory_xact_lock(%(key)s) AS held", {"key": key})
    return bool(held and held["held"])


def set_config_sql(parameters: Mapping[str, str]) -> str:
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
    """Begin a transaction that loses its locks when its process hangs. Yields as `timed_transaction`.

    PostgreSQL rolls it back when the process sends nothing for IDLE_IN_TRANSACTION_SECONDS, or for ROUND_TRIPS where
    those take longer. It notices a process that died at once. `parameters` are PostgreSQL's, for this transaction.
    """
    with timed_transaction() as round_trip:
        fetch_one(f"SELECT {set_config_sql(idle_timeout(round_trip) | parameters)}")
        yield round_trip
_process = os.getpid()


@contextmanager
def database_connection() -> Iterator[None]:
    """A database connection for a job or a sweep; the one that is open already, where there is one.

    A work-horse is a fork: what it inherited of the pool is its parent's, and is forgotten, not closed.
    """
    global _process
    if os.getpid() != _process:
        db.dispose()
        _process = os.getpid()
    opened = db.connect(reuse_if_open=True)
    try:
        yield
    finally:
        if opened:
            db.close()


def connect_parameters() -> dict[str, Any]:
    """psycopg's, of DATABASE_URL: with time-outs where it says none."""
    parameters: dict[str, Any] = dict(conninfo_to_dict(settings.database_url))
    parameters.setdefault("connect_timeout", 5)
    parameters.setdefault("application_name", "belfry")
    # A host that vanished is noticed within half a minute, not after the kernel's two hours.
    parameters.setdefault("keepalives_idle", 10)
    parameters.setdefault("keepalives_interval", 5)
    parameters.setdefault("keepalives_count", 3)
    parameters.setdefault("tcp_user_timeout", 30_000)
    return parameters


ISOLATION = "READ COMMITTED"
"""Locks are waited for, and what is read afterwards must be what others committed meanwhile."""
SESSION = {
    "default_transaction_isolation": ISOLATION,
    "client_encoding": "UTF8",  # any other encoding has no room for some characters of a message
    "DateStyle": "ISO",  # the only style in which psycopg reads times with a time zone
}
"""PostgreSQL's parameters that the code is right only with, whatever the role or the database sets. Settings that make
a statement fail with an error (time-outs, read-only transactions) or cost time only are the operator's to choose."""


def configure_connection(connection: psycopg.Connection[Any]) -> None:
    """Set SESSION on a new connection, in one round trip. Call it on each connection that the product opens.

    It is a statement and no `options` of the connection, which PgBouncer refuses. Behind PgBouncer in transaction mode
    it reaches one server connection of many: docs/guides/deploy.md says what to set there.
    """
    parameters = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in SESSION.items())
    connection.execute(f"SELECT {parameters}")


class _Adapter(Psycopg3Adapter):
    """peewee's way to open a connection with psycopg 3; each new one is prepared."""

    def connect(self, *arguments: Any, **parameters: Any) -> psycopg.Connection[Any]:
        connection: psycopg.Connection[Any] = super().connect(*arguments, **parameters)  # type: ignore[no-untyped-call]
        connection.autocommit = True  # as peewee sets it next: what is set here must not wait for a commit
        configure_connection(connection)
        return connection


class Pool(PooledPostgresqlDatabase):  # type: ignore[misc]
    """peewee's pool, which hands out no connection that PostgreSQL has ended meanwhile, as when it restarted."""

    psycopg3_adapter = _Adapter

    def _is_closed(self, conn: psycopg.Connection[Any]) -> bool:
        if conn.closed:
            return True
        # Nothing is expected on a connection that nobody uses: what can be read is its end, or a word of it. peewee
        # asks `SELECT 1`, a round trip for every request and job, and learns no more.
        readable = select.poll()
        readable.register(conn.fileno(), select.POLLIN)
        return bool(readable.poll(0))


def make_database() -> Pool:
    """A pool of connections to DATABASE_URL, one for each thread that works; nothing is opened yet."""
    parameters = connect_parameters()
    return Pool(
        parameters.pop("dbname"),
        max_connections=settings.web_threads + 3,  # the sweeper's, the live streams', and one for the commands
        stale_timeout=300,
        timeout=5,
        prefer_psycopg3=True,
        isolation_level=ISOLATION,  # is in each BEGIN, which reaches every server connection behind PgBouncer
        **parameters,
    )


db = make_database()
