"""`verify`: whether what is stored agrees with itself, and with the rules.

What the rules said at the time cannot be asked again once the community has changed (`runs replay --dry-run` says
what they say now). But whatever happens between, these hold, and one lost or doubled notification breaks one.
"""

from belfry.partitions import kept_from
from belfry.recipients import DECISIONS, TELLING
from belfry.sql import rows
from config import settings

AT_MOST = 100  # findings of one kind; a damaged database has enough with them
OVERDUE_SECONDS = 60  # twice what recovery may take, after the longest that a job may run

_NOTIFIED = " + ".join(f"COALESCE((r.decisions ->> '{reason}')::int, 0)" for reason in TELLING)
_DECIDED = "(SELECT COALESCE(sum(value::int), 0) FROM jsonb_each_text(r.decisions))"
_KNOWN = ", ".join(f"'{decision}'" for decision in DECISIONS)

CHECKS = {
    "every message has its run": """
        SELECT 'message ' || g.id || ' has no run: nobody was told' AS finding
        FROM message g
        WHERE NOT EXISTS (SELECT FROM run r WHERE r.message_id = g.id AND r.kind IN ('message', 'test'))
    """,
    "no run has failed": """
        SELECT 'run ' || r.id || ' failed: ' || r.error
        FROM run r
        WHERE r.state = 'failed'
    """,
    "somebody takes care of what was begun": f"""
        SELECT 'run ' || part.run_id || ' was begun, and nobody has taken care of it since ' || part.due_at
        FROM (
            SELECT id AS run_id, due_at FROM run WHERE state = 'running'
            UNION ALL
            SELECT run_id, due_at FROM slice WHERE attempts > 0
        ) part
        WHERE part.due_at < now() - interval '{OVERDUE_SECONDS + settings.job_timeout} seconds'
    """,
    "every member is counted under one decision": f"""
        SELECT 'run ' || r.id || ' has gone over ' || r.done || ' members, and counts ' || {_DECIDED} || ' decisions'
        FROM run r
        WHERE {_DECIDED} <> r.done
        OR EXISTS (SELECT FROM jsonb_object_keys(r.decisions) AS decision WHERE decision NOT IN ({_KNOWN}))
    """,
    "what is finished is done": """
        SELECT 'run ' || r.id || ' succeeded with ' || r.done || ' of ' || COALESCE(r.total::text, '?')
            || ' members done, and ' || r.slices_left || ' slices left'
        FROM run r
        WHERE r.state = 'succeeded'
        AND (r.total IS DISTINCT FROM r.done OR r.slices_left <> 0 OR r.due_at IS NOT NULL)
    """,
    "a run has the slices that it counts": """
        SELECT 'run ' || r.id || ' counts ' || r.slices_left || ' slices left, and has ' || count(s.run_id)
        FROM run r
        LEFT JOIN slice s ON s.run_id = r.id
        GROUP BY r.id
        HAVING r.slices_left <> count(s.run_id)
    """,
    "no two slices share a member": """
        SELECT 'run ' || run_id || ': the slices after ' || after || ' and ' || next || ' overlap'
        FROM (SELECT run_id, after, up_to, lead(after) OVER (PARTITION BY run_id ORDER BY after) AS next FROM slice) s
        WHERE next < up_to
    """,
    "nobody is added who was not to be told": f"""
        SELECT 'run ' || r.id || ' added ' || r.added || ' notifications for ' || ({_NOTIFIED}) || ' to be told'
        FROM run r
        WHERE r.added > {_NOTIFIED}
    """,
    "whoever was to be told of a message was told": f"""
        SELECT 'run ' || r.id || ' added ' || r.added || ' notifications for ' || ({_NOTIFIED}) || ' to be told'
        FROM run r
        WHERE r.state = 'succeeded'
        AND r.kind IN ('message', 'test')
        AND r.added < {_NOTIFIED}
        AND NOT EXISTS (SELECT FROM run other WHERE other.message_id = r.message_id AND other.id <> r.id)
    """,
    "there are the notifications that the runs made": """
        SELECT 'message ' || message_id || ' has ' || COALESCE(there, 0) || ' notifications, and its runs made '
            || COALESCE(made, 0)
        FROM (SELECT message_id, count(*) AS there FROM notification GROUP BY 1) n
        FULL JOIN (SELECT message_id, sum(added - withdrawn) AS made FROM run GROUP BY 1) r USING (message_id)
        WHERE COALESCE(there, 0) <> COALESCE(made, 0)
        AND message_id >= %(kept_from)s
    """,
    "a notification is of somebody, and of something that was written": """
        SELECT 'notification ' || n.user_id || '-' || n.message_id || ' is of nobody, or of no message, or older'
        FROM notification n
        LEFT JOIN message g ON g.id = n.message_id
        LEFT JOIN user_account u ON u.id = n.user_id
        WHERE g.id IS NULL OR u.id IS NULL OR n.created_at < g.created_at
    """,
    "nobody is told of their own message, or of one for somebody else": """
        SELECT 'notification ' || n.user_id || '-' || n.message_id || ' is not for them'
        FROM notification n
        JOIN message g ON g.id = n.message_id
        WHERE n.user_id = g.author_id OR n.user_id <> g.only_for_id
    """,
    "who has an unread mention is mentioned": """
        SELECT 'notification ' || n.user_id || '-' || n.message_id || ' is unread for ' || n.reason
            || ', which the message has no more'
        FROM notification n
        JOIN message g ON g.id = n.message_id
        WHERE n.read_at IS NULL
        AND n.dismissed_at IS NULL
        AND g.deleted_at IS NULL
        AND CASE n.reason
            WHEN 'mention' THEN n.user_id <> ALL(g.mentioned_users)
            WHEN 'mention_role' THEN cardinality(g.mentioned_roles) = 0
            WHEN 'mention_everyone' THEN NOT g.mentions_everyone
            ELSE false END
        AND NOT EXISTS (SELECT FROM run r WHERE r.message_id = g.id AND r.state <> 'succeeded')
    """,
}
"""{what holds: what is found where it does not}. Each is one query, in one snapshot of its own."""


def verify() -> list[str]:
    """What is off, a sentence each, at most AT_MOST of one kind; [] when all is as it should be."""
    kept = {"kept_from": kept_from()}
    found = (rows(f"SELECT finding FROM ({check}) AS f(finding) LIMIT {AT_MOST}", kept) for check in CHECKS.values())
    return [one["finding"] for findings in found for one in findings]
