"""The few edits in the log of transactions are found by themselves: a mark leaves out what a later edit made a mention.

The index is made beside the writers.
"""

from typing import Any

atomic = False  # each step commits by itself, and may be repeated


def up(migrator: Any, db: Any) -> None:
    db.execute_sql("DROP INDEX IF EXISTS telling_recount")  # one that was not finished
    db.execute_sql("CREATE INDEX CONCURRENTLY telling_recount ON telling (xid) WHERE recount")


def down(migrator: Any, db: Any) -> None:
    db.execute_sql("DROP INDEX IF EXISTS telling_recount")
