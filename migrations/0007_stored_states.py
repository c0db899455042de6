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

COLUMNS = """
ALTER TABLE preference ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE member_role ADD COLUMN IF NOT EXISTS added_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE channel_role ADD COLUMN IF NOT EXISTS added_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE user_account ADD COLUMN IF NOT EXISTS admin_changed_at timestamptz;
"""


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(COLUMNS)
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
    db.execute_sql(
        "ALTER TABLE preference DROP COLUMN updated_at;"
        "ALTER TABLE member_role DROP COLUMN added_at;"
        "ALTER TABLE channel_role DROP COLUMN added_at;"
        "ALTER TABLE user_account DROP COLUMN admin_changed_at"
    )
