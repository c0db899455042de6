"""The SQL statements of the fan-out: plan slices, insert, change or delete notifications, update the run."""

from belfry.core.db import LARGEST_ID
from belfry.fanout.decision import BATCH_DECISIONS_SQL, DECISIONS_SQL, NOTIFY_DECISIONS

_NOTIFY_DECISIONS_SQL = ", ".join(f"'{reason}'" for reason in NOTIFY_DECISIONS)


def _log_sql(notified: str) -> str:
    """Record in the log of this transaction what the stream has to send: message ids, and whether counts changed."""
    return f"""
        INSERT INTO notification_log (message_ids, counts_changed)
        {notified}
        ON CONFLICT (xid) DO UPDATE
        SET message_ids = notification_log.message_ids || EXCLUDED.message_ids,
            counts_changed = notification_log.counts_changed OR EXCLUDED.counts_changed
    """


INSERT_NOTIFICATIONS_SQL = f"""
    WITH decided AS MATERIALIZED ({DECISIONS_SQL}),
    inserted AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, %(message_id)s, decision::reason
        FROM decided
        WHERE decision IN ({_NOTIFY_DECISIONS_SQL})
        ORDER BY user_id
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING 1
    ),
    logged AS ({_log_sql("SELECT ARRAY[%(message_id)s::bigint], false WHERE EXISTS (SELECT FROM inserted)")})
    SELECT decision, count(*) AS members, (SELECT count(*) FROM inserted) AS inserted, 0 AS retracted
    FROM decided
    GROUP BY decision
"""
"""Process one slice of a message, a test or a replay: insert the notifications that do not exist yet.

Rows are inserted in the order of user ids, here as in every statement: two transactions that insert the same rows wait
for one another in one direction only, and cannot deadlock.
"""


INSERT_BATCH_SQL = f"""
    WITH decided AS MATERIALIZED ({BATCH_DECISIONS_SQL}),
    inserted AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, message_id, decision::reason
        FROM decided
        WHERE decision IN ({_NOTIFY_DECISIONS_SQL})
        ORDER BY user_id, message_id
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING message_id
    ),
    inserted_by_message AS (SELECT message_id, count(*) AS notifications FROM inserted GROUP BY message_id),
    logged AS ({_log_sql("SELECT array_agg(message_id), false FROM inserted_by_message HAVING count(*) > 0")}),
    counted AS (
        SELECT message_id, sum(members) AS members, jsonb_object_agg(decision, members) AS decisions
        FROM (SELECT message_id, decision, count(*) AS members FROM decided GROUP BY message_id, decision) groups
        GROUP BY message_id
    )
    UPDATE run
    SET members_processed = COALESCE(counted.members, 0),
        members_total = COALESCE(counted.members, 0),
        notifications_inserted = COALESCE(inserted_by_message.notifications, 0),
        decisions = %(no_decisions)s::jsonb || COALESCE(counted.decisions, '{{}}'),
        state = 'succeeded',
        finished_at = now(),
        error = NULL,
        sweep_after = NULL
    FROM unnest(%(run_ids)s::bigint[], %(message_ids)s::bigint[]) AS locked (run_id, message_id)
    LEFT JOIN counted USING (message_id)
    LEFT JOIN inserted_by_message USING (message_id)
    WHERE run.id = locked.run_id
    RETURNING run.id AS run_id, run.members_total, run.notifications_inserted
"""
"""Process many small runs: insert the notifications that do not exist yet, and finish the runs."""


def _in_mention_diff_sql(change: str) -> str:
    """Whether the mentions that an edit `added` or `removed` name a member."""
    return f"""(
        user_id = ANY(%({change}_users)s::bigint[])
        OR %({change}_everyone)s
        OR EXISTS (
            SELECT FROM member_role
            WHERE member_role.user_id = decided.user_id
            AND member_role.role_id = ANY(%({change}_roles)s::bigint[]))
    )"""


_NOTIFIED_VIA_REMOVED_ROLE_SQL = """(
        cardinality(%(removed_roles)s::bigint[]) > 0
        AND decision <> 'mention_role'
        AND EXISTS (
            SELECT FROM notification note
            WHERE note.user_id = decided.user_id
            AND note.message_id = %(message_id)s
            AND note.reason = 'mention_role')
    )"""
"""Whether a member was notified because of a role that the edit removed from the mentions. They may have lost the role
since, so that `_in_mention_diff_sql` does not find them."""


_EDIT_LOG_SQL = """
        SELECT ARRAY[%(message_id)s::bigint], true
        WHERE EXISTS (SELECT FROM inserted)
        OR EXISTS (SELECT FROM retracted)
        OR EXISTS (SELECT FROM changed)
"""

APPLY_EDIT_SQL = f"""
    WITH decided AS MATERIALIZED ({DECISIONS_SQL}),
    affected AS MATERIALIZED (
        SELECT user_id, decision, notifies, newly_mentioned, not_mentioned_now
        FROM (
            SELECT user_id, decision, decision IN ({_NOTIFY_DECISIONS_SQL}) AS notifies,
                {_in_mention_diff_sql("added")} AS newly_mentioned,
                {_in_mention_diff_sql("removed")} OR {_NOTIFIED_VIA_REMOVED_ROLE_SQL} AS not_mentioned_now
            FROM decided
        ) members
        WHERE newly_mentioned OR not_mentioned_now
    ),
    retracted AS (
        DELETE FROM notification note
        USING affected
        WHERE note.user_id = affected.user_id
        AND note.message_id = %(message_id)s
        AND note.read_at IS NULL
        AND note.dismissed_at IS NULL
        AND affected.not_mentioned_now
        AND NOT affected.notifies
        RETURNING 1
    ),
    changed AS (
        UPDATE notification note
        SET reason = affected.decision::reason,
            read_at = CASE WHEN note.reason = 'message' THEN NULL ELSE note.read_at END
        FROM affected
        WHERE note.user_id = affected.user_id
        AND note.message_id = %(message_id)s
        AND affected.notifies
        AND note.reason <> affected.decision::reason
        RETURNING 1
    ),
    inserted AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, %(message_id)s, decision::reason
        FROM affected
        WHERE newly_mentioned
        AND notifies
        AND decision <> 'message'
        ORDER BY user_id
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING 1
    ),
    logged AS ({_log_sql(_EDIT_LOG_SQL)})
    SELECT decision, count(*) AS members,
        (SELECT count(*) FROM inserted) AS inserted,
        (SELECT count(*) FROM retracted) AS retracted
    FROM decided
    GROUP BY decision
"""
"""Process one slice of an edit. It changes only what belongs to members whom the edit added to, or removed from, the
mentions:

- A newly mentioned member is notified. A plain notification becomes a mention and is unread again.
- A member who is not mentioned any more, and would not be notified otherwise, loses the notification while it is
  unread. A dismissed one is kept, or the next edit would create it again.
- A member who is notified for another reason now keeps the notification, with that reason.
"""

RETRACT_FROM_FORMER_MEMBERS_SQL = """
    DELETE FROM notification note
    WHERE note.message_id = %(message_id)s
    AND note.user_id > %(after_user_id)s
    AND note.user_id <= %(to_user_id)s
    AND (%(of_groups)s OR note.user_id = ANY(%(removed_users)s::bigint[]))
    AND note.read_at IS NULL
    AND note.dismissed_at IS NULL
    AND CASE note.reason
        WHEN 'mention' THEN note.user_id <> ALL(%(mentioned_users)s::bigint[])
        WHEN 'mention_role' THEN %(mentioned_roles)s::bigint[] = '{}'
        WHEN 'mention_everyone' THEN NOT %(mentions_everyone)s
        ELSE false END
    AND NOT EXISTS (SELECT FROM member WHERE server_id = %(server_id)s AND user_id = note.user_id)
"""
"""Retract, for an edit that removes mentions, from users who were notified of one and have left the server since. They
are in no audience, and would find the notification unread if they came back."""

PLAN_SLICES_SQL = f"""
    WITH numbered AS (
        SELECT user_id, row_number() OVER (ORDER BY user_id) AS number
        FROM member
        WHERE server_id = %(server_id)s
    ),
    bounds AS (
        SELECT CASE number WHEN 1 THEN 0 ELSE user_id - 1 END AS after_user_id,
            COALESCE(lead(user_id) OVER (ORDER BY user_id) - 1, {LARGEST_ID}) AS to_user_id
        FROM numbered
        WHERE number %% %(members)s = 1 OR %(members)s = 1
    ),
    planned AS (
        INSERT INTO slice (run_id, after_user_id, to_user_id, excluded_user_ids)
        SELECT %(run_id)s, after_user_id, to_user_id, ARRAY(
            SELECT id
            FROM unnest(%(excluded_user_ids)s::bigint[]) AS id
            WHERE id > after_user_id
            AND id <= to_user_id)
        FROM bounds
        RETURNING after_user_id
    )
    SELECT ARRAY(SELECT after_user_id FROM planned ORDER BY after_user_id) AS slices,
        (SELECT count(*) FROM member WHERE server_id = %(server_id)s) AS members_total
"""
"""Insert the slices of a large run: ranges of `members` members each. The last has no upper bound and the first no
lower one, so that no user id lies between two slices."""

UPDATE_PROGRESS_SQL = """
    UPDATE run
    SET members_processed = members_processed + %(members)s,
        notifications_inserted = notifications_inserted + %(inserted)s,
        notifications_retracted = notifications_retracted + %(retracted)s,
        attempts = attempts + %(retries)s,
        slices_left = slices_left + %(slices)s,
        members_total = CASE WHEN slices_left + %(slices)s = 0
            THEN members_processed + %(members)s
            ELSE GREATEST(COALESCE(%(members_total)s, members_total), members_processed + %(members)s) END,
        decisions = (
            SELECT jsonb_object_agg(key, COALESCE((run.decisions ->> key)::int, 0) + value::int)
            FROM jsonb_each_text(%(decisions)s)),
        state = CASE WHEN slices_left + %(slices)s = 0 THEN 'succeeded'
            WHEN state = 'failed' THEN 'failed'
            ELSE 'running' END,
        finished_at = CASE WHEN slices_left + %(slices)s = 0 THEN now() ELSE finished_at END,
        error = CASE WHEN slices_left + %(slices)s > 0 AND state = 'failed' THEN error END,
        sweep_after = NULL
    WHERE id = %(run_id)s
"""
"""Add the counts of one work item to its run, and finish the run where no slice is left.

It is one statement on the row as it is once it is locked: two slices that end at the same time are both counted, and
the later one finishes the run. A run with a failed slice stays failed until that slice succeeds.
"""
