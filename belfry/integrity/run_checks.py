"""Check messages, runs and slices: each in itself, with the others, and that the sweeper can find unfinished ones."""
from belfry.fanout.decision import DECISIONS, NOTIFY_DECISIONS
from config import settings
from models import MAX_ATTEMPTS, TABLES

OVERDUE_SECONDS = 60
"""Twice the time of recovery, after the longest time of a job."""
_LATEST_RETRY_SECONDS = 86_400 + settings.retry_base_delay_seconds * 3**MAX_ATTEMPTS
"""No work item is due later than its longest retry interval, and one day, because the setting may have been longer."""
_UNFINISHED = "run.state IN ('pending', 'queued', 'running')"
_TOLERANCE = "make_interval(secs => %(tolerance)s)"


def _listed(values: tuple[str, ...]) -> str:
    return ", ".join(f"'{value}'" for value in values)


RUN_CHECKS = {
    "no run has failed": (
        "run.state = 'failed'",
        "'run ' || run.id || ' failed: ' || run.error",
    ),
    "a run counts each member under one decision": (
        "counted.members <> run.members_processed OR counted.is_malformed",
        "'run ' || run.id || ' processed ' || run.members_processed || ' members, and its decisions count '"
        " || counted.members || CASE WHEN counted.is_malformed THEN ', with a count that cannot be' ELSE '' END",
    ),
    "a run inserts only the notifications that it decided": (
        "run.notifications_inserted > counted.notified",
        "'run ' || run.id || ' inserted ' || run.notifications_inserted || ' notifications, and decided to notify '"
        " || counted.notified",
    ),
    "a run inserts all notifications that it decided": (
        """run.state = 'succeeded'
        AND run.kind IN ('message', 'test')
        AND run.notifications_inserted < counted.notified
        AND NOT EXISTS (SELECT FROM run other WHERE other.message_id = run.message_id AND other.id <> run.id)""",
        "'run ' || run.id || ' inserted ' || run.notifications_inserted || ' notifications, and decided to notify '"
        " || counted.notified",
    ),
    "a run that succeeded is complete": (
        """run.state = 'succeeded'
        AND (run.members_total IS DISTINCT FROM run.members_processed
            OR run.sweep_after IS NOT NULL
            OR run.error IS NOT NULL)""",
        "'run ' || run.id || ' succeeded with ' || run.members_processed || ' of '"
        " || COALESCE(run.members_total::text, '?') || ' members processed, due '"
        " || COALESCE(run.sweep_after::text, 'never')"
        " || ', error ' || COALESCE(run.error, 'none')",
    ),
    "the sweeper can find an unfinished run": (
        f"""{_UNFINISHED}
        AND run.slices_left = 0
        AND (run.sweep_after IS NULL
            OR run.sweep_after > now() + interval '{_LATEST_RETRY_SECONDS} seconds'
            OR (run.state <> 'running' AND run.attempts_left = 0))""",
        "'run ' || run.id || ' is ' || run.state || ', due ' || COALESCE(run.sweep_after::text, 'never') || ', with '"
        " || run.attempts_left || ' attempts left: the sweeper never finds it'",
    ),
    "only a run that is not finished has slices": (
        "run.slices_left > 0 AND run.state NOT IN ('running', 'failed')",
        "'run ' || run.id || ' is ' || run.state || ', and counts ' || run.slices_left || ' slices left'",
    ),
    "a run that was begun has an attempt": (
        "run.state IN ('running', 'succeeded') AND (run.attempts = 0 OR run.started_at IS NULL)",
        "'run ' || run.id || ' is ' || run.state || ' after ' || run.attempts || ' attempts, begun at '"
        " || COALESCE(run.started_at::text, 'no time')",
    ),
    "attempts are counted": (
        f"run.attempts_left > {MAX_ATTEMPTS} OR run.attempts < {MAX_ATTEMPTS} - run.attempts_left",
        "'run ' || run.id || ' has ' || run.attempts_left || ' attempts left after ' || run.attempts",
    ),
    "only an edit changes mentions": (
        """(run.kind = 'edit') <> (run.mention_diff IS NOT NULL)
        OR (run.kind <> 'edit' AND run.notifications_retracted > 0)""",
        "'run ' || run.id || ' is of kind ' || run.kind || ', ' || CASE WHEN run.mention_diff IS NULL"
        " THEN 'has no mention changes' ELSE 'has mention changes' END || ', and retracted '"
        " || run.notifications_retracted || ' notifications'",
    ),
    "a run processes no more members than there are": (
        "run.members_processed > run.members_total",
        "'run ' || run.id || ' processed ' || run.members_processed || ' of ' || run.members_total || ' members'",
    ),
    "the times of a run are in order": (
        f"""GREATEST(run.created_at, run.started_at, run.finished_at) > now() + {_TOLERANCE}
        OR run.started_at < run.created_at - {_TOLERANCE}
        OR run.finished_at < COALESCE(run.started_at, run.created_at) - {_TOLERANCE}""",
        "'run ' || run.id || ' was created at ' || run.created_at || ', begun at '"
        " || COALESCE(run.started_at::text, 'no time') || ', finished at '"
        " || COALESCE(run.finished_at::text, 'no time')",
    ),
}
"""{check: (the condition under which a run is wrong, the finding)}."""

RUNS_SQL = f"""
    WITH wrong AS MATERIALIZED (
        SELECT run.*, counted.*
        FROM run
        CROSS JOIN LATERAL (
            SELECT COALESCE(sum(members), 0) AS members,
                COALESCE(sum(members) FILTER (WHERE decision IN ({_listed(NOTIFY_DECISIONS)})), 0) AS notified,
                COALESCE(bool_or(
                    members IS NULL OR members < 0 OR decision NOT IN ({_listed(tuple(DECISIONS))})
                ), false) AS is_malformed
            FROM (
                SELECT key AS decision, CASE WHEN jsonb_typeof(value) = 'number' THEN value::bigint END AS members
                FROM jsonb_each(run.decisions)
            ) decisions
        ) counted
        WHERE {" OR ".join(f"({condition})" for condition, _ in RUN_CHECKS.values())}
    )
    SELECT checked.check_name, checked.finding
    FROM wrong run
    CROSS JOIN LATERAL (SELECT run.members, run.notified, run.is_malformed) counted
    CROSS JOIN LATERAL (VALUES
        {", ".join(f"('{name}', {condition}, {finding})" for name, (condition, finding) in RUN_CHECKS.items())}
    ) AS checked (check_name, is_wrong, finding)
    WHERE checked.is_wrong
"""
"""All RUN_CHECKS in one pass over the runs."""

WORK_ITEMS_SQL = f"""
    SELECT 'somebody works on what was begun',
        'run ' || item.run_id || ' was begun, and nobody has worked on it since ' || item.sweep_after
    FROM (
        SELECT id AS run_id, sweep_after FROM run WHERE state = 'running'
        UNION ALL
        SELECT run_id, sweep_after FROM slice WHERE attempts > 0
    ) item
    WHERE item.sweep_after < now() - interval '{OVERDUE_SECONDS + settings.job_timeout_seconds} seconds'
    UNION ALL
    SELECT 'a run has the slices that it counts',
        'run ' || COALESCE(run.id, counted.run_id) || ' counts ' || COALESCE(run.slices_left, 0)
        || ' slices left, and has ' || COALESCE(counted.slices, 0)
    FROM (SELECT id, slices_left FROM run WHERE slices_left > 0) run
    FULL JOIN (SELECT run_id, count(*) AS slices FROM slice GROUP BY run_id) counted ON counted.run_id = run.id
    WHERE COALESCE(run.slices_left, 0) <> COALESCE(counted.slices, 0)
    UNION ALL
    SELECT 'no two slices share a member',
        'run ' || run_id || ': the slices after ' || after_user_id || ' and ' || next || ' overlap'
    FROM (
        SELECT run_id, after_user_id, to_user_id,
            lead(after_user_id) OVER (PARTITION BY run_id ORDER BY after_user_id) AS next
        FROM slice
    ) slice
    WHERE next < to_user_id
    UNION ALL
    SELECT 'the sweeper can find a slice',
        'run ' || run.id || ', slice after ' || slice.after_user_id || ': due '
        || COALESCE(slice.sweep_after::text, 'never')
        || ', and the run is ' || run.state || ': the sweeper never finds it'
    FROM slice
    JOIN run ON run.id = slice.run_id
    WHERE (slice.sweep_after IS NULL AND run.state <> 'failed')
    OR slice.sweep_after > now() + interval '{_LATEST_RETRY_SECONDS} seconds'
"""
"""Checks of what is in progress: few runs, and all slices."""

_SERVER_OF_RUN = """
    run
    JOIN message msg ON msg.id = run.message_id AND msg.deleted_at IS NULL AND msg.visible_to_user_id IS NULL
    JOIN channel chan ON chan.id = msg.channel_id
"""

MEMBERS_SQL = f"""
    SELECT 'the slices cover the members who are not processed',
        'run ' || run.id || ' processed ' || run.members_processed || ' members, its slices have ' || remaining.members
        || ' more, and ' || present.members || ' were members before it'
    FROM {_SERVER_OF_RUN}
    CROSS JOIN LATERAL (
        SELECT count(*) AS members
        FROM member
        WHERE member.server_id = chan.server_id
        AND member.joined_at < run.created_at - {_TOLERANCE}
    ) present
    CROSS JOIN LATERAL (
        SELECT COALESCE(sum(in_range.members - first.members), 0) AS members
        FROM slice
        CROSS JOIN LATERAL (
            SELECT count(*) AS members
            FROM member
            WHERE member.server_id = chan.server_id
            AND member.user_id > slice.after_user_id
            AND member.user_id <= slice.to_user_id
        ) in_range
        CROSS JOIN LATERAL (
            SELECT count(*) AS members
            FROM unnest(slice.excluded_user_ids) AS first (user_id)
            JOIN member ON member.server_id = chan.server_id AND member.user_id = first.user_id
        ) first
        WHERE slice.run_id = run.id
    ) remaining
    WHERE run.slices_left > 0
    AND (run.kind = 'edit' OR run.message_id >= %(kept_from)s)
    AND run.members_processed + remaining.members < present.members
    UNION ALL
    SELECT 'a run that succeeded processed every member',
        'run ' || run.id || ' processed ' || run.members_total || ' members, and '
        || width_bucket(run.created_at - {_TOLERANCE}, srv.joined) || ' were members before it'
    FROM {_SERVER_OF_RUN}
    JOIN (
        SELECT server_id, array_agg(joined_at ORDER BY joined_at) AS joined FROM member GROUP BY server_id
    ) srv ON srv.server_id = chan.server_id
    WHERE run.state = 'succeeded'
    AND (run.kind = 'edit' OR run.message_id >= %(kept_from)s)
    AND run.members_total < width_bucket(run.created_at - {_TOLERANCE}, srv.joined)
"""
"""A member who joined before the run was one at its time, so at least so many were processed or are left. More are
possible, because members leave. A message that was deleted since ends its runs early."""

MESSAGES_SQL = f"""
    SELECT 'every message has its run', 'message ' || msg.id || ' has no run: nobody is notified of it'
    FROM message msg
    WHERE NOT EXISTS (
        SELECT FROM run
        WHERE run.message_id = msg.id
        AND run.kind IN ('message', 'test')
        AND (msg.visible_to_user_id IS NULL OR run.kind = 'test'))
    UNION ALL
    SELECT 'the times of a message are in order',
        'message ' || msg.id || ' was created at ' || msg.created_at || ', edited at '
        || COALESCE(msg.edited_at::text, 'no time') || ', deleted at ' || COALESCE(msg.deleted_at::text, 'no time')
    FROM message msg
    WHERE GREATEST(msg.created_at, msg.edited_at, msg.deleted_at) > now() + {_TOLERANCE}
    OR LEAST(msg.edited_at, msg.deleted_at) < msg.created_at - {_TOLERANCE}
    UNION ALL
    SELECT 'a message mentions users who exist', 'message ' || msg.id || ' mentions user '
        || COALESCE(mentioned.user_id::text, 'NULL') || ', who does not exist'
    FROM message msg
    CROSS JOIN LATERAL unnest(msg.mentioned_users) AS mentioned (user_id)
    WHERE msg.mentioned_users <> '{{}}'
    AND NOT EXISTS (SELECT FROM user_account usr WHERE usr.id = mentioned.user_id)
    UNION ALL
    SELECT 'the stream is sent messages that exist',
        'transaction ' || notification_log.xid || ' notified of message ' || COALESCE(sent.message_id::text, 'NULL')
        || ', which does not exist'
    FROM notification_log
    CROSS JOIN LATERAL unnest(notification_log.message_ids) AS sent (message_id)
    WHERE NOT EXISTS (SELECT FROM message msg WHERE msg.id = sent.message_id)
"""

SEQUENCES_SQL = " UNION ALL ".join(
    f"""
    SELECT 'the next id is free', 'the next id in {name} is ' || next.id || ', and ' || taken.id || ' is in use'
    FROM (SELECT max(id) AS id FROM {name}) taken, (SELECT last_value + is_called::int AS id FROM {name}_id_seq) next
    WHERE next.id <= taken.id
    """
    for name in (table._meta.table_name for table in TABLES if "id" in table._meta.fields)
)
"""A sequence is read as it is, and the table as it was a moment before, so that alone puts no sequence behind."""
