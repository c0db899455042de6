"""Process the work items of a run, each in one transaction.

- A run whose audience fits into one slice is one work item.
- The first work item of a larger run plans the slices and notifies the mentioned members. Each slice is a work item
  that any worker may claim; it excludes the members that the first work item has notified.
- A work item commits its notifications, its statistics and the run's progress together. If it is interrupted, nothing
  has changed. Once it has succeeded it no longer exists, so it cannot be processed twice.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from psycopg.types.json import Jsonb

from belfry.core.db import LARGEST_ID, Row, execute, fetch_all, fetch_one, idle_timeout, timed_transaction, transaction
from belfry.core.failpoints import failpoint
from belfry.core.partitions import block_drops, oldest_retained_message_id
from belfry.fanout import claims
from belfry.fanout.claims import WorkItem
from belfry.fanout.decision import (
    DECISIONS,
    FanoutMessage,
    load_fanout_message,
    member_range,
    mentioned_members,
    next_slice_bounds,
)
from belfry.fanout.statements import (
    APPLY_EDIT_SQL,
    INSERT_BATCH_SQL,
    INSERT_NOTIFICATIONS_SQL,
    PLAN_SLICES_SQL,
    RETRACT_FROM_FORMER_MEMBERS_SQL,
    UPDATE_PROGRESS_SQL,
)
from config import settings

log = logging.getLogger(__name__)


def _transaction_settings() -> dict[str, str]:
    """PostgreSQL's settings for a transaction that processes a work item."""
    return {
        "jit": "off",  # compiling the statements takes longer than executing them
        "plan_cache_mode": "force_custom_plan",  # one plan does not fit all ranges
        "statement_timeout": f"{settings.job_timeout_seconds - 1}s",  # before RQ would interrupt the job
    }


_GENERIC_PLAN_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
}
"""For small audiences: each row is looked up by its key, with one plan for each connection. Planning takes as long as
notifying 50 members, and beside a large server the planner would choose to read all members of that."""


class Processed(NamedTuple):
    """A processed work item: its message, and the slices that were planned, [] for a small run or a slice."""

    message_id: int
    slices: list[WorkItem]


def process_work_item(item: WorkItem, attempt: int) -> Processed | None:
    """Process a claimed work item. The slices that it returns are to be enqueued.

    None, and nothing changes, where another attempt has begun since. A message that was deleted since notifies nobody
    else: its run finishes with what it has. Errors are raised, and then nothing has changed.
    """
    with transaction(**_transaction_settings()):
        locked = claims.lock_claimed(item, attempt)
        if locked is None:
            return None
        failpoint("run.locked" if item.is_run else "slice.locked", *item)
        message = load_fanout_message(locked["message_id"])
        assert message is not None  # run.message_id is a foreign key
        if _may_exceed_retention(locked):
            block_drops(writing=True)
            if message.message_id < oldest_retained_message_id():
                log.info("%s: notifications of its message are past retention, so it notifies nobody", item)
                message = replace(message, deleted=True)
        if item.is_run:
            return Processed(message.message_id, _process_run(item, locked, message))
        _process_slice(item, attempt, locked, message)
        return Processed(message.message_id, [])


def _may_exceed_retention(locked: Row) -> bool:
    """Whether the notifications of the run's message may have been dropped, so that a repeat would notify twice.

    RETENTION_DAYS is at least one day, so a younger run of a message need not be checked. An edit notifies the newly
    mentioned, whether they were notified before or not.
    """
    return locked["kind"] == "replay" or (locked["kind"] != "edit" and bool(locked["is_old"]))


def process_batch(run_ids: Sequence[int]) -> list[Row]:
    """Process the runs that `claims.claim_batch` returned, in one transaction.

    Returns {"run_id", "message_id", "members_total", "notifications_inserted"} of each, by id. Those left out are
    claimed by another worker, or their message is being changed: process them one by one. Errors are raised, and
    then nothing has changed.
    """
    processed: list[Row] = []
    with timed_transaction() as round_trip:
        locked = claims.lock_batch(run_ids, idle_timeout(round_trip) | _transaction_settings() | _GENERIC_PLAN_SETTINGS)
        failpoint("run.locked", *run_ids[:1])
        if locked:
            processed = fetch_all(
                INSERT_BATCH_SQL,
                {
                    "run_ids": [run["run_id"] for run in locked],
                    "message_ids": [run["message_id"] for run in locked],
                    "grace_days": settings.past_due_grace_days,
                    "no_decisions": Jsonb(dict.fromkeys(DECISIONS, 0)),
                },
            )
        failpoint("run.counted", *run_ids[:1])
    message_ids = {run["run_id"]: run["message_id"] for run in locked}
    processed = [run | {"message_id": message_ids[run["run_id"]]} for run in processed]
    return sorted(processed, key=itemgetter("run_id"))


def _process_run(item: WorkItem, locked: Row, message: FanoutMessage) -> list[WorkItem]:
    if message.deleted:
        _record_progress(item, [])
        return []
    audience = next_slice_bounds(message, 0, settings.fanout_slice_size + 1)
    if audience["members"] <= settings.fanout_slice_size:
        retracted = _retract_from_former_members(locked, message, 0, LARGEST_ID)
        groups = []
        if audience["members"]:
            groups = _notify_members(locked, message, audience["after_user_id"], audience["to_user_id"])
        _record_progress(item, groups, retracted=retracted)
        return []
    mentioned = mentioned_members(message, settings.fanout_slice_size)
    planned = fetch_one(
        PLAN_SLICES_SQL,
        {
            "run_id": item.run_id,
            "server_id": message.server_id,
            "members": settings.fanout_slice_size,
            "excluded_user_ids": mentioned["user_ids"] or "{}",
        },
    )
    assert planned is not None
    failpoint("run.planned", *item)
    groups = []
    if mentioned["user_ids"]:
        only, bounds = mentioned["user_ids"], (mentioned["after_user_id"], mentioned["to_user_id"])
        groups = _notify_members(locked, message, *bounds, only_user_ids=only)
    _record_progress(item, groups, slices=len(planned["slices"]), members_total=planned["members_total"])
    return [WorkItem(item.run_id, after_user_id) for after_user_id in planned["slices"]]


def _process_slice(item: WorkItem, attempt: int, locked: Row, message: FanoutMessage) -> None:
    assert item.after_user_id is not None
    groups: list[Row] = []
    retracted = 0
    if not message.deleted:
        bounds = item.after_user_id, locked["to_user_id"]
        retracted = _retract_from_former_members(locked, message, *bounds)
        groups = _notify_members(
            locked, message, *member_range(message, *bounds), except_user_ids=locked["excluded_user_ids"]
        )
    execute("DELETE FROM slice WHERE run_id = %(run_id)s AND after_user_id = %(after_user_id)s", item._asdict())
    _record_progress(item, groups, slices=-1, retries=attempt - 1, retracted=retracted)


def _notify_members(
    locked: Row,
    message: FanoutMessage,
    after_user_id: int,
    to_user_id: int,
    *,
    only_user_ids: str | None = None,
    except_user_ids: str = "{}",
) -> list[Row]:
    """Notify a range of members; {"decision", "members", "inserted", "retracted"} by decision, [] without members."""
    parameters = message.parameters(
        after_user_id, to_user_id, only_user_ids=only_user_ids, except_user_ids=except_user_ids
    )
    if locked["kind"] == "edit":
        return fetch_all(APPLY_EDIT_SQL, {**parameters, **locked["mention_diff"]})
    return fetch_all(INSERT_NOTIFICATIONS_SQL, parameters)


def _retract_from_former_members(locked: Row, message: FanoutMessage, after_user_id: int, to_user_id: int) -> int:
    """Retract from users who left the server; how many notifications. 0 unless an edit removes mentions."""
    diff = locked["mention_diff"] or {}
    of_groups = bool(diff.get("removed_roles") or diff.get("removed_everyone"))
    if not of_groups and not diff.get("removed_users"):
        return 0
    bounds = {"after_user_id": after_user_id, "to_user_id": to_user_id}
    parameters = {**vars(message), **bounds, "removed_users": diff["removed_users"], "of_groups": of_groups}
    return execute(RETRACT_FROM_FORMER_MEMBERS_SQL, parameters)


def _record_progress(
    item: WorkItem,
    groups: list[Row],
    *,
    slices: int = 0,
    members_total: int | None = None,
    retries: int = 0,
    retracted: int = 0,
) -> None:
    """Add the result of a work item to its run. `slices` is the change of the number of slices that are left."""
    failpoint("run.notified" if item.is_run else "slice.notified", *item)
    members = {group["decision"]: group["members"] for group in groups}
    execute(
        UPDATE_PROGRESS_SQL,
        {
            "run_id": item.run_id,
            "members": sum(members.values()),
            "inserted": groups[0]["inserted"] if groups else 0,
            "retracted": retracted + (groups[0]["retracted"] if groups else 0),
            "decisions": Jsonb({decision: members.get(decision, 0) for decision in DECISIONS}),
            "slices": slices,
            "members_total": members_total,
            "retries": retries,
        },
    )
    failpoint("run.counted" if item.is_run else "slice.counted", *item)
