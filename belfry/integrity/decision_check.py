"""`verify --decisions`: repeat recent decisions, and compare them with the notifications member by member.

A decision can be compared only while its inputs are unchanged. What was inserted or updated since has a time. What was
removed has none, but changes how many members have which decision:

1. A run is skipped whose message was deleted, edited or replayed since.
2. A member is skipped whose own membership, subscription, preference, roles or rights changed since, or changed by time
   alone (a period or a mute that ended), or whose subscription is past due, because the grace is a setting.
3. Where roles matter (a private channel, a mentioned role), a run is skipped as soon as 2 applies to any member, a role
   was given to the channel, or the counts of the decisions differ from those stored: then a role or a member may have
   been removed. With equal counts nothing was removed, because a removal only takes access away.
"""

from collections import Counter
from dataclasses import dataclass, field

from belfry.core.db import Row, fetch_all
from belfry.fanout.decision import DECISIONS_SQL, NOTIFY_DECISIONS, FanoutMessage, load_fanout_message
from belfry.integrity.findings import TOLERANCE_SECONDS, Finding, Report
from belfry.integrity.notification_checks import KEPT_FROM

CHECK = "the notifications are those that the rules decide"

_RUNS = """
    SELECT run.id, run.message_id, run.decisions,
        run.started_at - make_interval(secs => %(tolerance)s) AS since
    FROM run
    WHERE run.state = 'succeeded'
    AND run.kind IN ('message', 'test')
    AND run.started_at IS NOT NULL
    ORDER BY run.id DESC
    LIMIT %(limit)s
"""

_COMPARE = f"""
    WITH decided AS MATERIALIZED ({DECISIONS_SQL}),
    changed AS MATERIALIZED (
        SELECT member.user_id
        FROM member
        JOIN user_account usr ON usr.id = member.user_id
        LEFT JOIN subscription sub ON sub.user_id = member.user_id
        LEFT JOIN preference pref ON pref.channel_id = %(channel_id)s AND pref.user_id = member.user_id
        WHERE member.server_id = %(server_id)s
        AND (member.joined_at > %(since)s
            OR usr.admin_changed_at > %(since)s
            OR sub.updated_at > %(since)s
            OR sub.current_period_end + interval '24 hours' BETWEEN %(since)s AND now()
            OR (sub.status = 'past_due' AND sub.current_period_end IS NOT NULL)
            OR pref.updated_at > %(since)s
            OR pref.muted_until BETWEEN %(since)s AND now())
        UNION
        SELECT user_id FROM member_role WHERE server_id = %(server_id)s AND added_at > %(since)s
    )
    SELECT decided.decision, note.reason::text AS reason, changed.user_id IS NOT NULL AS is_changed,
        count(*) AS members, min(decided.user_id) AS first_user_id,
        EXISTS (SELECT FROM run WHERE message_id = %(message_id)s AND id <> %(run_id)s)
            OR (SELECT deleted_at IS NOT NULL FROM message WHERE id = %(message_id)s)
            OR %(message_id)s < {KEPT_FROM} AS is_over,
        EXISTS (SELECT FROM channel_role WHERE channel_id = %(channel_id)s AND added_at > %(since)s) AS is_opened
    FROM decided
    LEFT JOIN notification note ON note.message_id = %(message_id)s AND note.user_id = decided.user_id
    LEFT JOIN changed ON changed.user_id = decided.user_id
    GROUP BY 1, 2, 3
"""
"""The decisions of now beside the notifications, counted, in one snapshot."""


@dataclass
class _Progress:
    runs: int = 0
    members: int = 0
    changed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def check_decisions(report: Report, limit: int) -> None:
    """Compare the newest `limit` successful runs of messages, and note what was skipped and why."""
    progress = _Progress()
    found = fetch_all(_RUNS, {"limit": limit, "tolerance": TOLERANCE_SECONDS})
    for run in found:
        subject = load_fanout_message(run["message_id"])
        assert subject is not None  # run.message_id is a foreign key
        _compare(run, subject, report, progress)
    report.notes.append(
        f"decisions compared: of {progress.members} members in {progress.runs} runs, the newest"
        + (f"; of none before run {found[-1]['id']}" if len(found) == limit else "")
    )
    report.notes += [f"decisions not compared: {number} runs {why}" for why, number in progress.skipped.items()]
    if progress.changed:
        report.notes.append(f"decisions not compared: of {progress.changed} members whose inputs have changed since")


def _compare(run: Row, subject: FanoutMessage, report: Report, progress: _Progress) -> None:
    groups = fetch_all(_COMPARE, {**subject.parameters(), "since": run["since"], "run_id": run["id"]})
    if any(group["is_over"] for group in groups):
        progress.skipped["of messages that were deleted, edited, replayed, or are older than RETENTION_DAYS"] += 1
        return
    stored = {decision: members for decision, members in run["decisions"].items() if members}
    if subject.private or subject.mentioned_roles or "no_channel_access" in stored:
        now: Counter[str] = Counter()
        for group in groups:
            now[group["decision"]] += group["members"]
        if now != stored or any(group["is_changed"] or group["is_opened"] for group in groups):
            progress.skipped["that depend on roles, whose members or roles have changed since"] += 1
            return
    progress.runs += 1
    for group in groups:
        if group["is_changed"]:
            progress.changed += group["members"]
            continue
        progress.members += group["members"]
        expected = group["decision"] if group["decision"] in NOTIFY_DECISIONS else None
        if group["reason"] != expected:
            report.add([Finding(CHECK, _described(run, group))])


def _described(run: Row, group: Row) -> str:
    stored = f"have a notification for {group['reason']}" if group["reason"] else "have no notification"
    return (
        f"run {run['id']}, message {run['message_id']}: {group['members']} members {stored}, and the rules decide"
        f" {group['decision']}; the first is user {group['first_user_id']}"
    )
