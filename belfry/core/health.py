"""Check whether the database, Redis, the migrations and the partitions are in order."""

from collections.abc import Callable

from peewee import InterfaceError, OperationalError
from playhouse.pool import MaxConnectionsExceeded

from belfry.core import partitions
from belfry.core.db import fetch_one
from belfry.core.migrations import missing_migrations


def check_dependencies(redis_answers: Callable[[], bool]) -> dict[str, str]:
    """{"database", "redis", "migrations", "partitions"}: "ok", or what is wrong in a few words."""
    parts = {"database": "ok", "redis": "ok", "migrations": "ok", "partitions": "ok"}
    try:
        fetch_one("SELECT 1")
        missing = missing_migrations()
        if missing:
            parts["migrations"] = f"missing: {', '.join(missing)}"
            parts["partitions"] = "unknown until the migrations are applied"
        elif gaps := partitions.missing_ranges(ahead=False):
            parts["partitions"] = f"{len(gaps)} missing: some messages notify nobody; the worker's log says why"
    except (OperationalError, InterfaceError, MaxConnectionsExceeded):
        parts["database"] = "unavailable"
        parts["migrations"] = parts["partitions"] = "unknown while the database is unavailable"
    if not redis_answers():
        parts["redis"] = "unavailable"
    return parts
