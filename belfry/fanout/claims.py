"""Who takes care of a run, or of a slice of it: so that every part is done once, whoever dies or hangs.

- **The lease is the lock on the part's row**, held by the transaction that does it. PostgreSQL takes it back when
  the worker's connection ends (in the midst of a statement, when that ends: well under a second for a slice), and
  after IDLE_IN_TRANSACTION_SECONDS from a worker that hangs. No clock is compared, no
  heartbeat is sent: one would go on saying "alive" for a process whose work hangs.
- **The attempt's number is its token.** It is counted, and committed, before the work: so that an attempt that
  ends without a word has been one, and whoever comes back late finds that another attempt has begun, and can
  write nothing.
- **`due_at` says from when the sweeper may look**: while a job should be on its way, it leaves the part alone.
  Only the database's clock is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from belfry.core.db import Row, execute, fetch_all, fetch_one, set_config_sql
from models import MAX_ATTEMPTS

_LEASE_SECONDS_SQL = f"make_interval(secs => LEAST(15, 2 * power(2, {MAX_ATTEMPTS} - tries_left)))"
"""From the counted attempt to the lock lie milliseconds. After that `due_at` means something only where the lock is
gone without a word: then the next attempt comes 2 s after the first began, and 4, 8, 15, 15 s after those that follow,
so that a spell of bad luck does not use up all tries at once, and the work still goes on within half a minute.

Where PostgreSQL answers slowly the sweeper waits longer (`grace`), and an attempt that was overtaken all the same gives
its try back: a run is not failed for slowness alone."""


_IS_OLD_SQL = "(created_at < now() - interval '1 day')"
"""Whether a run is older than the shortest RETENTION_DAYS: the notifications of its message may have been dropped."""


@dataclass(frozen=True, order=True)
class WorkItem:
    """What one job does: a run's own part (`after` None: all of a small run; the planning, and the mentioned,
    of a large one), or the slice of it that begins after a user id."""

    run_id: int
    after: int | None = None

    def __str__(self) -> str:
        return f"run {self.run_id}" + ("" if self.after is None else f", slice after {self.after}")


_CLAIM_RUN_SQL = f"""
    UPDATE run
    SET state = 'running',
        attempts = attempts + 1,
        tries_left = tries_left - 1,
        started_at = COALESCE(started_at, now()),
        due_at = clock_timestamp() + {_LEASE_SECONDS_SQL}
    WHERE id = (SELECT id FROM run WHERE id = %(run_id)s FOR NO KEY UPDATE SKIP LOCKED)
    AND slices_left = 0
    AND state IN ('pending', 'queued', 'running')
    AND tries_left > 0
    RETURNING attempts
"""

_CLAIM_SLICE_SQL = f"""
    UPDATE slice
    SET attempts = attempts + 1,
        tries_left = tries_left - 1,
        due_at = clock_timestamp() + {_LEASE_SECONDS_SQL}
    WHERE (run_id, after) = (
        SELECT run_id, after
        FROM slice
        WHERE run_id = %(run_id)s AND after = %(after)s
        FOR NO KEY UPDATE SKIP LOCKED)
    AND tries_left > 0
    RETURNING attempts
"""


_CLAIM_BATCH_SQL = f"""
    WITH asked AS (
        SELECT id, message_id
        FROM run
        WHERE id = ANY(%(run_ids)s::bigint[])
        AND kind NOT IN ('edit', 'replay')
        AND state IN ('pending', 'queued')
        AND attempts = 0
        AND NOT {_IS_OLD_SQL}
        FOR NO KEY UPDATE SKIP LOCKED
    ),
    placed AS (
        SELECT DISTINCT ON (a.message_id) a.id, c.server_id
        FROM asked a
        JOIN message g ON g.id = a.message_id
        JOIN channel c ON c.id = g.channel_id
        ORDER BY a.message_id, a.id
    ),
    sized AS MATERIALIZED (
        SELECT server_id, (
            SELECT count(*)
            FROM (
                SELECT
                FROM member m
                WHERE m.server_id = s.server_id
                ORDER BY m.user_id  -- by the key: a small server beside large ones is not looked for in all of them
                LIMIT %(members)s + 1
            ) first_few
        ) AS members
        FROM (SELECT DISTINCT server_id FROM placed) s
    ),
    chosen AS (
        SELECT id, sum(members) OVER (ORDER BY id <> %(first)s, id) AS members
        FROM placed
        JOIN sized USING (server_id)
        WHERE members <= %(members)s
    )
    UPDATE run
    SET state = 'running',
        attempts = 1,
        tries_left = tries_left - 1,
        started_at = now(),
        due_at = clock_timestamp() + {_LEASE_SECONDS_SQL}
    FROM chosen, (SELECT set_config('synchronous_commit', 'off', true)) AS lazily
    WHERE run.id = chosen.id
    AND chosen.members <= %(members)s
    RETURNING run.id AS run_id
"""


def claim_batch(first: int, others: Sequence[int], members: int) -> list[int]:
    """Count the first attempt at a run, and at others that nobody has begun, with no more than so many members in all;
    those taken, [] when there is none to take.

    Of edits and replays, of what was tried before or is older than a day, and of large audiences there are none: those
    are parts of their own,
    so that what kills or delays whoever touches it costs no other its tries. Nobody waits for the disk: were it lost,
    the attempt was none.
    """
    asked = {"first": first, "run_ids": [first, *others], "members": members}
    return sorted(taken["run_id"] for taken in fetch_all(_CLAIM_BATCH_SQL, asked))


def claim(part: WorkItem) -> int | None:
    """Count one more attempt at a part; its number, the token for `lock_claimed` and `record_failure`.

    None where there is nothing to take: it is done, it has failed, its tries are used up, or somebody else is at it
    (who locks a row sees to it that the part goes on).
    """
    taken = fetch_one(_CLAIM_RUN_SQL if part.after is None else _CLAIM_SLICE_SQL, vars(part))
    return int(taken["attempts"]) if taken else None


MESSAGE_LOCK = 0x62656C67
"""The advisory lock's class: "belg". What tells of a message shares it, what changes the message has it alone.

The message's row would do as well, but for one thing: who wants a row alone waits for all who share it, and those
who come later do not wait for him, so that the slices of a large fan-out would keep an edit waiting to its end.
Before an advisory lock everybody waits in line.
"""

_LOCK_SQL = f"""
    WITH held AS MATERIALIZED ({{part}})
    SELECT held.*, pg_advisory_xact_lock_shared({MESSAGE_LOCK}, (message_id %% 2147483647)::int) AS shared
    FROM held
"""
"""The part's row is locked first: while the message is waited for, nobody may take the part for abandoned."""

_LOCK_RUN_SQL = _LOCK_SQL.format(
    part=f"""
        SELECT message_id, kind, mention_changes, {_IS_OLD_SQL} AS is_old
        FROM run
        WHERE id = %(run_id)s
        AND slices_left = 0
        AND state = 'running'
        AND attempts = %(attempt)s
        FOR NO KEY UPDATE
    """
)

_LOCK_SLICE_SQL = _LOCK_SQL.format(
    part=f"""
        SELECT r.message_id, r.kind, r.mention_changes, {_IS_OLD_SQL} AS is_old, s.up_to, s.told_first::text
        FROM slice s
        JOIN run r ON r.id = s.run_id
        WHERE s.run_id = %(run_id)s
        AND s.after = %(after)s
        AND s.attempts = %(attempt)s
        FOR NO KEY UPDATE OF s
    """
)


def lock_claimed(part: WorkItem, attempt: int) -> Row | None:
    """Lock a part, and keep its message as it is, until the transaction ends: {"message_id", "kind",
    "mention_changes"}, and of a slice also {"up_to", "told_first"}.

    None where the attempt is not the last one any more: it is another's by now. Read the message after this: who
    was changing it has committed then.
    """
    return fetch_one(_LOCK_RUN_SQL if part.after is None else _LOCK_SLICE_SQL, {**vars(part), "attempt": attempt})


_RELEASE_RUN_SQL = f"""
    UPDATE run
    SET tries_left = tries_left + 1
    WHERE id = (SELECT id FROM run WHERE id = %(run_id)s FOR NO KEY UPDATE SKIP LOCKED)
    AND slices_left = 0
    AND state IN ('queued', 'running')
    AND tries_left < {MAX_ATTEMPTS}
"""

_RELEASE_SLICE_SQL = f"""
    UPDATE slice
    SET tries_left = tries_left + 1
    WHERE (run_id, after) = (
        SELECT run_id, after
        FROM slice
        WHERE run_id = %(run_id)s AND after = %(after)s
        FOR NO KEY UPDATE SKIP LOCKED)
    AND due_at IS NOT NULL
    AND tries_left < {MAX_ATTEMPTS}
"""


def release(part: WorkItem) -> None:
    """Return the try of an attempt that another one has overtaken (`lock_claimed` gave None): nobody died, it was slow.

    Nothing changes where the part is done, has failed, or is being done: whoever locks it sees to it.
    """
    execute(_RELEASE_RUN_SQL if part.after is None else _RELEASE_SLICE_SQL, vars(part))


def lock_batch(run_ids: Sequence[int], parameters: dict[str, str]) -> list[Row]:
    """Lock what `claim_batch` gave: {"run_id", "message_id"} of the runs whose message nobody is changing.

    The others are not waited for, for their sake nobody else should wait. It begins a transaction, for the rest of
    which it sets PostgreSQL's `parameters`: one statement less for each small message.
    """
    held = fetch_all(
        f"""
        WITH held AS MATERIALIZED (
            SELECT id AS run_id, message_id
            FROM run
            WHERE id = ANY(%(run_ids)s::bigint[])
            AND state = 'running'
            AND attempts = 1
            ORDER BY id
            FOR NO KEY UPDATE SKIP LOCKED
        ),
        put AS MATERIALIZED (SELECT {set_config_sql(parameters)})
        SELECT run_id, message_id,
            pg_try_advisory_xact_lock_shared({MESSAGE_LOCK}, (message_id %% 2147483647)::int) AS shared
        FROM put
        LEFT JOIN held ON true
        """,
        {"run_ids": list(run_ids)},
    )
    return [one for one in held if one["shared"]]


def lock_message(message_id: int) -> None:
    """Wait for the parts that tell of a message, and let no other begin, until the transaction ends: to change it."""
    execute(
        f"SELECT pg_advisory_xact_lock({MESSAGE_LOCK}, (%(message_id)s::bigint %% 2147483647)::int)",
        {"message_id": message_id},
    )


_ERROR_SQL = """COALESCE(%(reason)s, error,
    'gave up after ' || attempts || ' attempts: each ended without a word, as when its process is killed')"""

_RECORD_RUN_FAILURES_SQL = """
    WITH ended AS (
        SELECT id AS run_id
        FROM run
        WHERE {which}
        AND state = 'running'
        AND slices_left = 0
        FOR NO KEY UPDATE {of_others}
    )
    UPDATE run
    SET state = CASE WHEN tries_left > 0 THEN 'queued' ELSE 'failed' END,
        finished_at = CASE WHEN tries_left > 0 THEN NULL ELSE now() END,
        due_at = CASE WHEN tries_left > 0 THEN now() + make_interval(secs => %(retry_in)s) END,
        error = {reason}
    FROM ended
    WHERE run.id = ended.run_id
"""

_RECORD_SLICE_FAILURES_SQL = """
    WITH ended AS (
        SELECT run_id, after
        FROM slice
        WHERE {which}
        FOR NO KEY UPDATE {of_others}
    ),
    noted AS (
        UPDATE slice
        SET due_at = CASE WHEN tries_left > 0 THEN now() + make_interval(secs => %(retry_in)s) END,
            error = {reason}
        FROM ended
        WHERE (slice.run_id, slice.after) = (ended.run_id, ended.after)
        RETURNING slice.run_id, error, due_at
    ),
    failed AS (
        UPDATE run
        SET state = 'failed', finished_at = now(), error = noted.error
        FROM noted
        WHERE run.id = noted.run_id
        AND noted.due_at IS NULL
    )
    SELECT FROM noted
"""


def record_failure(part: WorkItem, attempt: int, reason: str, retry_in: float | None) -> None:
    """Write down why an attempt failed; nothing where it is not the last one any more.

    With tries left the part is the sweeper's, should the retry not come within `retry_in` seconds; otherwise the
    run is `failed`, and nobody tries again unasked. The other slices of a large run go on.
    """
    noted = {"attempt": attempt, "reason": reason[:1000] or "no reason was given", "retry_in": retry_in or 0}
    if part.after is None:
        which = "id = %(run_id)s AND attempts = %(attempt)s"
        statement = _RECORD_RUN_FAILURES_SQL.format(which=which, reason=_ERROR_SQL, of_others="")
    else:
        which = "run_id = %(run_id)s AND after = %(after)s AND attempts = %(attempt)s"
        statement = _RECORD_SLICE_FAILURES_SQL.format(which=which, reason=_ERROR_SQL, of_others="")
    execute(statement, {**vars(part), **noted})
