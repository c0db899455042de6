"""Checks of the notifications: one pass over each partition, and the partitions themselves."""

import re
from collections.abc import Callable

from peewee import ProgrammingError

from belfry.core.db import LARGEST_ID, fetch_all, fetch_one
from belfry.core.partitions import PARTITIONS_AHEAD, Partition, list_partitions
from belfry.fanout.decision import NOTIFY_DECISIONS
from belfry.integrity.findings import Finding, Report

OLD_SECONDS = 600
"""After this time in use, a partition has PARTITIONS_AHEAD others after it, if a worker runs."""
_TOLERANCE = "make_interval(secs => %(tolerance)s)"
KEPT_FROM = """(
        SELECT min(substring(part.relname FROM '^notification_before_([0-9]+)(?:_[0-9]+)?$')::bigint)
        FROM pg_inherits link
        JOIN pg_class part ON part.oid = link.inhrelid
        WHERE link.inhparent = 'notification'::regclass
    )"""
"""As `partitions.oldest_retained_message_id`, but within a statement, which sees the same partitions throughout."""

_MENTION_IS_WRONG = """CASE note.reason
            WHEN 'mention' THEN note.user_id <> ALL(msg.mentioned_users)
            WHEN 'mention_role' THEN msg.mentioned_roles = '{}'
            WHEN 'mention_everyone' THEN NOT msg.mentions_everyone
            ELSE false END"""
_MENTION_IS_MISSING = """note.reason <> 'mention'
            AND (note.user_id = ANY(msg.mentioned_users) OR (note.reason = 'message' AND msg.mentions_everyone))"""

FAULTS = {
    "a notification is of a message that exists": ("msg.id IS NULL", "of no message"),
    "a notification is for a user who exists": (
        "note.user_id NOT BETWEEN 1 AND (SELECT max(id) FROM user_account)",
        "for a user id that was never given",
    ),
    "nobody is notified of their own message": ("note.user_id = msg.author_id", "for its author"),
    "a test message notifies one user only": (
        "note.user_id <> msg.visible_to_user_id",
        "for a user who is not its only recipient",
    ),
    "the times of a notification are in order": (
        f"""note.created_at < msg.earliest
        OR note.read_at < msg.earliest
        OR note.dismissed_at < msg.earliest
        OR GREATEST(note.created_at, note.read_at, note.dismissed_at) > (SELECT now() + {_TOLERANCE})""",
        "from before the message, from the future, or read before they were created",
    ),
    "a notification has the reason that the mentions give": (
        f"""(msg.has_mentions OR note.reason <> 'message')
        AND CASE WHEN msg.runs = 1 THEN {_MENTION_IS_WRONG} OR ({_MENTION_IS_MISSING})
            ELSE msg.is_finished AND note.read_at IS NULL AND note.dismissed_at IS NULL AND msg.deleted_at IS NULL
                AND {_MENTION_IS_WRONG} END""",
        "for a mention that the message does not have, or without the mention that it has",
    ),
}
"""{check: (condition, description)}. One notification of each message is reported, for the first check that finds one.

A message with one run has the mentions of that run's time. An edit that changes them has a run too, which changes the
reason of unread notifications only."""

_RUNS = """
        SELECT message_id, count(*) AS runs, sum(notifications_inserted - notifications_retracted) AS made,
            bool_and(state = 'succeeded') AS is_finished, min(members_total) AS members_total,
            min(created_at) AS created_at,
            (array_agg(decisions))[1] AS decisions
        FROM run
        WHERE message_id >= %(lower)s
        AND message_id < %(below)s
        GROUP BY message_id
"""

PARTITION_SQL = """
    WITH stored AS MATERIALIZED (
        SELECT note.message_id, count(*) AS notifications, {reasons},
            count(*) FILTER (
                WHERE member.user_id IS NULL
                OR (member.joined_at > note.created_at AND member.joined_at > note.created_at + {tolerance})
            ) AS strangers,
            min(CASE {faults} END) AS fault
        FROM {partition} note
        LEFT JOIN (
            SELECT msg.id, msg.author_id, msg.visible_to_user_id, msg.deleted_at, msg.mentioned_users,
                msg.mentioned_roles, msg.mentions_everyone, msg.created_at - {tolerance} AS earliest, chan.server_id,
                decided.runs, decided.is_finished,
                msg.mentioned_users <> '{{}}' OR msg.mentions_everyone AS has_mentions
            FROM message msg
            JOIN channel chan ON chan.id = msg.channel_id
            LEFT JOIN ({runs}) decided ON decided.message_id = msg.id
            WHERE msg.id >= %(lower)s
            AND msg.id < %(below)s
        ) msg ON msg.id = note.message_id
        LEFT JOIN member ON member.server_id = msg.server_id AND member.user_id = note.user_id
        WHERE note.message_id >= %(lower)s
        GROUP BY note.message_id
    ),
    counted AS MATERIALIZED (
        SELECT message_id, COALESCE(stored.notifications, 0) AS notifications,
            COALESCE(stored.strangers, 0) AS strangers, to_jsonb(stored) AS reasons,
            decided.runs, decided.made, decided.is_finished, decided.members_total, decided.created_at,
            decided.decisions
        FROM stored
        FULL JOIN ({runs}) decided USING (message_id)
    ),
    joined AS MATERIALIZED (
        SELECT server_id, array_agg(joined_at ORDER BY joined_at) AS joined
        FROM member
        WHERE server_id IN (
            SELECT chan.server_id
            FROM counted
            JOIN message msg ON msg.id = counted.message_id
            JOIN channel chan ON chan.id = msg.channel_id
            WHERE counted.strangers > 0)
        GROUP BY server_id
    )
    SELECT 'there are the notifications that the runs inserted',
        'message ' || message_id || ' has ' || notifications || ' notifications, and its runs added '
        || COALESCE(made, 0)
    FROM counted
    WHERE notifications <> COALESCE(made, 0)
    AND message_id >= {kept_from}
    UNION ALL
    SELECT 'there are the notifications that the run decided, by reason',
        'message ' || message_id || ' has ' || COALESCE(reasons ->> reason, '0') || ' notifications for ' || reason
        || ', and its run decided ' || COALESCE(decisions ->> reason, '0')
    FROM counted
    CROSS JOIN unnest(ARRAY[{listed}]) AS reason
    WHERE runs = 1
    AND notifications = made
    AND message_id >= {kept_from}
    AND COALESCE(reasons ->> reason, '0') <> COALESCE(decisions ->> reason, '0')
    UNION ALL
    SELECT split_part(fault, '|', 1), 'notification ' || split_part(fault, '|', 2) || '-' || message_id
        || ' is ' || CASE split_part(fault, '|', 1) {called} END
    FROM stored
    WHERE fault IS NOT NULL
    UNION ALL
    SELECT 'a notification is for a member of the server',
        'message ' || counted.message_id || ' has ' || counted.strangers
        || ' notifications for users who are not members, and at most '
        || GREATEST(counted.members_total - present.members, 0) || ' members have left since'
    FROM counted
    JOIN message msg ON msg.id = counted.message_id
    JOIN channel chan ON chan.id = msg.channel_id
    LEFT JOIN joined srv ON srv.server_id = chan.server_id
    CROSS JOIN LATERAL (
        SELECT COALESCE(width_bucket(counted.created_at - {tolerance}, srv.joined), 0) AS members
    ) present
    WHERE counted.strangers > 0
    AND counted.runs = 1
    AND counted.is_finished
    AND msg.deleted_at IS NULL
    AND msg.visible_to_user_id IS NULL
    AND counted.strangers > GREATEST(counted.members_total - present.members, 0)
"""
"""Check one partition: read its notifications once, each with its message and its recipient's membership, count them by
message, reason and fault, and compare the counts with those of the runs.

A recipient who is not a member may have left since. At most so many have left: the members that the run processed,
minus those who are still members and joined before it."""


def _partition_sql(partition: Partition) -> str:
    return PARTITION_SQL.format(
        partition=partition.name,
        runs=_RUNS,
        tolerance=_TOLERANCE,
        kept_from=KEPT_FROM,
        faults=" ".join(f"WHEN {condition} THEN '{name}|' || note.user_id" for name, (condition, _) in FAULTS.items()),
        called=" ".join(f"WHEN '{name}' THEN '{called}'" for name, (_, called) in FAULTS.items()),
        reasons=", ".join(
            f'count(*) FILTER (WHERE note.reason = \'{reason}\') AS "{reason}"' for reason in NOTIFY_DECISIONS
        ),
        listed=", ".join(f"'{reason}'" for reason in NOTIFY_DECISIONS),
    )


def check_notifications(report: Report, since: int, on_partition: Callable[[int, int], None]) -> None:
    """Check the notifications of messages with an id from `since` on, partition by partition, the newest first.

    `on_partition` is called after each with (checked, all). A partition that is dropped before its turn is skipped.
    """
    there = [one for one in reversed(list_partitions()) if one.upper > since]
    for number, partition in enumerate(there, 1):
        lower = -LARGEST_ID if partition.lower is None else partition.lower
        try:
            report.run(_partition_sql(partition), {"lower": max(lower, since), "below": partition.upper})
        except ProgrammingError:
            if partition in list_partitions():
                raise
            report.notes.append(f"not checked: {partition.name}, which was dropped meanwhile")
        on_partition(number, len(there))


_BOUNDS = re.compile(r"FOR VALUES FROM \((?:MINVALUE|'(-?\d+)')\) TO \('(-?\d+)'\)")


def check_partitions(report: Report) -> None:
    """Check that every message id has a partition, that partitions exist ahead, and that none is detached."""
    found = fetch_all(
        """
        SELECT part.relname AS name, pg_get_expr(part.relpartbound, part.oid) AS bounds,
            link.inhrelid IS NOT NULL AND NOT link.inhdetachpending AS is_attached
        FROM pg_class part
        LEFT JOIN pg_inherits link ON link.inhrelid = part.oid AND link.inhparent = 'notification'::regclass
        WHERE link.inhrelid IS NOT NULL
        OR (part.relname ~ '^notification_before_[0-9]+(_[0-9]+)?$'
            AND part.relkind = 'r'
            AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = part.oid AND attname = 'message_id')
            AND part.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'notification'::regclass))
        ORDER BY part.relname
        """
    )
    bounds: list[tuple[int | None, int]] = []
    for one in found:
        matched = _BOUNDS.fullmatch(one["bounds"] or "")
        if not one["is_attached"]:
            report.add([Finding("no partition is detached", f"{one['name']} is not attached to notification")])
        elif matched and re.fullmatch(rf"notification_before_{matched[2]}(_\d+)?", one["name"]):
            bounds.append((int(matched[1]) if matched[1] else None, int(matched[2])))
        else:
            text = f"{one['name']} is attached to notification {one['bounds']}, and Belfry did not create it"
            report.add([Finding("every partition was made by Belfry", text)])
    bounds.sort(key=lambda one: one[1])
    expected: int | None = None
    for lower, upper in bounds:
        if lower != expected:
            text = f"no partition has the notifications of messages from {expected} to {lower}"
            report.add([Finding("the partitions have no gap", text)])
        expected = upper
    _check_ahead(report, bounds)


def _check_ahead(report: Report, bounds: list[tuple[int | None, int]]) -> None:
    """The next message needs a partition, and so do those before a worker's next check."""
    name = "there are partitions ahead"
    found = fetch_one("SELECT last_value + is_called::int AS id FROM message_id_seq")
    assert found is not None
    here = [one for one in bounds if one[1] > found["id"]]
    if not here or (here[0][0] is not None and here[0][0] > found["id"]):
        report.add([Finding(name, f"no partition has the next message, {found['id']}: nobody can be notified of it")])
        return
    is_old = fetch_one(
        "SELECT created_at < now() - make_interval(secs => %(seconds)s) AS is_old"
        " FROM message WHERE id >= %(lower)s ORDER BY id LIMIT 1",
        {"lower": here[0][0] or -LARGEST_ID, "seconds": OLD_SECONDS},
    )
    needed = PARTITIONS_AHEAD if is_old and is_old["is_old"] else 1
    if len(here) - 1 < needed:
        ahead, end = len(here) - 1, here[0][1]
        text = f"{ahead} partitions are ahead of the one in use, which ends at {end}: {PARTITIONS_AHEAD} should be"
        report.add([Finding(name, text)])
