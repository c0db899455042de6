"""The fan-out of a run, part by part, each one transaction.

- A run whose audience fits into one slice is one part.
- Of a larger one the first part shares the members out in slices, and tells those who are mentioned. Each slice
  is a part of its own, for any worker; it leaves out whom the first part has dealt with.
- A part commits its notifications, its statistics and the run's progress together. One that dies half-way has
  changed nothing, and one that is done is gone: nobody can do it twice.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

from psycopg.types.json import Jsonb

from belfry.core.db import Row, execute, fetch_all, fetch_one, idle_timeout, timed_transaction, transaction
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
from models import LARGEST_ID

log = logging.getLogger(__name__)


def _transaction_settings() -> dict[str, str]:
    """PostgreSQL's, for a transaction that tells."""
    return {
        "jit": "off",  # compiling the statements would take longer than running them
        "plan_cache_mode": "force_custom_plan",  # a plan for all ranges is one for none
        "statement_timeout": f"{settings.job_timeout - 1}s",  # before RQ would break off in its midst
    }


_GENERIC_PLAN_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
}
"""For small audiences: each row is looked up by its key, by one plan, made once a connection. To plan it anew took as
long as to tell 50 people; and beside a large server, by which it is estimated, all members of that were read."""


def process_work_item(part: WorkItem, attempt: int) -> list[WorkItem] | None:
    """Do one part, which was taken as this attempt; the slices that came of it, to be enqueued.

    None, and nothing is done, where another attempt has begun since. A message that was deleted meanwhile has nobody
    left to tell: its run ends with what it has. Whatever goes wrong goes up to the caller, and nothing has changed.
    """
    with transaction(**_transaction_settings()):
        held = claims.lock_claimed(part, attempt)
        if held is None:
            return None
        failpoint("run.held" if part.after is None else "slice.held", part.run_id, part.after)
        subject = load_fanout_message(held["message_id"])
        assert subject is not None  # run.message_id is a foreign key
        if _may_exceed_retention(held):
            block_drops(writing=True)
            if subject.message_id < oldest_retained_message_id():
                log.info("%s: who was notified of its message is no longer kept, so nobody is notified twice", part)
                subject = replace(subject, deleted=True)
        if part.after is not None:
            _process_slice(part, attempt, held, subject)
            return []
        return _process_run(part, held, subject)


def _may_exceed_retention(held: Row) -> bool:
    """Whether the notifications of a run's message may have been dropped, by which others are told from the notified.

    RETENTION_DAYS is a day at least, so no younger run of a message itself needs to ask. An edit notifies those whom it
    newly mentions, whether they were notified before or not.
    """
    return held["kind"] == "replay" or (held["kind"] != "edit" and bool(held["is_old"]))


def process_batch(run_ids: Sequence[int]) -> list[Row]:
    """Process runs that `claims.claim_batch` gave: {"run_id", "total", "added"} of each that was processed, by id.

    The others are claimed by another worker, or their message is being changed: process them one by one. Raises
    whatever goes wrong, and then nothing has changed.
    """
    processed: list[Row] = []
    with timed_transaction() as round_trip:
        held = claims.lock_batch(run_ids, idle_timeout(round_trip) | _transaction_settings() | _GENERIC_PLAN_SETTINGS)
        failpoint("run.held", *run_ids[:1])
        if held:
            processed = fetch_all(
                INSERT_BATCH_SQL,
                {
                    "run_ids": [run["run_id"] for run in held],
                    "message_ids": [run["message_id"] for run in held],
                    "grace_days": settings.past_due_grace_days,
                    "nobody": Jsonb(dict.fromkeys(DECISIONS, 0)),
                },
            )
        failpoint("run.counted", *run_ids[:1])
    return sorted(processed, key=itemgetter("run_id"))


def _process_run(part: WorkItem, held: Row, subject: FanoutMessage) -> list[WorkItem]:
    if subject.deleted:
        _record_progress(part, [])
        return []
    all_ = next_slice_bounds(subject, 0, settings.slice_members + 1)
    if all_["members"] <= settings.slice_members:
        taken_back = _retract_from_former_members(held, subject, 0, LARGEST_ID)
        counted = _notify_members(held, subject, all_["after"], all_["up_to"]) if all_["members"] else []
        _record_progress(part, counted, withdrawn=taken_back)
        return []
    first = mentioned_members(subject, settings.slice_members)
    shared = fetch_one(
        PLAN_SLICES_SQL,
        {
            "run_id": part.run_id,
            "server_id": subject.server_id,
            "members": settings.slice_members,
            "told_first": first["user_ids"] or "{}",
        },
    )
    assert shared is not None
    failpoint("run.planned", part.run_id, part.after)
    user_ids = first["user_ids"]
    counted = _notify_members(held, subject, first["after"], first["up_to"], among=user_ids) if user_ids else []
    _record_progress(part, counted, slices=len(shared["slices"]), total=shared["total"])
    return [WorkItem(part.run_id, after) for after in shared["slices"]]


def _process_slice(part: WorkItem, attempt: int, held: Row, subject: FanoutMessage) -> None:
    assert part.after is not None
    counted: list[Row] = []
    taken_back = 0
    if not subject.deleted:
        taken_back = _retract_from_former_members(held, subject, part.after, held["up_to"])
        after, up_to = member_range(subject, part.after, held["up_to"])
        counted = _notify_members(held, subject, after, up_to, but=held["told_first"])
    execute("DELETE FROM slice WHERE run_id = %(run_id)s AND after = %(after)s", vars(part))
    _record_progress(part, counted, slices=-1, retries=attempt - 1, withdrawn=taken_back)


def _notify_members(
    held: Row, subject: FanoutMessage, after: int, up_to: int, *, among: str | None = None, but: str = "{}"
) -> list[Row]:
    parameters = subject.parameters(after, up_to, among=among, but=but)
    if held["kind"] == "edit":
        return fetch_all(APPLY_EDIT_SQL, {**parameters, **held["mention_changes"]})
    return fetch_all(INSERT_NOTIFICATIONS_SQL, parameters)


def _retract_from_former_members(held: Row, subject: FanoutMessage, after: int, up_to: int) -> int:
    """How many notifications that took. None of what is no edit, or takes no mention out."""
    changes = held["mention_changes"] or {}
    of_groups = bool(changes.get("removed_roles") or changes.get("removed_everyone"))
    if not of_groups and not changes.get("removed_users"):
        return 0
    parameters = {**vars(subject), "removed_users": changes["removed_users"], "of_groups": of_groups}
    return execute(RETRACT_FROM_FORMER_MEMBERS_SQL, {**parameters, "after": after, "up_to": up_to})


def _record_progress(
    part: WorkItem,
    counted: list[Row],
    *,
    slices: int = 0,
    total: int | None = None,
    retries: int = 0,
    withdrawn: int = 0,
) -> None:
    failpoint("run.told" if part.after is None else "slice.told", part.run_id, part.after)
    members = {group["decision"]: group["members"] for group in counted}
    execute(
        UPDATE_PROGRESS_SQL,
        {
            "run_id": part.run_id,
            "members": sum(members.values()),
            "added": counted[0]["added"] if counted else 0,
            "withdrawn": withdrawn + (counted[0]["withdrawn"] if counted else 0),
            "decisions": Jsonb({decision: members.get(decision, 0) for decision in DECISIONS}),
            "slices": slices,
            "total": total,
            "retries": retries,
        },
    )
    failpoint("run.counted" if part.after is None else "slice.counted", part.run_id, part.after)
