"""Sessions of browsers are rows, so that they can be ended. Cookies of before count no more: users sign in again."""

from typing import Any

UP = """
CREATE TABLE session (
    session_hash  bytea PRIMARY KEY CHECK (octet_length(session_hash) = 32),
    token_id      bigint NOT NULL REFERENCES api_token ON DELETE CASCADE,
    created_at    timestamptz NOT NULL DEFAULT now(),
    last_seen_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX session_token_id ON session (token_id);
CREATE INDEX session_last_seen_at ON session (last_seen_at);
"""

DOWN = "DROP TABLE session"


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(UP)


def down(migrator: Any, db: Any) -> None:
    db.execute_sql(DOWN)
