"""Runs: one fan-out of one message, from its first row to its last figure."""

from collections.abc import Sequence
from typing import Any

from psycopg.types.json import Jsonb

from belfry.errors import Forbidden, NotFound
from belfry.recipients import DECISIONS, TELLING, compare, slice_end, subject_of
from belfry.sql import Row, execute, row, rows
from config import settings
from models import RUN_STATES, TRIES, UNFINISHED, User, db

_COLUMNS = """
    r.id, r.message_id, r.kind, r.state, r.attempts, r.done, r.total, r.decisions, r.added, r.withdrawn,
    r.error, r.created_at, r.started_at, r.finished_at, g.author_id
"""


def create_run(message_id: int, kind: str, mention_changes: dict[str, Any] | None = None) -> int:
    """Write down that a message is to be fanned out; the run's id. Call it in the message's own transaction."""
    made = row(
        "INSERT INTO run (message_id, kind, mention_changes)"
        " VALUES (%(message_id)s, %(kind)s, %(mention_changes)s)"
        " RETURNING id",
        {
            "message_id": message_id,
            "kind": kind,
            "mention_changes": Jsonb(mention_changes) if mention_changes is not None else None,
        },
    )
    assert made is not None
    return int(made["id"])


def mark_queued(run_ids: Sequence[int], look_again: float) -> None:
    """These are in the queue now; the sweeper looks again after `look_again` seconds.

    A worker may have been quicker: a run that is running or done stays what it is. Nobody waits for the disk:
    were this lost in a crash, the sweeper would enqueue once more what is harmless to repeat.
    """
    execute(
        "UPDATE run"
        " SET state = 'queued', due_at = now() + make_interval(secs => %(look_again)s)"
        " FROM (SELECT set_config('synchronous_commit', 'off', true)) AS lazily"
        " WHERE id = ANY(%(run_ids)s::bigint[])"
        " AND (state IN ('pending', 'queued') OR (state = 'running' AND due_at <= now()))",
        {"run_ids": list(run_ids), "look_again": look_again},
    )


def due_runs(limit: int, *, with_queued: bool) -> list[int]:
    """Ids of runs that nobody takes care of any more, oldest first.

    Never reached the queue, lost from it, or left by a worker that died. The database's clock decides.
    `with_queued` False leaves out those that may simply be waiting in a long queue.
    """
    states = ["pending", "queued", "running"] if with_queued else ["pending", "running"]
    return [
        found["id"]
        for found in rows(
            "SELECT id FROM run"
            " WHERE state IN ('pending', 'queued', 'running')"
            " AND state = ANY(%(states)s)"
            " AND due_at <= now()"
            " ORDER BY due_at, id"
            " LIMIT %(limit)s"
            " FOR NO KEY UPDATE SKIP LOCKED",  # a locked one is being worked on, however late
            {"states": states, "limit": limit},
        )
    ]


def record_failure(run_id: int, reason: str, retry_in: float | None) -> str:
    """Write down why an attempt failed; the run's state after it.

    With tries left it is `queued` again, and the sweeper's should the retry not come within `retry_in`
    seconds; otherwise `failed`, and nobody tries again unasked.
    """
    found = row(
        "UPDATE run"
        " SET state = CASE WHEN tries_left > 0 THEN 'queued' ELSE 'failed' END,"
        " finished_at = CASE WHEN tries_left > 0 THEN NULL ELSE now() END,"
        " error = %(reason)s,"
        " due_at = now() + make_interval(secs => %(retry_in)s)"
        " WHERE id = %(run_id)s"
        " AND state <> 'succeeded'"
        " RETURNING state",
        {"run_id": run_id, "reason": reason[:1000] or "no reason was given", "retry_in": retry_in or 0},
    )
    return found["state"] if found else "succeeded"


def retry_failed(run_ids: Sequence[int] | None = None) -> list[int]:
    """Make failed runs pending again, all or those named; the ids of those that were. They keep their progress."""
    return [
        found["id"]
        for found in rows(
            "UPDATE run"
            " SET state = 'pending', finished_at = NULL, error = NULL, tries_left = %(tries)s, due_at = now()"
            " WHERE state = 'failed'"
            " AND (%(run_ids)s::bigint[] IS NULL OR id = ANY(%(run_ids)s::bigint[]))"
            " RETURNING id",
            {"run_ids": list(run_ids) if run_ids is not None else None, "tries": TRIES},
        )
    ]


def find_run(run_id: int, reader: User | None = None) -> Row:
    """One run. `reader` None is an operator at the command line, who may see all.

    Raises NotFound; also for whoever is neither its message's author nor an admin: they may not know of it.
    """
    found = row(
        f"SELECT {_COLUMNS} FROM run r JOIN message g ON g.id = r.message_id WHERE r.id = %(run_id)s",
        {"run_id": run_id},
    )
    if not found or not (reader is None or reader.is_admin or found["author_id"] == reader.id):
        raise NotFound(f"There is no run {run_id}.")
    return found


def list_runs(*, before: int | None, limit: int, state: str | None = None, channel_id: int | None = None) -> list[Row]:
    """Runs, newest first, with an id below `before`; [] when there are none."""
    assert state is None or state in RUN_STATES
    return rows(
        f"SELECT {_COLUMNS} FROM run r JOIN message g ON g.id = r.message_id"
        " WHERE (%(before)s::bigint IS NULL OR r.id < %(before)s)"
        + (f" AND r.state = '{state}'" if state else "")  # as a constant, so that the partial indexes are used
        + " AND (%(channel_id)s::bigint IS NULL OR g.channel_id = %(channel_id)s)"
        " ORDER BY r.id DESC"
        " LIMIT %(limit)s",
        {"before": before, "limit": limit, "channel_id": channel_id},
    )


def runs_of_messages(message_ids: Sequence[int]) -> dict[int, Row]:
    """The newest run of each message, by the message's id; those without one are not in it."""
    found = rows(
        "SELECT DISTINCT ON (message_id) message_id, id, state FROM run"
        " WHERE message_id = ANY(%(message_ids)s::bigint[])"
        " ORDER BY message_id, id DESC",
        {"message_ids": list(message_ids)},
    )
    return {run["message_id"]: run for run in found}


def statistics(run: Row) -> dict[str, Any]:
    """{"audience", "notified", "decisions", "added", "withdrawn"}: members, as counted so far.

    `audience` is what was walked and so the sum of `decisions`; `notified` is the sum of the telling ones;
    `added` and `withdrawn` are the rows that this run itself wrote and took back.
    """
    decisions = {decision: run["decisions"].get(decision, 0) for decision in _REPORT_ORDER}
    return {
        "audience": run["done"],
        "notified": sum(decisions[reason] for reason in TELLING),
        "decisions": decisions,
        "added": run["added"],
        "withdrawn": run["withdrawn"],
    }


_REPORT_ORDER = (
    "message", "mention", "mention_role", "mention_everyone", "author", "no_channel_access", "no_subscription",
    "preference_none", "preference_mentions", "muted",
)  # the contract's; the telling ones first  # fmt: skip
assert set(_REPORT_ORDER) == set(DECISIONS)


def replay(run_id: int, *, dry_run: bool) -> dict[str, Any]:
    """Decide again about everybody, by the rules and the community of now.

    Answers {"dry_run", "added", "stays", "then", "now", "run_id"}: how many would be told who have not been,
    how many notifications stay, and the decisions then against those now. Unless it is dry, a run of kind
    `replay` is written, to be queued by the caller; `run_id` is its id, else None. Nobody is told twice:
    whoever has a notification keeps that one.

    Raises NotFound for an unknown run, Forbidden where the message has been deleted.
    """
    run = find_run(run_id)
    with db.atomic():
        subject = subject_of(run["message_id"])
        assert subject is not None
        if subject.deleted:
            raise Forbidden("The message has been deleted: there is nobody to tell.")
        added, stays, now_decided = 0, 0, dict.fromkeys(_REPORT_ORDER, 0)
        after = 0
        while (ahead := slice_end(subject, after, settings.slice_members))["members"]:
            for group in compare(subject, after, ahead["up_to"]):
                now_decided[group["decision"]] += group["members"]
                stays += group["members"] if group["told"] else 0
                added += group["members"] if not group["told"] and group["decision"] in TELLING else 0
            after = ahead["up_to"]
        new_run = None if dry_run else create_run(run["message_id"], "replay")
    return {
        "dry_run": dry_run,
        "added": added,
        "stays": stays,
        "then": statistics(run)["decisions"],
        "now": now_decided,
        "run_id": new_run,
    }


def count_unfinished() -> dict[str, Any]:
    """{"states": {pending, queued, running, failed: how many}, "oldest_seconds": age of the oldest unfinished}.

    Reads the two partial indexes, never the finished runs.
    """
    states = dict.fromkeys((*UNFINISHED, "failed"), 0)
    oldest = 0.0
    for found in rows(
        "SELECT state, count(*) AS runs, EXTRACT(epoch FROM now() - min(created_at))::float AS oldest_seconds"
        " FROM run"
        " WHERE state IN ('pending', 'queued', 'running')"
        " GROUP BY state"
    ):
        states[found["state"]] = found["runs"]
        oldest = max(oldest, found["oldest_seconds"])
    failed = row("SELECT count(*) AS runs FROM run WHERE state = 'failed'")
    states["failed"] = failed["runs"] if failed else 0
    return {"states": states, "oldest_seconds": oldest}
