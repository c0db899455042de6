"""The fan-out: a run walks the members of a server in slices, each one transaction.

A slice commits its notifications, its statistics and the run's progress together. One that dies half-way
has changed nothing; one that is run again finds that `walked_to` has moved, and goes on behind it. Two
workers on one run take turns at its row's lock.
"""

import logging
import math
import time

from psycopg.types.json import Jsonb

from belfry.recipients import DECIDED, DECISIONS, TELLING, Subject, audience_size, slice_end, subject_of
from belfry.sql import Row, row, rows
from belfry.sql import execute as execute_sql
from config import settings
from models import TRIES, db

log = logging.getLogger(__name__)

_TELLING = ", ".join(f"'{reason}'" for reason in TELLING)

TELL = f"""
    WITH decided AS MATERIALIZED ({DECIDED}),
    told AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, %(message_id)s, decision::reason
        FROM decided
        WHERE decision IN ({_TELLING})
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING 1
    )
    SELECT decision, count(*) AS members, (SELECT count(*) FROM told) AS added, 0 AS withdrawn
    FROM decided
    GROUP BY decision
"""
"""One slice of a message, a test or a replay: tells whoever is to be told and has not been."""


def _is_among(change: str) -> str:
    """Whether the edit's `added` or `removed` mentions name a member."""
    return f"""(
        user_id = ANY(%({change}_users)s::bigint[])
        OR %({change}_everyone)s
        OR EXISTS (
            SELECT FROM member_role r
            WHERE r.user_id = decided.user_id
            AND r.role_id = ANY(%({change}_roles)s::bigint[]))
    )"""


TELL_OF_EDIT = f"""
    WITH decided AS MATERIALIZED ({DECIDED}),
    concerned AS MATERIALIZED (
        SELECT user_id, decision, telling, newly_mentioned, not_mentioned_now
        FROM (
            SELECT user_id, decision, decision IN ({_TELLING}) AS telling,
                {_is_among("added")} AS newly_mentioned,
                {_is_among("removed")} AS not_mentioned_now
            FROM decided
        ) members
        WHERE newly_mentioned OR not_mentioned_now
    ),
    withdrawn AS (
        DELETE FROM notification n
        USING concerned c
        WHERE n.user_id = c.user_id
        AND n.message_id = %(message_id)s
        AND n.read_at IS NULL
        AND n.dismissed_at IS NULL
        AND c.not_mentioned_now
        AND NOT c.telling
        RETURNING 1
    ),
    changed AS (
        UPDATE notification n
        SET reason = c.decision::reason,
            read_at = CASE WHEN n.reason = 'message' THEN NULL ELSE n.read_at END
        FROM concerned c
        WHERE n.user_id = c.user_id
        AND n.message_id = %(message_id)s
        AND c.telling
        AND n.reason <> c.decision::reason
        RETURNING 1
    ),
    told AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, %(message_id)s, decision::reason
        FROM concerned
        WHERE newly_mentioned
        AND telling
        AND decision <> 'message'
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING 1
    )
    SELECT decision, count(*) AS members,
        (SELECT count(*) FROM told) AS added,
        (SELECT count(*) FROM withdrawn) AS withdrawn
    FROM decided
    GROUP BY decision
"""
"""One slice of an edit. It concerns only those whom the edit added to, or removed from, the mentions:

- the newly mentioned are told; who had a plain notification has a mention now, unread again;
- who was taken out of the mentions and is not to be told otherwise loses the notification while it is unread
  (one that was dismissed stays as it is, or the next edit would bring it back);
- who is told for another reason now keeps theirs, with that reason.
"""

_RUN = """
    SELECT id, message_id, kind, state, walked_to, done, decisions, mention_changes,
        set_config('jit', 'off', true),
        set_config('statement_timeout', %(statement)s, true),
        set_config('idle_in_transaction_session_timeout', %(idle)s, true)
    FROM run
    WHERE id = %(run_id)s
    FOR UPDATE
"""
"""Locks the run for one slice, and has PostgreSQL end what hangs: a statement that outlasts the job, and a
transaction whose process sleeps on its locks. Compiling the statement would take longer than running it.
All three settings end with the transaction."""

_BEGIN = """
    UPDATE run
    SET state = 'running',
        attempts = attempts + CASE WHEN %(resumed)s THEN 0 ELSE 1 END,
        tries_left = CASE WHEN state = 'failed' THEN 0 ELSE tries_left - 1 END,
        started_at = COALESCE(started_at, now()),
        finished_at = NULL,
        due_at = now() + make_interval(secs => %(lease)s)
    WHERE id = %(run_id)s
    AND state <> 'succeeded'
    AND (state = 'failed' OR tries_left > 0)
    RETURNING message_id, total
"""

_ADVANCE = """
    UPDATE run
    SET walked_to = COALESCE(%(up_to)s, walked_to),
        done = done + %(members)s,
        total = CASE WHEN %(finished)s THEN done + %(members)s ELSE GREATEST(total, done + %(members)s) END,
        added = added + %(added)s,
        withdrawn = withdrawn + %(withdrawn)s,
        decisions = %(decisions)s,
        tries_left = %(tries)s,
        error = NULL,
        state = CASE WHEN %(finished)s THEN 'succeeded' ELSE 'running' END,
        finished_at = CASE WHEN %(finished)s THEN now() END,
        due_at = now() + make_interval(secs => %(lease)s)
    WHERE id = %(run_id)s
"""

_GIVE_UP = """
    UPDATE run
    SET state = 'failed',
        finished_at = now(),
        error = COALESCE(error, 'gave up after ' || attempts || ' attempts: each ended without a word, '
                                'as when its process is killed')
    WHERE id = %(run_id)s
    AND state NOT IN ('succeeded', 'failed')
    AND tries_left = 0
    AND (state <> 'running' OR due_at <= now())
"""
"""The last attempt has ended without a word: its lease is over, and it wrote neither progress nor a failure."""

LEASE_SECONDS = 20
"""How long a run is left alone after the last sign of life from whoever works on it; a slice takes well under one."""


def execute(run_id: int, *, seconds: float = math.inf, resumed: bool = False) -> str:
    """Work on a run until it is finished; answers its state, or `missing` where there is no such run.

    After `seconds` it stops between two slices and answers `unfinished`: the caller sees that somebody goes
    on with it, `resumed`, which is then no new attempt. `running` is one that is left to somebody else.

    Safe at any time and any number of times: a run that succeeded is left as it is, one that stopped half-way
    goes on where it stopped, one whose last attempt is under way elsewhere is left to it. A failed run that is
    asked for again gets one more attempt. Whatever goes wrong goes up to the caller, with everything that was
    committed before it kept.
    """
    give_way = time.monotonic() + seconds
    if _begin(run_id, resumed):
        while not advance(run_id):
            if time.monotonic() >= give_way:
                return "unfinished"
    elif execute_sql(_GIVE_UP, {"run_id": run_id}):
        log.error("run %s gave up", run_id)
    found = row("SELECT state FROM run WHERE id = %(run_id)s", {"run_id": run_id})
    return found["state"] if found else "missing"


def _begin(run_id: int, resumed: bool = False) -> bool:
    """Take up a run: one more attempt, and its audience counted. False where there is nothing to take up."""
    with db.atomic():
        begun = row(_BEGIN, {"run_id": run_id, "resumed": resumed, "lease": LEASE_SECONDS})
        if begun and begun["total"] is None:
            subject = _subject(begun["message_id"])
            execute_sql(
                "UPDATE run SET total = %(total)s WHERE id = %(run_id)s",
                {"total": 0 if subject.deleted else audience_size(subject), "run_id": run_id},
            )
    return begun is not None


def _subject(message_id: int, *, locked: bool = False) -> Subject:
    subject = subject_of(message_id, locked=locked)
    assert subject is not None  # run.message_id is a foreign key
    return subject


def advance(run_id: int) -> bool:
    """Do the next slice of a run, as one transaction. True when that was the last.

    A message that was deleted meanwhile has nobody left to tell: its run ends with what it has.
    """
    with db.atomic():
        run = row(_RUN, {"run_id": run_id, "statement": f"{settings.job_timeout}s", "idle": f"{LEASE_SECONDS}s"})
        if run is None or run["state"] in ("succeeded", "failed"):
            return True
        subject = _subject(run["message_id"], locked=True)
        ahead: Row = {"up_to": None, "members": 0}
        if not subject.deleted:
            ahead = slice_end(subject, run["walked_to"], settings.slice_members)
        counted = _tell(run, subject, ahead["up_to"]) if ahead["members"] else []
        finished: bool = ahead["members"] < settings.slice_members
        execute_sql(
            _ADVANCE,
            {
                "run_id": run_id,
                "up_to": ahead["up_to"],
                "members": sum(group["members"] for group in counted),
                "added": counted[0]["added"] if counted else 0,
                "withdrawn": counted[0]["withdrawn"] if counted else 0,
                "decisions": Jsonb(_sum(run["decisions"], counted)),
                "tries": TRIES,
                "finished": finished,
                "lease": LEASE_SECONDS,
            },
        )
    log.debug("run %s: %s members up to %s", run_id, ahead["members"], ahead["up_to"])
    return finished


def _tell(run: Row, subject: Subject, up_to: int) -> list[Row]:
    parameters = subject.parameters(run["walked_to"], up_to)
    if run["kind"] == "edit":
        return rows(TELL_OF_EDIT, {**parameters, **run["mention_changes"]})
    return rows(TELL, parameters)


def _sum(decisions: dict[str, int], counted: list[Row]) -> dict[str, int]:
    """The statistics so far and those of one slice; every decision is there, in the rules' order."""
    summed = {decision: decisions.get(decision, 0) for decision in DECISIONS}
    for group in counted:
        summed[group["decision"]] += group["members"]
    return summed
