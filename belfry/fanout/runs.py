"""Runs: create, find, list and replay them; their statistics."""

import re
from collections.abc import Sequence
from typing import Any

from psycopg.types.json import Jsonb

from belfry.core.db import Row, fetch_all, fetch_one, transaction
from belfry.core.errors import Conflict, Forbidden, NotFound
from belfry.core.failpoints import failpoint
from belfry.core.partitions import block_drops, oldest_retained_message_id
from belfry.fanout.claims import RETRY_GRACE_SECONDS
from belfry.fanout.decision import DECISIONS, NOTIFY_DECISIONS, load_fanout_message, next_slice_bounds, preview_replay
from config import settings
from models import RUN_STATES, UNFINISHED_STATES, User

_SELECT_RUNS_SQL = """
    SELECT run.id, run.message_id, run.kind, run.state, run.attempts, run.members_processed, run.members_total,
        run.decisions, run.notifications_inserted, run.notifications_retracted,
        COALESCE(run.error, (
            SELECT slice.error
            FROM slice
            WHERE slice.run_id = run.id
            AND slice.error IS NOT NULL
            ORDER BY slice.after_user_id
            LIMIT 1
        )) AS error,
        COALESCE(
            CASE WHEN run.state = 'queued' AND run.attempts > 0 THEN run.sweep_after END,
            (SELECT min(slice.sweep_after) FROM slice WHERE slice.run_id = run.id AND slice.error IS NOT NULL)
        ) - make_interval(secs => %(retry_grace)s) AS next_attempt_at,
        run.created_at, run.started_at, run.finished_at, msg.author_id
    FROM run
    JOIN message msg ON msg.id = run.message_id
"""
"""The error is the run's own, or that of a slice which is being retried."""


def create_run(
    message_id: int, kind: str, mention_diff: dict[str, Any] | None = None, *, state: str = "queued"
) -> int:
    """Insert a run for a message; its id. Call it in the message's own transaction.

    The state is `queued` at once where the job is enqueued right after the commit. If that fails,
    `recovery.mark_pending` makes it `pending`; if the process dies before that, the sweeper finds that the run is not
    in the queue.
    """
    created = fetch_one(
        "INSERT INTO run (message_id, kind, state, mention_diff)"
        " VALUES (%(message_id)s, %(kind)s, %(state)s, %(mention_diff)s)"
        " RETURNING id",
        {
            "message_id": message_id,
            "kind": kind,
            "state": state,
            "mention_diff": Jsonb(mention_diff) if mention_diff is not None else None,
        },
    )
    assert created is not None
    return int(created["id"])


_REASONS = (
    (r"ended without an error", "its worker was stopped"),
    (r"time-?out|canceling statement", "it took too long"),
    (r"disk|no space|read-only", "the database cannot store notifications"),
    (r"connect|closed|shutting down|starting up|OperationalError|InterfaceError", "the database is unavailable"),
)


def failure_reason(error: str) -> str:
    """What an error means, in words for members and without details: the first of _REASONS that it matches."""
    reasons = (reason for pattern, reason in _REASONS if re.search(pattern, error, re.IGNORECASE))
    return next(reasons, "an unexpected error occurred")


HIDDEN_ERROR = "The last attempt failed. Admins can see the error."


def _describe(run: Row, viewer: User | None) -> Row:
    """Add the progress and the statistics. Only admins see the error, which may name hosts and statements."""
    shown = {"reason": failure_reason(run["error"]) if run["error"] else None}
    if run["error"] and viewer and not viewer.is_admin:
        shown["error"] = HIDDEN_ERROR
    progress = {"done": run["members_processed"], "total": run["members_total"]}
    return {**run, **shown, "progress": progress, "stats": statistics(run)}


def find_run(run_id: int, viewer: User | None = None) -> Row:
    """Find one run, with its progress and statistics. `viewer` None is an operator, who may see everything.

    Raises NotFound where there is none, or the viewer is neither an admin nor the author of its message.
    """
    parameters = {"run_id": run_id, "retry_grace": RETRY_GRACE_SECONDS}
    found = fetch_one(f"{_SELECT_RUNS_SQL} WHERE run.id = %(run_id)s", parameters)
    if not found or not (viewer is None or viewer.is_admin or found["author_id"] == viewer.id):
        raise NotFound(f"There is no run {run_id}.")
    return _describe(found, viewer)


def list_runs(*, before: int | None, limit: int, state: str | None = None, channel_id: int | None = None) -> list[Row]:
    """List runs as `find_run` for an operator, with an id below `before` (None: all), newest first."""
    assert state is None or state in RUN_STATES
    found = fetch_all(
        f"{_SELECT_RUNS_SQL} WHERE true"
        + ("" if before is None else " AND run.id < %(before)s")
        + (f" AND run.state = '{state}'" if state else "")  # as a constant, so that the partial indexes are used
        + ("" if channel_id is None else " AND msg.channel_id = %(channel_id)s")
        + " ORDER BY run.id DESC"
        " LIMIT %(limit)s",
        {"before": before, "limit": limit, "channel_id": channel_id, "retry_grace": RETRY_GRACE_SECONDS},
    )
    return [_describe(run, None) for run in found]


def runs_of_messages(message_ids: Sequence[int]) -> dict[int, Row]:
    """The newest run of each message, by the message's id. Messages without a run are left out."""
    found = fetch_all(
        "SELECT DISTINCT ON (message_id) message_id, id, state FROM run"
        " WHERE message_id = ANY(%(message_ids)s::bigint[])"
        " ORDER BY message_id, id DESC",
        {"message_ids": list(message_ids)},
    )
    return {run["message_id"]: run for run in found}


def unfinished(run_ids: Sequence[int]) -> set[int]:
    """Which of these runs are unfinished."""
    found = fetch_all(
        "SELECT id FROM run WHERE id = ANY(%(run_ids)s::bigint[]) AND state IN ('pending', 'queued', 'running')",
        {"run_ids": list(run_ids)},
    )
    return {run["id"] for run in found}


def statistics(run: Row) -> dict[str, Any]:
    """A run's counts so far: {"audience", "notified", "decisions", "inserted", "retracted"}.

    `audience` is the number of members processed, and so the sum of `decisions`. `notified` is the sum of
    NOTIFY_DECISIONS. `inserted` and `retracted` are the notifications that this run inserted and deleted itself.
    """
    decisions = {decision: run["decisions"].get(decision, 0) for decision in DECISION_ORDER}
    return {
        "audience": run["members_processed"],
        "notified": sum(decisions[reason] for reason in NOTIFY_DECISIONS),
        "decisions": decisions,
        "inserted": run["notifications_inserted"],
        "retracted": run["notifications_retracted"],
    }


DECISION_ORDER = (
    "message", "mention", "mention_role", "mention_everyone", "author", "no_channel_access", "no_subscription",
    "channel_off", "mentions_only", "muted",
)  # as the API and the pages list them: NOTIFY_DECISIONS first  # fmt: skip
assert set(DECISION_ORDER) == set(DECISIONS)


def replay(run_id: int, *, dry_run: bool) -> dict[str, Any]:
    """Decide again for the whole audience, by the rules and members of now.

    Returns {"dry_run", "inserted", "unchanged", "decisions_before", "decisions_after", "run_id"}: how many
    notifications are missing, how many exist already, and the decisions of the run and of now. Where notifications are
    missing, and it is no dry run, a run of kind `replay` is created, which the caller enqueues; `run_id` is its id,
    otherwise None. Nobody is notified twice: existing notifications are kept.

    Raises NotFound for an unknown run, Forbidden for a deleted message, Conflict for a message past retention, whose
    members would all be notified again.
    """
    run = find_run(run_id)
    with transaction():
        block_drops(writing=False)
        if run["message_id"] < oldest_retained_message_id():
            raise Conflict("The message is older than RETENTION_DAYS: its notifications are not stored any more.")
        message = load_fanout_message(run["message_id"])
        assert message is not None  # run.message_id is a foreign key
        if message.deleted:
            raise Forbidden("The message has been deleted, so nobody is to be notified of it.")
        missing, existing, decisions = 0, 0, dict.fromkeys(DECISION_ORDER, 0)
        after_user_id = 0
        while (bounds := next_slice_bounds(message, after_user_id, settings.fanout_slice_size))["members"]:
            for group in preview_replay(message, after_user_id, bounds["to_user_id"]):
                decisions[group["decision"]] += group["members"]
                if group["notified"]:
                    existing += group["members"]
                elif group["decision"] in NOTIFY_DECISIONS:
                    missing += group["members"]
            after_user_id = bounds["to_user_id"]
        new_run = create_run(run["message_id"], "replay") if missing and not dry_run else None
    if new_run:
        failpoint("replay.committed", new_run)
    return {
        "dry_run": dry_run,
        "inserted": missing,
        "unchanged": existing,
        "decisions_before": statistics(run)["decisions"],
        "decisions_after": decisions,
        "run_id": new_run,
    }


def count_unfinished() -> dict[str, Any]:
    """Count the unfinished and failed runs: {"states": {STATE: count}, "oldest_seconds": age of the oldest unfinished}.

    Reads only the two partial indexes, never the finished runs.
    """
    states = dict.fromkeys((*UNFINISHED_STATES, "failed"), 0)
    oldest = 0.0
    for found in fetch_all(
        "SELECT state, count(*) AS runs, EXTRACT(epoch FROM now() - min(created_at))::float AS oldest_seconds"
        " FROM run"
        " WHERE state IN ('pending', 'queued', 'running')"
        " GROUP BY state"
    ):
        states[found["state"]] = found["runs"]
        oldest = max(oldest, found["oldest_seconds"])
    failed = fetch_one("SELECT count(*) AS runs FROM run WHERE state = 'failed'")
    states["failed"] = failed["runs"] if failed else 0
    return {"states": states, "oldest_seconds": oldest}
