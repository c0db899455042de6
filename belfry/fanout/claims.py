"""Claim work items, so that each is processed once, whatever dies or hangs.

- **The lease is the lock on the row** of the run or slice, held by the transaction that processes it. PostgreSQL
  releases it when the worker's connection ends (during a statement: when the statement ends, well under a second for
  a slice), and after IDLE_IN_TRANSACTION_SECONDS from a worker that hangs. No clocks are compared and no heartbeats
  are sent: a heartbeat would still say "alive" for a process whose work hangs.
- **The attempt's number is its token.** It is incremented and committed before the work begins. So an attempt that
  ends without recording a failure still counts, and a worker that comes back late finds a newer attempt and writes
  nothing.
- **`sweep_after` says from when the sweeper may enqueue the item again.** Until then a job is expected to process it.
  Only the database's clock is read.
"""

from collections.abc import Sequence
from typing import NamedTuple

from belfry.core.db import Row, execute, fetch_all, fetch_one, set_config_sql
from belfry.core.locks import MESSAGE_LOCK
from models import MAX_ATTEMPTS

_SWEEP_BACKOFF_SQL = f"make_interval(secs => LEAST(15, 2 * power(2, {MAX_ATTEMPTS} - attempts_left)))"
"""How long after the begin of an attempt the sweeper leaves the item alone: 2, 4, 8, 15, 15, 15 s.

The row is locked within milliseconds after that, and a locked row is skipped. So the interval matters only where the
lock was released without a result. It grows so that a series of crashes does not use up all attempts at once, and is
bounded so that work resumes within 30 s. Where PostgreSQL answers slowly the sweeper waits longer (`grace`), and an
attempt that was overtaken is given back (`release`): slowness alone does not fail a run.
"""


RETRY_GRACE_SECONDS = 5
"""How long after a retry is due the sweeper takes it for lost."""

_IS_OLD_SQL = "(created_at < now() - interval '1 day')"
"""Whether a run is older than the shortest RETENTION_DAYS, so that its notifications may have been dropped."""


class WorkItem(NamedTuple):
    """What one job processes: a run's first work item, or the slice of it that begins after a user id."""

    run_id: int
    after_user_id: int | None = None

    @property
    def is_run(self) -> bool:
        return self.after_user_id is None

    def __str__(self) -> str:
        return f"run {self.run_id}" + ("" if self.is_run else f", slice after {self.after_user_id}")


_CLAIM_RUN_SQL = f"""
    UPDATE run
    SET state = 'running',
        attempts = attempts + 1,
        attempts_left = attempts_left - 1,
        started_at = COALESCE(started_at, now()),
        sweep_after = clock_timestamp() + {_SWEEP_BACKOFF_SQL}
    WHERE id = (SELECT id FROM run WHERE id = %(run_id)s FOR NO KEY UPDATE SKIP LOCKED)
    AND slices_left = 0
    AND state IN ('pending', 'queued', 'running')
    AND attempts_left > 0
    RETURNING attempts
"""

_CLAIM_SLICE_SQL = f"""
    UPDATE slice
    SET attempts = attempts + 1,
        attempts_left = attempts_left - 1,
        sweep_after = clock_timestamp() + {_SWEEP_BACKOFF_SQL}
    WHERE (run_id, after_user_id) = (
        SELECT run_id, after_user_id
        FROM slice
        WHERE run_id = %(run_id)s
        AND after_user_id = %(after_user_id)s
        FOR NO KEY UPDATE SKIP LOCKED)
    AND attempts_left > 0
    RETURNING attempts
"""


_CLAIM_BATCH_SQL = f"""
    WITH candidate AS (
        SELECT id, message_id
        FROM run
        WHERE id = ANY(%(run_ids)s::bigint[])
        AND kind NOT IN ('edit', 'replay')
        AND state IN ('pending', 'queued')
        AND attempts = 0
        AND NOT {_IS_OLD_SQL}
        FOR NO KEY UPDATE SKIP LOCKED
    ),
    located AS (
        SELECT DISTINCT ON (candidate.message_id) candidate.id, chan.server_id
        FROM candidate
        JOIN message msg ON msg.id = candidate.message_id
        JOIN channel chan ON chan.id = msg.channel_id
        ORDER BY candidate.message_id, candidate.id
    ),
    sized AS MATERIALIZED (
        SELECT server_id, (
            SELECT count(*)
            FROM (
                SELECT
                FROM member
                WHERE member.server_id = srv.server_id
                ORDER BY member.user_id  -- by the key: a small server's members are not searched for among all
                LIMIT %(members)s + 1
            ) first_members
        ) AS members
        FROM (SELECT DISTINCT server_id FROM located) srv
    ),
    chosen AS (
        SELECT id, sum(members) OVER (ORDER BY id <> %(first)s, id) AS members
        FROM located
        JOIN sized USING (server_id)
        WHERE members <= %(members)s
    )
    UPDATE run
    SET state = 'running',
        attempts = 1,
        attempts_left = attempts_left - 1,
        started_at = now(),
        sweep_after = clock_timestamp() + {_SWEEP_BACKOFF_SQL}
    FROM chosen, (SELECT set_config('synchronous_commit', 'off', true)) AS async_commit
    WHERE run.id = chosen.id
    AND chosen.members <= %(members)s
    RETURNING run.id AS run_id
"""


def claim_batch(first: int, others: Sequence[int], members: int) -> list[int]:
    """Claim the first attempt of a run, and of others that nobody has claimed, with at most `members` members in all.

    Returns the ids of the claimed runs, [] where none can be claimed. Edits and replays, runs that were tried before
    or are older than a day, and runs with larger audiences are never claimed here. They are processed one by one, so
    that a run that kills or delays its worker costs no other run an attempt. The commit does not wait for the disk: if
    it is lost, so is the attempt.
    """
    parameters = {"first": first, "run_ids": [first, *others], "members": members}
    return sorted(run["run_id"] for run in fetch_all(_CLAIM_BATCH_SQL, parameters))


def claim(item: WorkItem) -> int | None:
    """Claim one more attempt of a work item; its number, which is the token for `lock_claimed` and `record_failure`.

    None where there is nothing to claim: the item is done, has failed, has no attempts left, or is locked by another
    worker, which is then responsible for it.
    """
    claimed = fetch_one(_CLAIM_RUN_SQL if item.is_run else _CLAIM_SLICE_SQL, item._asdict())
    return int(claimed["attempts"]) if claimed else None


def _lock_sql(select_item: str) -> str:
    """Lock the item, then its message: while this waits for the message, the sweeper skips the locked item."""
    return f"""
    WITH locked AS MATERIALIZED ({select_item})
    SELECT locked.*, pg_advisory_xact_lock_shared({MESSAGE_LOCK}, (message_id %% 2147483647)::int) AS shared
    FROM locked
"""


_LOCK_RUN_SQL = _lock_sql(f"""
        SELECT message_id, kind, mention_diff, {_IS_OLD_SQL} AS is_old
        FROM run
        WHERE id = %(run_id)s
        AND slices_left = 0
        AND state = 'running'
        AND attempts = %(attempt)s
        FOR NO KEY UPDATE
    """)

_LOCK_SLICE_SQL = _lock_sql(f"""
        SELECT run.message_id, run.kind, run.mention_diff, {_IS_OLD_SQL} AS is_old,
            slice.to_user_id, slice.excluded_user_ids::text
        FROM slice
        JOIN run ON run.id = slice.run_id
        WHERE slice.run_id = %(run_id)s
        AND slice.after_user_id = %(after_user_id)s
        AND slice.attempts = %(attempt)s
        FOR NO KEY UPDATE OF slice
    """)


def lock_claimed(item: WorkItem, attempt: int) -> Row | None:
    """Lock a work item, and its message against changes, until the transaction ends.

    Returns {"message_id", "kind", "mention_diff", "is_old"}, and for a slice also {"to_user_id", "excluded_user_ids"}.
    None where a newer attempt has begun. Read the message after this call: a change that was in progress has committed
    then.
    """
    return fetch_one(_LOCK_RUN_SQL if item.is_run else _LOCK_SLICE_SQL, {**item._asdict(), "attempt": attempt})


_RELEASE_RUN_SQL = f"""
    UPDATE run
    SET attempts_left = attempts_left + 1
    WHERE id = (SELECT id FROM run WHERE id = %(run_id)s FOR NO KEY UPDATE SKIP LOCKED)
    AND slices_left = 0
    AND state IN ('queued', 'running')
    AND attempts_left < {MAX_ATTEMPTS}
"""

_RELEASE_SLICE_SQL = f"""
    UPDATE slice
    SET attempts_left = attempts_left + 1
    WHERE (run_id, after_user_id) = (
        SELECT run_id, after_user_id
        FROM slice
        WHERE run_id = %(run_id)s
        AND after_user_id = %(after_user_id)s
        FOR NO KEY UPDATE SKIP LOCKED)
    AND sweep_after IS NOT NULL
    AND attempts_left < {MAX_ATTEMPTS}
"""


def release(item: WorkItem) -> None:
    """Give back an attempt that a newer one has overtaken (`lock_claimed` returned None): it was slow and did not fail.

    Nothing changes where the item is done, has failed, or is locked.
    """
    execute(_RELEASE_RUN_SQL if item.is_run else _RELEASE_SLICE_SQL, item._asdict())


def lock_batch(run_ids: Sequence[int], parameters: dict[str, str]) -> list[Row]:
    """Lock the runs that `claim_batch` returned: {"run_id", "message_id"} of those whose message is not being changed.

    The others are left out, so that the rest of the batch does not wait. Must be the first statement of a transaction;
    it also sets PostgreSQL's `parameters` for the rest of it, which saves a statement for each batch.
    """
    locked = fetch_all(
        f"""
        WITH locked AS MATERIALIZED (
            SELECT id AS run_id, message_id
            FROM run
            WHERE id = ANY(%(run_ids)s::bigint[])
            AND state = 'running'
            AND attempts = 1
            ORDER BY id
            FOR NO KEY UPDATE SKIP LOCKED
        ),
        configured AS MATERIALIZED (SELECT {set_config_sql(parameters)})
        SELECT run_id, message_id,
            pg_try_advisory_xact_lock_shared({MESSAGE_LOCK}, (message_id %% 2147483647)::int) AS shared
        FROM configured
        LEFT JOIN locked ON true
        """,
        {"run_ids": list(run_ids)},
    )
    return [run for run in locked if run["shared"]]


def lock_message_exclusive(message_id: int) -> None:
    """Wait until no work item of a message is being processed, and let none begin until the transaction ends."""
    execute(
        f"SELECT pg_advisory_xact_lock({MESSAGE_LOCK}, (%(message_id)s::bigint %% 2147483647)::int)",
        {"message_id": message_id},
    )


_ERROR_SQL = """COALESCE(%(error)s, error,
    'failed after ' || attempts || ' attempts that ended without an error, as when their process is killed')"""


def fail_runs_sql(condition: str, skip_locked: str = "") -> str:
    """End the attempt of the runs that meet a condition: `queued` for a retry, or `failed` without attempts left.

    Locks the rows. Parameters: {"error", "retry_in"} and those of the condition. Returns {"run_id", "error", "failed"}.
    """
    return f"""
    WITH ended AS (
        SELECT id AS run_id
        FROM run
        WHERE {condition}
        AND state = 'running'
        AND slices_left = 0
        FOR NO KEY UPDATE {skip_locked}
    )
    UPDATE run
    SET state = CASE WHEN attempts_left > 0 THEN 'queued' ELSE 'failed' END,
        finished_at = CASE WHEN attempts_left > 0 THEN NULL ELSE now() END,
        sweep_after = CASE WHEN attempts_left > 0 THEN now() + make_interval(secs => %(retry_in)s) END,
        error = {_ERROR_SQL}
    FROM ended
    WHERE run.id = ended.run_id
    RETURNING run.id AS run_id, run.error, run.state = 'failed' AS failed
"""


def fail_slices_sql(condition: str, skip_locked: str = "") -> str:
    """As `fail_runs_sql` for slices; the run of a slice without attempts left is `failed`."""
    return f"""
    WITH ended AS (
        SELECT run_id, after_user_id
        FROM slice
        WHERE {condition}
        FOR NO KEY UPDATE {skip_locked}
    ),
    recorded AS (
        UPDATE slice
        SET sweep_after = CASE WHEN attempts_left > 0 THEN now() + make_interval(secs => %(retry_in)s) END,
            error = {_ERROR_SQL}
        FROM ended
        WHERE (slice.run_id, slice.after_user_id) = (ended.run_id, ended.after_user_id)
        RETURNING slice.run_id, slice.after_user_id, error, sweep_after
    ),
    failed AS (
        UPDATE run
        SET state = 'failed', finished_at = now(), error = recorded.error
        FROM recorded
        WHERE run.id = recorded.run_id
        AND recorded.sweep_after IS NULL
    )
    SELECT run_id, after_user_id, error, sweep_after IS NULL AS failed FROM recorded
"""


_FAIL_RUN_SQL = fail_runs_sql("id = %(run_id)s AND attempts = %(attempt)s")
_FAIL_SLICE_SQL = fail_slices_sql(
    "run_id = %(run_id)s AND after_user_id = %(after_user_id)s AND attempts = %(attempt)s"
)


def record_failure(item: WorkItem, attempt: int, error: str, retry_in: float | None) -> bool:
    """Record why an attempt failed; whether no attempt is left. Nothing changes where a newer attempt has begun.

    With attempts left, the sweeper enqueues the item again if no retry has begun within `retry_in` seconds. Without,
    the run is `failed` and is not tried again unless an operator asks for it. The other slices of the run continue.
    """
    parameters = {"attempt": attempt, "error": error[:1000] or "no error message", "retry_in": retry_in or 0}
    ended = fetch_one(_FAIL_RUN_SQL if item.is_run else _FAIL_SLICE_SQL, {**item._asdict(), **parameters})
    return bool(ended and ended["failed"])
