"""An unlogged table tells a crash of the database: PostgreSQL empties it in recovery, and on promotion of a standby.

And the log says what each transaction saw, found by its time, so that a mark leaves out what came later. The rows that
there are have the migration's own snapshot: marks go by them as before.
"""

from typing import Any

UP = """
CREATE UNLOGGED TABLE stream_epoch (
    one          boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch        uuid NOT NULL DEFAULT gen_random_uuid()
);
ALTER TABLE telling ADD COLUMN snapshot pg_snapshot NOT NULL DEFAULT pg_current_snapshot();
CREATE INDEX telling_told_at ON telling (told_at);
"""

DOWN = """
DROP INDEX telling_told_at;
ALTER TABLE telling DROP COLUMN snapshot;
DROP TABLE stream_epoch;
"""


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(UP)


def down(migrator: Any, db: Any) -> None:
    db.execute_sql(DOWN)
