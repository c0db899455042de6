"""An index of the words of messages, for the search. It is created while others write."""

from typing import Any

atomic = False  # CREATE INDEX CONCURRENTLY does not run in a transaction; each step may be repeated


def up(migrator: Any, db: Any) -> None:
    db.execute_sql("DROP INDEX IF EXISTS message_words")  # one that was not finished
    db.execute_sql(
        "CREATE INDEX CONCURRENTLY message_words ON message USING gin (to_tsvector('simple'::regconfig, content))"
    )


def down(migrator: Any, db: Any) -> None:
    db.execute_sql("DROP INDEX IF EXISTS message_words")
