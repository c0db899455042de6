"""States that the sweeper could not find, or that contradict themselves, are refused; and the inputs of decisions have
the time of their last change.

The constraints are added first, for which writers wait a moment, and hold for what is written from then on. What is
there already is read afterwards, beside the writers. Where that finds a row that breaks one, the constraint stays as it
is, and `verify` names the row.
"""

import logging
from typing import Any

from peewee import IntegrityError

log = logging.getLogger(__name__)

atomic = False  # each step commits by itself, and may be repeated

CONSTRAINTS = {
    "run_is_found": (
        "run",
        "state IN ('succeeded', 'failed') OR slices_left > 0 OR due_at IS NOT NULL",
    ),
    "run_has_attempts": ("run", "state NOT IN ('pending', 'queued') OR tries_left > 0"),
    "run_has_slices": ("run", "slices_left = 0 OR state IN ('running', 'failed')"),
    "run_decisions": ("run", "jsonb_typeof(decisions) = 'object'"),
    "slice_is_found": ("slice", "due_at IS NOT NULL OR tries_left = 0"),
}

COLUMNS = {
    "preference": "updated_at timestamptz NOT NULL DEFAULT now()",
    "member_role": "added_at timestamptz NOT NULL DEFAULT now()",
    "channel_role": "added_at timestamptz NOT NULL DEFAULT now()",
    "user_account": "admin_changed_at timestamptz",
}


def up(migrator: Any, db: Any) -> None:
    for table, column in COLUMNS.items():  # one lock at a time: two at once can be a deadlock with somebody who writes
        db.execute_sql(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {column}")
    for name, (table, condition) in CONSTRAINTS.items():
        db.execute_sql(
            f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name},"
            f" ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID"
        )
    for name, (table, _) in CONSTRAINTS.items():
        try:
            db.execute_sql(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
        except IntegrityError as error:
            log.warning("%s holds for new rows only, see `flask --app app verify`: %s", name, str(error).strip())


def down(migrator: Any, db: Any) -> None:
    for name, (table, _) in CONSTRAINTS.items():
        db.execute_sql(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}")
    for table, column in COLUMNS.items():
        db.execute_sql(f"ALTER TABLE {table} DROP COLUMN IF EXISTS {column.split()[0]}")
