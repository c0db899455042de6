"""Migrate the database to the schema of this release, and check that it is there."""

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
    """Apply the missing migrations in order; their names, [] where all were applied.

    Concurrent calls take turns: the second waits and finds nothing to do. It waits between statements and not within
    one, because `CREATE INDEX CONCURRENTLY` waits for every statement in progress.
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
    """The names of the migrations of this release that are not applied."""
    there = fetch_one("SELECT to_regclass('schema_migration') IS NOT NULL AS there")
    applied = set(_runner().applied()) if there and there["there"] else set()
    return [path.stem for path in sorted(MIGRATIONS.glob("[0-9]*.py")) if path.stem not in applied]
