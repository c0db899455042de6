"""Usernames are in the order of their bytes: their one index finds a name, and all that begin with something."""

from typing import Any


def up(migrator: Any, db: Any) -> None:
    db.execute_sql('ALTER TABLE user_account ALTER COLUMN username TYPE text COLLATE "C"')


def down(migrator: Any, db: Any) -> None:
    db.execute_sql('ALTER TABLE user_account ALTER COLUMN username TYPE text COLLATE "default"')
