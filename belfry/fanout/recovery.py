"""Find the work items that nobody finished, for the sweeper: enqueue them again, or fail them without attempts left."""

from collections.abc import Sequence

from belfry.core.db import execute, fetch_all, transaction
from belfry.fanout.claims import WorkItem, fail_runs_sql, fail_slices_sql
from models import MAX_ATTEMPTS, QUEUED_SECONDS

_IS_DUE_SQL = "sweep_after <= now() - make_interval(secs => %(grace)s)"
"""`grace`: seconds that a work item is left alone longer, because its worker may wait for PostgreSQL's answer."""

_IS_EXHAUSTED_SQL = f"attempts_left = 0 AND {_IS_DUE_SQL}"

_FAIL_EXHAUSTED_SQL = (
    fail_runs_sql(_IS_EXHAUSTED_SQL, "SKIP LOCKED"),
    fail_slices_sql(_IS_EXHAUSTED_SQL, "SKIP LOCKED"),
)


def fail_exhausted(grace: float = 0) -> list[tuple[WorkItem, str]]:
    """Fail the work items without attempts left whose last attempt ended without an error; each with its error."""
    parameters = {"error": None, "retry_in": 0, "grace": grace}
    failed = [row for statement in _FAIL_EXHAUSTED_SQL for row in fetch_all(statement, parameters)]
    return [(WorkItem(row["run_id"], row.get("after_user_id")), row["error"]) for row in failed]


def _requeue_runs_sql(condition: str) -> str:
    """Mark as queued, oldest first, at most %(limit)s due runs that meet a condition; locked rows are skipped."""
    return f"""
    WITH found AS (
        SELECT id AS run_id
        FROM run
        WHERE {condition}
        AND {_IS_DUE_SQL}
        AND attempts_left > 0
        ORDER BY sweep_after
        LIMIT %(limit)s
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE run
    SET state = 'queued', sweep_after = now() + make_interval(secs => {QUEUED_SECONDS})
    FROM found
    WHERE run.id = found.run_id
    RETURNING run_id
"""


_QUEUE_PENDING_RUNS_SQL = _requeue_runs_sql("state = 'pending'")
_REQUEUE_LOST_RUNS_SQL = _requeue_runs_sql(
    "(state = 'running' OR (state = 'queued' AND (%(oldest)s::bigint IS NULL OR id < %(oldest)s)))"
)

_REQUEUE_LOST_SLICES_SQL = f"""
    WITH found AS (
        SELECT run_id, after_user_id
        FROM slice
        WHERE {_IS_DUE_SQL}
        AND attempts_left > 0
        AND (%(run_id)s::bigint IS NULL OR (run_id, after_user_id) < (%(run_id)s, %(after_user_id)s))
        ORDER BY sweep_after
        LIMIT %(limit)s
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE slice
    SET sweep_after = now() + make_interval(secs => {QUEUED_SECONDS})
    FROM found
    WHERE (slice.run_id, slice.after_user_id) = (found.run_id, found.after_user_id)
    RETURNING slice.run_id, slice.after_user_id
"""

SWEEP_BATCH_SIZE = 10_000  # runs, and slices, that one sweep enqueues again: as many as a queue holds


def queue_pending_runs(room: int) -> list[WorkItem]:
    """Mark the oldest `room` runs that never reached the queue as queued, and return them, to be enqueued."""
    if room <= 0:
        return []
    return sorted(WorkItem(**run) for run in fetch_all(_QUEUE_PENDING_RUNS_SQL, {"limit": room, "grace": 0}))


def requeue_lost_runs(oldest: WorkItem | None, grace: float = 0) -> list[WorkItem]:
    """Mark lost runs as queued, and return them, to be enqueued. Concurrent calls return different runs.

    A run is lost if its worker died, or if it was queued and is not in the queue any more: `oldest`, the work item at
    the head of the queue, is a later one, or the queue is empty (None).
    """
    parameters = {"limit": SWEEP_BATCH_SIZE, "oldest": oldest.run_id if oldest else None, "grace": grace}
    return sorted(WorkItem(**run) for run in fetch_all(_REQUEUE_LOST_RUNS_SQL, parameters))


def requeue_lost_slices(oldest: WorkItem | None, grace: float = 0) -> list[WorkItem]:
    """As `requeue_lost_runs`, for slices; those that did not fit into the queue are included."""
    key = oldest._asdict() if oldest else {"run_id": None, "after_user_id": None}
    found = fetch_all(_REQUEUE_LOST_SLICES_SQL, {"limit": SWEEP_BATCH_SIZE, "grace": grace, **key})
    return sorted(WorkItem(**item) for item in found)


def mark_pending(run_ids: Sequence[int]) -> None:
    """Mark queued runs that could not be enqueued as `pending`, for the sweeper. Does not wait for the disk."""
    execute(
        "UPDATE run SET state = 'pending', sweep_after = now()"
        " FROM (SELECT set_config('synchronous_commit', 'off', true)) AS async_commit"
        " WHERE id = ANY(%(run_ids)s::bigint[])"
        " AND state = 'queued'",
        {"run_ids": list(run_ids)},
    )


def retry_failed(run_ids: Sequence[int] | None = None) -> list[WorkItem]:
    """Begin failed runs again, those with the given ids or all (None), with all attempts and their progress so far.

    Returns the work items to enqueue, [] where no run has failed.
    """
    parameters = {"run_ids": list(run_ids) if run_ids is not None else None, "attempts": MAX_ATTEMPTS}
    with transaction():
        runs = fetch_all(
            f"""
            UPDATE run
            SET state = CASE WHEN slices_left > 0 THEN 'running' ELSE 'queued' END,
                sweep_after = CASE WHEN slices_left = 0 THEN now() + make_interval(secs => {QUEUED_SECONDS}) END,
                attempts_left = %(attempts)s,
                error = NULL,
                finished_at = NULL
            WHERE state = 'failed'
            AND (%(run_ids)s::bigint[] IS NULL OR id = ANY(%(run_ids)s::bigint[]))
            RETURNING id AS run_id, slices_left
            """,
            parameters,
        )
        slices = fetch_all(
            f"""
            UPDATE slice
            SET sweep_after = now() + make_interval(secs => {QUEUED_SECONDS}),
                attempts_left = %(attempts)s,
                error = NULL
            WHERE run_id = ANY(%(retried)s::bigint[])
            AND sweep_after IS NULL
            RETURNING run_id, after_user_id
            """,
            {**parameters, "retried": [run["run_id"] for run in runs]},
        )
    small_runs = [WorkItem(run["run_id"]) for run in runs if not run["slices_left"]]
    return sorted(small_runs) + sorted(WorkItem(**item) for item in slices)
