"""An unlogged table tells a crash of the database: PostgreSQL empties it in recovery, and on promotion of a standby."""

from typing import Any

UP = """
CREATE UNLOGGED TABLE stream_epoch (
    one          boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch        uuid NOT NULL DEFAULT gen_random_uuid()
);
"""

DOWN = "DROP TABLE stream_epoch"


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(UP)


def down(migrator: Any, db: Any) -> None:
    db.execute_sql(DOWN)
