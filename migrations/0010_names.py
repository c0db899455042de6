"""Rename tables and columns to the terms of docs/glossary.md, and the decisions in the statistics of runs.

Processes of the previous release cannot use the new names: stop them before this migration.
"""

from typing import Any

TABLES = {"telling": "notification_log"}
COLUMNS = {
    "run": {
        "tries_left": "attempts_left",
        "done": "members_processed",
        "total": "members_total",
        "added": "notifications_inserted",
        "withdrawn": "notifications_retracted",
        "mention_changes": "mention_diff",
        "due_at": "sweep_after",
    },
    "slice": {
        "after": "after_user_id",
        "up_to": "to_user_id",
        "told_first": "excluded_user_ids",
        "tries_left": "attempts_left",
        "due_at": "sweep_after",
    },
    "message": {"only_for_id": "visible_to_user_id"},
    "notification_log": {"told_at": "notified_at", "recount": "counts_changed"},
}
CONSTRAINTS = {"run": {"run_says_why": "run_failed_has_error", "run_finished": "run_finished_at_set"}}
DECISIONS = {"preference_none": "channel_off", "preference_mentions": "mentions_only"}
PARTITIONS = ("notification_to_", "notification_before_")


def up(migrator: Any, db: Any) -> None:
    for old, new in TABLES.items():
        _rename_table(db, old, new)
    _rename_columns(db, COLUMNS, CONSTRAINTS)
    _rename_decisions(db, DECISIONS)
    _rename_partitions(db, *PARTITIONS)


def down(migrator: Any, db: Any) -> None:
    _rename_partitions(db, *reversed(PARTITIONS))
    _rename_decisions(db, _reverse(DECISIONS))
    _rename_columns(
        db,
        {table: _reverse(columns) for table, columns in COLUMNS.items()},
        {table: _reverse(constraints) for table, constraints in CONSTRAINTS.items()},
    )
    for old, new in TABLES.items():
        _rename_table(db, new, old)


def _reverse(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _rename_table(db: Any, old: str, new: str) -> None:
    db.execute_sql(f"ALTER TABLE {old} RENAME TO {new}")
    _rename_owned(db, new, f"{old}_", f"{new}_")


def _rename_columns(db: Any, columns: dict[str, dict[str, str]], constraints: dict[str, dict[str, str]]) -> None:
    for table, names in columns.items():
        for old, new in names.items():
            db.execute_sql(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
            _rename_owned(db, table, f"{table}_{old}", f"{table}_{new}")
    for table, names in constraints.items():
        for old, new in names.items():
            db.execute_sql(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")


def _rename_owned(db: Any, table: str, old: str, new: str) -> None:
    """Rename the constraints and indexes of a table whose name begins with `old`, as PostgreSQL named them."""
    end = "" if old.endswith("_") else "(_|$)"
    constraints = db.execute_sql(
        "SELECT conname FROM pg_constraint WHERE conrelid = %s::regclass AND conname ~ %s", (table, f"^{old}{end}")
    ).fetchall()
    for (name,) in constraints:
        db.execute_sql(f"ALTER TABLE {table} RENAME CONSTRAINT {name} TO {new}{name[len(old) :]}")
    indexes = db.execute_sql(
        "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass"
        " AND indexrelid::regclass::text ~ %s", (table, f"^{old}{end}"),
    ).fetchall()  # fmt: skip
    for (name,) in indexes:
        db.execute_sql(f"ALTER INDEX {name} RENAME TO {new}{name[len(old) :]}")


def _rename_decisions(db: Any, names: dict[str, str]) -> None:
    for old, new in names.items():
        db.execute_sql(
            "UPDATE run SET decisions = (decisions - %s) || jsonb_build_object(%s::text, decisions -> %s)"
            " WHERE decisions ? %s",
            (old, new, old, old),
        )


def _rename_partitions(db: Any, old: str, new: str) -> None:
    found = db.execute_sql(
        "SELECT relname, relkind FROM pg_class WHERE relname ~ %s AND relkind IN ('r', 'i')", (f"^{old}[0-9]+",)
    ).fetchall()
    for name, kind in sorted(found):
        db.execute_sql(f"ALTER {'TABLE' if kind == 'r' else 'INDEX'} {name} RENAME TO {new}{name[len(old) :]}")
