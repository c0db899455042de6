"""What was told becomes a log, a row a transaction: the live stream goes on from it."""

from typing import Any

UP = """
CREATE TABLE telling (
    xid          xid8 PRIMARY KEY DEFAULT pg_current_xact_id(),
    message_ids  bigint[] NOT NULL,
    recount      boolean NOT NULL DEFAULT false,
    told_at      timestamptz NOT NULL DEFAULT now()
);
"""

DOWN = "DROP TABLE telling"


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(UP)


def down(migrator: Any, db: Any) -> None:
    db.execute_sql(DOWN)
