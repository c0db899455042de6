"""An unlogged table tells a crash of the database: PostgreSQL empties it in recovery, and on promotion of a standby.

And the log says what each transaction saw, found by its time, so that a mark leaves out what came later. The rows that
there are have the migration's own snapshot: marks go by them as before.

The index is made beside the writers.
"""

from typing import Any

atomic = False  # each step commits by itself, and may be repeated

UP = (
    "CREATE UNLOGGED TABLE IF NOT EXISTS stream_epoch ("
    "    one          boolean PRIMARY KEY DEFAULT true CHECK (one),"
    "    epoch        uuid NOT NULL DEFAULT gen_random_uuid()"
    ")",
    "ALTER TABLE telling ADD COLUMN IF NOT EXISTS snapshot pg_snapshot NOT NULL DEFAULT pg_current_snapshot()",
    "DROP INDEX IF EXISTS telling_told_at",  # one that was not finished
    "CREATE INDEX CONCURRENTLY telling_told_at ON telling (told_at)",
)

DOWN = (
    "DROP INDEX IF EXISTS telling_told_at",
    "ALTER TABLE telling DROP COLUMN IF EXISTS snapshot",
    "DROP TABLE IF EXISTS stream_epoch",
)


def up(migrator: Any, db: Any) -> None:
    for statement in UP:
        db.execute_sql(statement)


def down(migrator: Any, db: Any) -> None:
    for statement in DOWN:
        db.execute_sql(statement)
