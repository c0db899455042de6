"""Bringing the database to the shape that this release needs, and asking whether it is there."""

import logging
import time
from pathlib import Path

from playhouse.migrations import Runner

from belfry.core.db import db, execute, fetch_all, fetch_one
from belfry.core.locks import MIGRATION_LOCK

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[2] / "migrations"


def _runner() -> Runner:
    return Runner(db, directory=str(MIGRATIONS), table_name="schema_migration")


def migrate() -> list[str]:
    """Apply what is missing, in order; the names of those applied, [] when all were there.

    Two at once take turns: the second waits, and finds nothing left to do. It waits between statements, not in one: an
    index that is made CONCURRENTLY waits for every statement that runs.
    """
    with db.connection_context():
        while fetch_all("SELECT pg_try_advisory_lock(%(key)s) AS held", {"key": MIGRATION_LOCK}) == [{"held": False}]:
            time.sleep(0.1)
        try:
            applied: list[str] = _runner().up()
        finally:
            execute("SELECT pg_advisory_unlock(%(key)s)", {"key": MIGRATION_LOCK})
    return applied


def missing_migrations() -> list[str]:
    """The names of the migrations that this release has and the database has not."""
    there = fetch_one("SELECT to_regclass('schema_migration') IS NOT NULL AS there")
    applied = set(_runner().applied()) if there and there["there"] else set()
    return [path.stem for path in sorted(MIGRATIONS.glob("[0-9]*.py")) if path.stem not in applied]
