"""Helpers over peewee's connection for statements that are written as SQL.

A query that needs one of PostgreSQL's own guarantees (a lock, a conflict clause, a statement that writes and counts) is
written as SQL with named parameters. Simple queries use the models.
"""

import os
import select
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
from peewee import Psycopg3Adapter
from playhouse.pool import PooledPostgresqlDatabase
from psycopg.conninfo import conninfo_to_dict

from config import settings

Row = dict[str, Any]

IDLE_IN_TRANSACTION_SECONDS = 5
"""The shortest idle time-out of a transaction. A few milliseconds pass between two statements."""
LARGEST_ID = 2**63 - 1
"""The largest bigint."""
ROUND_TRIPS = 8
"""How many round trips are waited for before a silent process is taken for dead. On a slow network, or with a slow
database, each takes seconds; there are four from the claim of a work item to its lock."""


def idle_timeout(round_trip: float) -> dict[str, str]:
    """PostgreSQL's parameters for a transaction that must not keep its locks when its process hangs.

    `round_trip` is how many seconds PostgreSQL just took to answer: at least as much passes between two statements. The
    time-out is never longer than JOB_TIMEOUT_SECONDS.
    """
    seconds = max(IDLE_IN_TRANSACTION_SECONDS, min(ROUND_TRIPS * round_trip, settings.job_timeout_seconds))
    return {"idle_in_transaction_session_timeout": f"{seconds * 1000:.0f}ms"}


def _utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def fetch_all(statement: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
    """Execute a statement; its rows as dicts, with times in UTC. [] without rows."""
    cursor = db.execute_sql(statement, parameters)
    result = cursor.pgresult  # the names only: `cursor.description` creates an object for each column
    names = [result.fname(number).decode() for number in range(result.nfields)]
    return [dict(zip(names, map(_utc, values), strict=True)) for values in cursor.fetchall()]


def fetch_one(statement: str, parameters: Mapping[str, Any] | None = None) -> Row | None:
    """Execute a statement; its first row as a dict, None without rows."""
    found = fetch_all(statement, parameters)
    return found[0] if found else None


def execute(statement: str, parameters: Mapping[str, Any] | None = None) -> int:
    """Execute a statement that returns no rows; the number of rows that it affected."""
    return int(db.execute_sql(statement, parameters).rowcount)


def try_xact_lock(key: int) -> bool:
    """Take an advisory lock until the transaction ends; False, without waiting, where another session has it."""
    found = fetch_one("SELECT pg_try_advisory_xact_lock(%(key)s) AS locked", {"key": key})
    return bool(found and found["locked"])


def set_config_sql(parameters: Mapping[str, str]) -> str:
    """Expressions of a SELECT that set parameters of PostgreSQL for the current transaction."""
    return ", ".join(f"set_config('{name}', '{value}', true)" for name, value in parameters.items())


@contextmanager
def timed_transaction() -> Iterator[float]:
    """Begin a transaction; yields how many seconds PostgreSQL took to answer BEGIN, which waits for nothing."""
    began = time.perf_counter()
    with db.atomic():
        yield time.perf_counter() - began


@contextmanager
def transaction(**parameters: str) -> Iterator[float]:
    """Begin a transaction that loses its locks when its process hangs. Yields as `timed_transaction`.

    PostgreSQL rolls it back when the process is silent for IDLE_IN_TRANSACTION_SECONDS, or for ROUND_TRIPS round trips
    where those take longer. When the process dies PostgreSQL notices at once. `parameters` are PostgreSQL's, for this
    transaction.
    """
    with timed_transaction() as round_trip:
        fetch_one(f"SELECT {set_config_sql(idle_timeout(round_trip) | parameters)}")
        yield round_trip


_process = os.getpid()


@contextmanager
def database_connection() -> Iterator[None]:
    """Open a database connection for a job or a sweep, or use the one that is open.

    After a fork the inherited pool belongs to the parent: its connections are forgotten, not closed.
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
    """The connection parameters of DATABASE_URL, with default time-outs."""
    parameters: dict[str, Any] = dict(conninfo_to_dict(settings.database_url))
    parameters.setdefault("connect_timeout", 5)
    parameters.setdefault("application_name", "belfry")
    # A lost connection to a host is noticed within half a minute, in place of the kernel's two hours.
    parameters.setdefault("keepalives_idle", 10)
    parameters.setdefault("keepalives_interval", 5)
    parameters.setdefault("keepalives_count", 3)
    parameters.setdefault("tcp_user_timeout", 30_000)
    return parameters


ISOLATION = "READ COMMITTED"
"""Statements wait for locks, and what they read afterwards must be what others have committed."""
SESSION = {
    "default_transaction_isolation": ISOLATION,
    "client_encoding": "UTF8",  # other encodings cannot store all characters of a message
    "DateStyle": "ISO",  # the only style in which psycopg reads times with a time zone
}
"""Parameters that the code relies on, whatever the role or the database sets. The operator may choose those that only
cost time or make a statement fail with an error (time-outs, read-only transactions)."""


def configure_connection(connection: psycopg.Connection[Any]) -> None:
    """Set SESSION on a new connection, in one round trip. Call it on each connection that the product opens.

    It is a statement and not the connection's `options`, which PgBouncer refuses. Behind PgBouncer in transaction mode
    it reaches only one of many server connections: docs/guides/deploy.md says what to set there.
    """
    parameters = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in SESSION.items())
    connection.execute(f"SELECT {parameters}")


class _Adapter(Psycopg3Adapter):
    """peewee's adapter for psycopg 3, which configures each new connection."""

    def connect(self, *arguments: Any, **parameters: Any) -> psycopg.Connection[Any]:
        connection: psycopg.Connection[Any] = super().connect(*arguments, **parameters)  # type: ignore[no-untyped-call]
        connection.autocommit = True  # as peewee sets it next; what is set here must not wait for a commit
        configure_connection(connection)
        return connection


class Pool(PooledPostgresqlDatabase):  # type: ignore[misc]
    """peewee's pool, which hands out no connection that PostgreSQL has ended, as in a restart."""

    psycopg3_adapter = _Adapter

    def _is_closed(self, conn: psycopg.Connection[Any]) -> bool:
        if conn.closed:
            return True
        # An unused connection receives nothing, so that anything to read is its end or a notice of it.
        # peewee executes `SELECT 1` instead, which costs each request and job a round trip.
        readable = select.poll()
        readable.register(conn.fileno(), select.POLLIN)
        return bool(readable.poll(0))


def make_database() -> Pool:
    """A pool of connections to DATABASE_URL, one for each thread; no connection is opened yet."""
    parameters = connect_parameters()
    return Pool(
        parameters.pop("dbname"),
        max_connections=settings.web_threads + 3,  # for the sweeper, the streams and the commands
        stale_timeout=300,
        timeout=5,
        prefer_psycopg3=True,
        isolation_level=ISOLATION,  # is part of each BEGIN, which reaches every server connection behind PgBouncer
        **parameters,
    )


db = make_database()
