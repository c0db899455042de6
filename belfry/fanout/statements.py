"""The SQL statements of the fan-out: plan slices, insert or change notifications, update the run."""
from belfry.fanout.decision import BATCH_DECISIONS_SQL, DECISIONS_SQL, NOTIFY_DECISIONS
from models import LARGEST_ID

_NOTIFY_DECISIONS_SQL = ", ".join(f"'{reason}'" for reason in NOTIFY_DECISIONS)


def _log_sql(told: str) -> str:
    """What writes down that this transaction tells, for the live stream: the messages, and whether to recount."""
    return f"""
        INSERT INTO telling (message_ids, recount)
        {told}
        ON CONFLICT (xid) DO UPDATE
        SET message_ids = telling.message_ids || EXCLUDED.message_ids,
            recount = telling.recount OR EXCLUDED.recount
    """


INSERT_NOTIFICATIONS_SQL = f"""
    WITH decided AS MATERIALIZED ({DECISIONS_SQL}),
    told AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, %(message_id)s, decision::reason
        FROM decided
        WHERE decision IN ({_NOTIFY_DECISIONS_SQL})
        ORDER BY user_id
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING 1
    ),
    logged AS ({_log_sql("SELECT ARRAY[%(message_id)s::bigint], false WHERE EXISTS (SELECT FROM told)")})
    SELECT decision, count(*) AS members, (SELECT count(*) FROM told) AS added, 0 AS withdrawn
    FROM decided
    GROUP BY decision
"""
"""One slice of a message, a test or a replay: tells whoever is to be told and has not been. In the order of people, as
everywhere: two parts that tell the same ones wait for each other, and not each for the other."""


INSERT_BATCH_SQL = f"""
    WITH decided AS MATERIALIZED ({BATCH_DECISIONS_SQL}),
    told AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, message_id, decision::reason
        FROM decided
        WHERE decision IN ({_NOTIFY_DECISIONS_SQL})
        ORDER BY user_id, message_id
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING message_id
    ),
    added AS (SELECT message_id, count(*) AS added FROM told GROUP BY message_id),
    logged AS ({_log_sql("SELECT array_agg(message_id), false FROM added HAVING count(*) > 0")}),
    counted AS (
        SELECT message_id, sum(members) AS members, jsonb_object_agg(decision, members) AS decisions
        FROM (SELECT message_id, decision, count(*) AS members FROM decided GROUP BY message_id, decision) groups
        GROUP BY message_id
    )
    UPDATE run
    SET done = COALESCE(c.members, 0),
        total = COALESCE(c.members, 0),
        added = COALESCE(a.added, 0),
        decisions = %(nobody)s::jsonb || COALESCE(c.decisions, '{{}}'),
        state = 'succeeded',
        finished_at = now(),
        error = NULL,
        due_at = NULL
    FROM unnest(%(run_ids)s::bigint[], %(message_ids)s::bigint[]) AS held (run_id, message_id)
    LEFT JOIN counted c USING (message_id)
    LEFT JOIN added a USING (message_id)
    WHERE run.id = held.run_id
    RETURNING run.id AS run_id, run.total, run.added
"""
"""All of many small runs: insert the notifications that are missing, and finish the runs."""


def _in_mention_diff_sql(change: str) -> str:
    """Whether the edit's `added` or `removed` mentions name a member."""
    return f"""(
        user_id = ANY(%({change}_users)s::bigint[])
        OR %({change}_everyone)s
        OR EXISTS (
            SELECT FROM member_role r
            WHERE r.user_id = decided.user_id
            AND r.role_id = ANY(%({change}_roles)s::bigint[]))
    )"""


_NOTIFIED_VIA_REMOVED_ROLE_SQL = """(
        cardinality(%(removed_roles)s::bigint[]) > 0
        AND decision <> 'mention_role'
        AND EXISTS (
            SELECT FROM notification n
            WHERE n.user_id = decided.user_id
            AND n.message_id = %(message_id)s
            AND n.reason = 'mention_role')
    )"""
"""Who was told as the bearer of a role that the edit removed from the mentions, and may have lost it since."""


_EDIT_CHANGED_SQL = """
        SELECT ARRAY[%(message_id)s::bigint], true
        WHERE EXISTS (SELECT FROM told)
        OR EXISTS (SELECT FROM withdrawn)
        OR EXISTS (SELECT FROM changed)
"""

APPLY_EDIT_SQL = f"""
    WITH decided AS MATERIALIZED ({DECISIONS_SQL}),
    concerned AS MATERIALIZED (
        SELECT user_id, decision, telling, newly_mentioned, not_mentioned_now
        FROM (
            SELECT user_id, decision, decision IN ({_NOTIFY_DECISIONS_SQL}) AS telling,
                {_in_mention_diff_sql("added")} AS newly_mentioned,
                {_in_mention_diff_sql("removed")} OR {_NOTIFIED_VIA_REMOVED_ROLE_SQL} AS not_mentioned_now
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
        ORDER BY user_id
        ON CONFLICT (user_id, message_id) DO NOTHING
        RETURNING 1
    ),
    logged AS ({_log_sql(_EDIT_CHANGED_SQL)})
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

RETRACT_FROM_FORMER_MEMBERS_SQL = """
    DELETE FROM notification n
    WHERE n.message_id = %(message_id)s
    AND n.user_id > %(after)s
    AND n.user_id <= %(up_to)s
    AND (%(of_groups)s OR n.user_id = ANY(%(removed_users)s::bigint[]))
    AND n.read_at IS NULL
    AND n.dismissed_at IS NULL
    AND CASE n.reason
        WHEN 'mention' THEN n.user_id <> ALL(%(mentioned_users)s::bigint[])
        WHEN 'mention_role' THEN %(mentioned_roles)s::bigint[] = '{}'
        WHEN 'mention_everyone' THEN NOT %(mentions_everyone)s
        ELSE false END
    AND NOT EXISTS (SELECT FROM member m WHERE m.server_id = %(server_id)s AND m.user_id = n.user_id)
"""
"""Of an edit that takes mentions out: who was told for one and has left the server since is among nobody's members, and
would find it unread on coming back."""

PLAN_SLICES_SQL = f"""
    WITH numbered AS (
        SELECT user_id, row_number() OVER (ORDER BY user_id) AS number
        FROM member
        WHERE server_id = %(server_id)s
    ),
    bounds AS (
        SELECT CASE number WHEN 1 THEN 0 ELSE user_id - 1 END AS after,
            COALESCE(lead(user_id) OVER (ORDER BY user_id) - 1, {LARGEST_ID}) AS up_to
        FROM numbered
        WHERE number %% %(members)s = 1 OR %(members)s = 1
    ),
    shared AS (
        INSERT INTO slice (run_id, after, up_to, told_first)
        SELECT %(run_id)s, after, up_to,
            ARRAY(SELECT id FROM unnest(%(told_first)s::bigint[]) AS id WHERE id > after AND id <= up_to)
        FROM bounds
        RETURNING after
    )
    SELECT ARRAY(SELECT after FROM shared ORDER BY after) AS slices,
        (SELECT count(*) FROM member WHERE server_id = %(server_id)s) AS total
"""
"""The slices of a large run: ranges of so many members each, the last without an end, so that there are no gaps."""

UPDATE_PROGRESS_SQL = """
    UPDATE run
    SET done = done + %(members)s,
        added = added + %(added)s,
        withdrawn = withdrawn + %(withdrawn)s,
        attempts = attempts + %(retries)s,
        slices_left = slices_left + %(slices)s,
        total = CASE WHEN slices_left + %(slices)s = 0
            THEN done + %(members)s
            ELSE GREATEST(COALESCE(%(total)s, total), done + %(members)s) END,
        decisions = (
            SELECT jsonb_object_agg(key, COALESCE((run.decisions ->> key)::int, 0) + value::int)
            FROM jsonb_each_text(%(decisions)s)),
        state = CASE WHEN slices_left + %(slices)s = 0 THEN 'succeeded'
            WHEN state = 'failed' THEN 'failed'
            ELSE 'running' END,
        finished_at = CASE WHEN slices_left + %(slices)s = 0 THEN now() ELSE finished_at END,
        error = CASE WHEN slices_left + %(slices)s > 0 AND state = 'failed' THEN error END,
        due_at = NULL
    WHERE id = %(run_id)s
"""
"""What one part comes to, added to the run; with it the run may be finished. One statement, of the row as it is
when the lock is had: so that two slices that end at once are both counted, and the later one finishes the run.
A run of which a slice was given up stays failed until that slice is done."""
