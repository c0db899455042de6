"""Find work items that nobody finished, for the sweeper: enqueue them again, or fail them when no attempt is left."""

from collections.abc import Sequence

from belfry.core.db import execute, fetch_all, transaction
from belfry.fanout.claims import _ERROR_SQL, _RECORD_RUN_FAILURES_SQL, _RECORD_SLICE_FAILURES_SQL, WorkItem
from models import MAX_ATTEMPTS, QUEUED_SECONDS

_IS_DUE_SQL = "due_at <= now() - make_interval(secs => %(grace)s)"
"""`grace`: seconds more that a work item is left alone, since whoever claimed it may wait for PostgreSQL's answer."""


def fail_exhausted(grace: float = 0) -> int:
    """Fail what has used up its tries, and whose last attempt ended without a word; how many parts that were."""
    which = f"tries_left = 0 AND {_IS_DUE_SQL}"
    parameters = {"reason": None, "retry_in": 0, "grace": grace}
    return sum(
        execute(statement.format(which=which, reason=_ERROR_SQL, of_others="SKIP LOCKED"), parameters)
        for statement in (_RECORD_RUN_FAILURES_SQL, _RECORD_SLICE_FAILURES_SQL)
    )


_REQUEUE_RUNS_SQL = f"""
    WITH found AS (
        SELECT id AS run_id
        FROM run
        WHERE {{which}}
        AND {_IS_DUE_SQL}
        AND tries_left > 0
        ORDER BY due_at
        LIMIT %(limit)s
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE run
    SET state = 'queued', due_at = now() + make_interval(secs => {QUEUED_SECONDS})
    FROM found
    WHERE run.id = found.run_id
    RETURNING run_id
"""

_REQUEUE_SLICES_SQL = f"""
    WITH found AS (
        SELECT run_id, after
        FROM slice
        WHERE {_IS_DUE_SQL}
        AND tries_left > 0
        AND (%(run_id)s::bigint IS NULL OR (run_id, after) < (%(run_id)s, %(after)s))
        ORDER BY due_at
        LIMIT %(limit)s
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE slice
    SET due_at = now() + make_interval(secs => {QUEUED_SECONDS})
    FROM found
    WHERE (slice.run_id, slice.after) = (found.run_id, found.after)
    RETURNING slice.run_id, slice.after
"""

SWEEP_BATCH_SIZE = 10_000  # of runs, and of slices, that are found in one sweep: as many as a queue holds


def queue_pending_runs(room: int) -> list[WorkItem]:
    """Mark as queued the runs that never reached the queue, and answer them, to be enqueued: the oldest `room`."""
    statement = _REQUEUE_RUNS_SQL.format(which="state = 'pending'")
    return sorted(WorkItem(**run) for run in fetch_all(statement, {"limit": room, "grace": 0})) if room > 0 else []


def requeue_lost_runs(oldest: WorkItem | None, grace: float = 0) -> list[WorkItem]:
    """Mark as queued the runs that nobody takes care of any more, and answer them, to be enqueued.

    - What was left by a worker that died.
    - What was queued, and is in the queue no longer: `oldest`, the part whose job has waited there longest, is a
      later one; or nothing waits there (None).

    Two at once take different ones.
    """
    which = """
        (state = 'running' OR (state = 'queued' AND (%(oldest)s::bigint IS NULL OR id < %(oldest)s)))
    """
    parameters = {"limit": SWEEP_BATCH_SIZE, "oldest": oldest.run_id if oldest else None, "grace": grace}
    found = fetch_all(_REQUEUE_RUNS_SQL.format(which=which), parameters)
    return sorted(WorkItem(**run) for run in found)


def requeue_lost_slices(oldest: WorkItem | None, grace: float = 0) -> list[WorkItem]:
    """As `requeue_lost_runs`, of slices; those that found no room in the queue as well."""
    key = vars(oldest) if oldest else {"run_id": None, "after": None}
    found = fetch_all(_REQUEUE_SLICES_SQL, {"limit": SWEEP_BATCH_SIZE, "grace": grace, **key})
    return sorted(WorkItem(**one) for one in found)


def mark_pending(run_ids: Sequence[int]) -> None:
    """These are not in the queue: they are `pending`, and the sweeper's. Nobody waits for the disk."""
    execute(
        "UPDATE run SET state = 'pending', due_at = now()"
        " FROM (SELECT set_config('synchronous_commit', 'off', true)) AS lazily"
        " WHERE id = ANY(%(run_ids)s::bigint[])"
        " AND state = 'queued'",
        {"run_ids": list(run_ids)},
    )


def retry_failed(run_ids: Sequence[int] | None = None) -> list[WorkItem]:
    """Begin failed runs again, all or those named: with all their tries, and their progress. The parts to enqueue."""
    parameters = {"run_ids": list(run_ids) if run_ids is not None else None, "tries": MAX_ATTEMPTS}
    with transaction():
        runs = fetch_all(
            f"""
            UPDATE run
            SET state = CASE WHEN slices_left > 0 THEN 'running' ELSE 'queued' END,
                due_at = CASE WHEN slices_left = 0 THEN now() + make_interval(secs => {QUEUED_SECONDS}) END,
                tries_left = %(tries)s,
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
            SET due_at = now() + make_interval(secs => {QUEUED_SECONDS}), tries_left = %(tries)s, error = NULL
            WHERE run_id = ANY(%(begun)s::bigint[])
            AND due_at IS NULL
            RETURNING run_id, after
            """,
            {**parameters, "begun": [run["run_id"] for run in runs]},
        )
    own = [WorkItem(run["run_id"]) for run in runs if not run["slices_left"]]
    return sorted(own) + sorted(WorkItem(**one) for one in slices)
