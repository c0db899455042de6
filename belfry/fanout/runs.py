"""Runs: one fan-out of one message, from its first row to its last figure."""

from collections.abc import Sequence
from typing import Any

from psycopg.types.json import Jsonb

from belfry.core.db import Row, fetch_all, fetch_one, transaction
from belfry.core.errors import Conflict, Forbidden, NotFound
from belfry.core.failpoints import failpoint
from belfry.core.partitions import block_drops, oldest_retained_message_id
from belfry.fanout.decision import DECISIONS, NOTIFY_DECISIONS, load_fanout_message, next_slice_bounds, preview_replay
from config import settings
from models import RUN_STATES, UNFINISHED_STATES, User

_COLUMNS = """
    r.id, r.message_id, r.kind, r.state, r.attempts, r.done, r.total, r.decisions, r.added, r.withdrawn,
    COALESCE(r.error, (
        SELECT s.error FROM slice s WHERE s.run_id = r.id AND s.error IS NOT NULL ORDER BY s.after LIMIT 1
    )) AS error,
    r.created_at, r.started_at, r.finished_at, g.author_id
"""
"""The error is the run's own, or that of a slice which is being tried again."""


def create_run(
    message_id: int, kind: str, mention_changes: dict[str, Any] | None = None, *, state: str = "queued"
) -> int:
    """Write down that a message is to be fanned out; the run's id. Call it in the message's own transaction.

    It is `queued` from the start where its job is enqueued right after the commit: if that fails,
    `leases.mark_pending` makes it `pending`, and where nobody lives to do even that, the sweeper finds that it
    is not in the queue.
    """
    made = fetch_one(
        "INSERT INTO run (message_id, kind, state, mention_changes)"
        " VALUES (%(message_id)s, %(kind)s, %(state)s, %(mention_changes)s)"
        " RETURNING id",
        {
            "message_id": message_id,
            "kind": kind,
            "state": state,
            "mention_changes": Jsonb(mention_changes) if mention_changes is not None else None,
        },
    )
    assert made is not None
    return int(made["id"])


def find_run(run_id: int, reader: User | None = None) -> Row:
    """One run. `reader` None is an operator at the command line, who may see all.

    Raises NotFound; also for whoever is neither its message's author nor an admin: they may not know of it.
    """
    found = fetch_one(
        f"SELECT {_COLUMNS} FROM run r JOIN message g ON g.id = r.message_id WHERE r.id = %(run_id)s",
        {"run_id": run_id},
    )
    if not found or not (reader is None or reader.is_admin or found["author_id"] == reader.id):
        raise NotFound(f"There is no run {run_id}.")
    return found


def list_runs(*, before: int | None, limit: int, state: str | None = None, channel_id: int | None = None) -> list[Row]:
    """Runs, newest first, with an id below `before`; [] when there are none."""
    assert state is None or state in RUN_STATES
    return fetch_all(
        f"SELECT {_COLUMNS} FROM run r JOIN message g ON g.id = r.message_id WHERE true"
        + ("" if before is None else " AND r.id < %(before)s")
        + (f" AND r.state = '{state}'" if state else "")  # as a constant, so that the partial indexes are used
        + ("" if channel_id is None else " AND g.channel_id = %(channel_id)s")
        + " ORDER BY r.id DESC"
        " LIMIT %(limit)s",
        {"before": before, "limit": limit, "channel_id": channel_id},
    )


def runs_of_messages(message_ids: Sequence[int]) -> dict[int, Row]:
    """The newest run of each message, by the message's id; those without one are not in it."""
    found = fetch_all(
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
    decisions = {decision: run["decisions"].get(decision, 0) for decision in _DECISION_ORDER}
    return {
        "audience": run["done"],
        "notified": sum(decisions[reason] for reason in NOTIFY_DECISIONS),
        "decisions": decisions,
        "added": run["added"],
        "withdrawn": run["withdrawn"],
    }


_DECISION_ORDER = (
    "message", "mention", "mention_role", "mention_everyone", "author", "no_channel_access", "no_subscription",
    "preference_none", "preference_mentions", "muted",
)  # the contract's; the telling ones first  # fmt: skip
assert set(_DECISION_ORDER) == set(DECISIONS)


def replay(run_id: int, *, dry_run: bool) -> dict[str, Any]:
    """Decide again about everybody, by the rules and the community of now.

    Answers {"dry_run", "added", "stays", "then", "now", "run_id"}: how many would be told who have not been,
    how many notifications stay, and the decisions then against those now. Unless it is dry, or nobody is to be
    added, a run of kind `replay` is written, to be queued by the caller; `run_id` is its id, else None. Nobody is
    told twice: whoever has a notification keeps that one.

    Raises NotFound for an unknown run, Forbidden where the message has been deleted, Conflict where it is so old that
    its notifications are not kept: everybody would be told again.
    """
    run = find_run(run_id)
    with transaction():
        block_drops(writing=False)
        if run["message_id"] < oldest_retained_message_id():
            raise Conflict("The message is older than RETENTION_DAYS: who was told of it is no longer known.")
        subject = load_fanout_message(run["message_id"])
        assert subject is not None
        if subject.deleted:
            raise Forbidden("The message has been deleted: there is nobody to tell.")
        added, stays, now_decided = 0, 0, dict.fromkeys(_DECISION_ORDER, 0)
        after = 0
        while (ahead := next_slice_bounds(subject, after, settings.slice_members))["members"]:
            for group in preview_replay(subject, after, ahead["up_to"]):
                now_decided[group["decision"]] += group["members"]
                stays += group["members"] if group["told"] else 0
                added += group["members"] if not group["told"] and group["decision"] in NOTIFY_DECISIONS else 0
            after = ahead["up_to"]
        new_run = create_run(run["message_id"], "replay") if added and not dry_run else None
    if new_run:
        failpoint("replay.committed", new_run)
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
