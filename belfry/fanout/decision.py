"""Who is told, and why: the one place where the rules live.

The fan-out inserts where the decision is a telling one, the statistics are its GROUP BY, and `explain` is it
for one person. The tests hold it against an oracle in plain Python on random communities.
"""

from dataclasses import dataclass
from typing import Any

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.identity.subscriptions import ACTIVE_SUBSCRIPTION_SQL
from config import settings
from models import LARGEST_ID, REASONS

NOTIFY_DECISIONS = REASONS
DECISIONS = {
    "author": "They wrote the message, and nobody is told of their own.",
    "no_channel_access": "The channel is private, and none of their roles opens it.",
    "no_subscription": "They are not an admin, and have no subscription that is active.",
    "preference_none": "They have switched this channel off. Nothing gets through, a mention neither.",
    "mention": "They were mentioned by name. That passes a mute and the wish for mentions only.",
    "mention_role": "A role of theirs was mentioned. That passes the wish for mentions only, but no mute.",
    "mention_everyone": "Everyone was mentioned. That passes the wish for mentions only, but no mute.",
    "muted": "They have muted this channel until a time still to come, and were not mentioned by name.",
    "preference_mentions": "They want mentions only in this channel, and were not mentioned.",
    "message": "They can see the channel, are an admin or subscribed, and have not asked for less.",
}


_USER_ID_RANGE_SQL = "AND {column} > %(after)s AND {column} <= %(up_to)s"
"""Of one slice. It stands at each table: PostgreSQL carries an equality over a join, but no inequality, and would read
everybody's accounts, subscriptions and roles for every slice."""


def _has_role_sql(who: str, server_of: str, roles: str, within: str) -> str:
    """Whether a member has one of the roles in an array, which are of the server of a channel or message."""
    return f"""EXISTS (
            SELECT FROM member_role r
            WHERE r.server_id = {server_of}.server_id
            AND r.user_id = {who}.user_id
            AND r.role_id = ANY({roles})
            {within.format(column="r.user_id")})"""


def _audience_sql(channels: str, within: str) -> str:
    """What the rules need to know of each member of the channels' servers, whatever the message."""
    return f"""
    SELECT c.channel_id, m.user_id, u.is_admin,
        {ACTIVE_SUBSCRIPTION_SQL} AS subscribed,
        NOT c.private OR {_has_role_sql("m", "c", "c.opening_roles", within)} AS sees_channel,
        p.level,
        p.muted_until > now() AS muted
    FROM ({channels}) c
    JOIN member m ON m.server_id = c.server_id {within.format(column="m.user_id")}
    JOIN user_account u ON u.id = m.user_id {within.format(column="u.id")}
    LEFT JOIN subscription s ON s.user_id = m.user_id {within.format(column="s.user_id")}
    LEFT JOIN preference p ON p.channel_id = c.channel_id AND p.user_id = m.user_id
        {within.format(column="p.user_id")}
"""


def _decision_sql(within: str) -> str:
    """Exactly one reason for each member `a` of the server, of message `g`. Contract, section 4, in its order but for
    one step:

    `muted` stands before the two group mentions, because neither passes a mute; whoever is muted and not
    named personally ends at `muted` in either order, and so the question is asked once.
    """
    return f"""CASE
    WHEN a.user_id = g.author_id
        THEN 'author'
    WHEN NOT a.sees_channel
        THEN 'no_channel_access'
    WHEN NOT a.is_admin AND a.subscribed IS NOT TRUE
        THEN 'no_subscription'
    WHEN a.level = 'none'
        THEN 'preference_none'
    WHEN a.user_id = ANY(g.mentioned_users)
        THEN 'mention'
    WHEN a.muted
        THEN 'muted'
    WHEN g.mentioned_roles <> '{{}}' AND {_has_role_sql("a", "g", "g.mentioned_roles", within)}
        THEN 'mention_role'
    WHEN g.mentions_everyone
        THEN 'mention_everyone'
    WHEN a.level = 'mentions'
        THEN 'preference_mentions'
    ELSE 'message'
END"""


_ONE_MESSAGE_SQL = """
        SELECT %(message_id)s::bigint AS message_id, %(server_id)s::bigint AS server_id,
            %(channel_id)s::bigint AS channel_id, %(author_id)s::bigint AS author_id,
            %(private)s::boolean AS private, %(opening_roles)s::bigint[] AS opening_roles,
            %(mentioned_users)s::bigint[] AS mentioned_users, %(mentioned_roles)s::bigint[] AS mentioned_roles,
            %(mentions_everyone)s::boolean AS mentions_everyone, %(only_for)s::bigint AS only_for
"""

_BATCH_MESSAGES_SQL = """
    SELECT g.id AS message_id, c.server_id, c.id AS channel_id, g.author_id, c.private,
        ARRAY(SELECT o.role_id FROM channel_role o WHERE o.channel_id = c.id ORDER BY 1) AS opening_roles,
        g.mentioned_users, g.mentioned_roles, g.mentions_everyone,
        g.only_for_id AS only_for, g.deleted_at IS NOT NULL AS deleted
    FROM message g
    JOIN channel c ON c.id = g.channel_id
    WHERE g.id = {which}
"""

DECISIONS_SQL = f"""
    SELECT a.user_id, {_decision_sql(_USER_ID_RANGE_SQL)} AS decision
    FROM ({_ONE_MESSAGE_SQL}) g
    CROSS JOIN ({_audience_sql(_ONE_MESSAGE_SQL, _USER_ID_RANGE_SQL)}) a
    WHERE a.user_id <> ALL(%(but)s::bigint[])
    AND (%(among)s::bigint[] IS NULL OR a.user_id = ANY(%(among)s::bigint[]))
    AND (g.only_for IS NULL OR a.user_id = g.only_for)
"""
"""(user_id, decision) of the members in a range of ids, for `Subject.parameters`."""

_MEMBER_SQL = ("user_id", "is_admin", "subscribed", "sees_channel", "level", "muted")  # the columns of `_audience_sql`

BATCH_DECISIONS_SQL = f"""
    WITH subject AS MATERIALIZED (
        {_BATCH_MESSAGES_SQL.format(which="ANY(%(message_ids)s::bigint[]) AND g.deleted_at IS NULL")}
    ),
    audience AS MATERIALIZED (
        SELECT channel_id, {", ".join(f"array_agg({name}) AS {name}" for name in _MEMBER_SQL)}
        FROM ({_audience_sql("SELECT DISTINCT channel_id, server_id, private, opening_roles FROM subject", "")}) members
        GROUP BY channel_id
    )
    SELECT g.message_id, a.user_id, {_decision_sql("")} AS decision
    FROM subject g
    JOIN audience b ON b.channel_id = g.channel_id
    CROSS JOIN LATERAL unnest({", ".join(f"b.{name}" for name in _MEMBER_SQL)}) AS a ({", ".join(_MEMBER_SQL)})
    WHERE g.only_for IS NULL OR a.user_id = g.only_for
"""
"""(message_id, user_id, decision) of all who are in the audience of messages that are not deleted, for
{"message_ids", "grace_days"}.

The members of a channel are looked up once, however many messages there are; and as arrays, so that no estimate of
how many they are can make the planner go over all of them for each message.
"""


@dataclass(frozen=True)
class FanoutMessage:
    """What the rules need to know of one message, as it stands now."""

    message_id: int
    server_id: int
    channel_id: int
    author_id: int
    private: bool
    opening_roles: list[int]
    mentioned_users: list[int]
    mentioned_roles: list[int]
    mentions_everyone: bool
    only_for: int | None
    deleted: bool

    def parameters(
        self, after: int = 0, up_to: int = LARGEST_ID, *, among: str | None = None, but: str = "{}"
    ) -> dict[str, Any]:
        """The parameters of DECISIONS_SQL for the members with `after < user_id <= up_to`.

        Of those, only the ones that are `among` (None: all), and not the ones in `but`: both as `mentioned_members`
        gives them.
        """
        return {
            **vars(self),
            "after": after,
            "up_to": up_to,
            "among": among,
            "but": but,
            "grace_days": settings.past_due_grace_days,
        }


def load_fanout_message(message_id: int) -> FanoutMessage | None:
    """The message as the rules see it; None when there is none."""
    found = fetch_one(_BATCH_MESSAGES_SQL.format(which="%(message_id)s"), {"message_id": message_id})
    return FanoutMessage(**found) if found else None


def decision_for(subject: FanoutMessage, user_id: int) -> str | None:
    """The decision that the rules make of one person now; None where they are not in its audience:
    no member of the server, or of a test message that is for somebody else."""
    found = fetch_one(DECISIONS_SQL, subject.parameters(user_id - 1, user_id))
    return found["decision"] if found else None


def next_slice_bounds(subject: FanoutMessage, after: int, members: int) -> Row:
    """How far so many members reach: {"after": below the first user id, "up_to": the last, both None where there is
    none, "members": how many}."""
    found = fetch_one(
        "SELECT min(user_id) - 1 AS after, max(user_id) AS up_to, count(*) AS members FROM ("
        " SELECT m.user_id FROM member m"
        " WHERE m.server_id = %(server_id)s"
        " AND m.user_id > %(after)s"
        " AND (%(only_for)s::bigint IS NULL OR m.user_id = %(only_for)s)"
        " ORDER BY m.user_id"
        " LIMIT %(members)s) ahead",
        {"server_id": subject.server_id, "only_for": subject.only_for, "after": after, "members": members},
    )
    assert found is not None  # an aggregate always has a row
    return found


def member_range(subject: FanoutMessage, after: int, up_to: int) -> tuple[int, int]:
    """The part of a range of ids in which the server has members: (after, up_to); empty where it has none.

    The first and the last slice are open, and whoever is beside them in other servers would be read: a slice of 20,000
    beside a server of 1,000,000 took four times as long.
    """
    found = fetch_one(
        "SELECT min(user_id) - 1 AS after, max(user_id) AS up_to FROM member"
        " WHERE server_id = %(server_id)s AND user_id > %(after)s AND user_id <= %(up_to)s",
        {"server_id": subject.server_id, "after": after, "up_to": up_to},
    )
    return (found["after"], found["up_to"]) if found and found["up_to"] is not None else (after, after)


def mentioned_members(subject: FanoutMessage, limit: int) -> Row:
    """Members who are mentioned by name or by a role: {"user_ids", "after", "up_to"}.

    The ids are PostgreSQL's own text of an array, `{1,2}`: as numbers of Python they would take a hundred times
    the memory. Those who are mentioned by name come before the rest where they are more than `limit`. `after` and
    `up_to` are the range that they lie in; None where there are none.
    """
    found = fetch_one(
        """
        SELECT array_agg(user_id ORDER BY user_id)::text AS user_ids,
            min(user_id) - 1 AS after,
            max(user_id) AS up_to
        FROM (
            SELECT user_id
            FROM (
                SELECT m.user_id, 0 AS rank
                FROM member m
                WHERE m.server_id = %(server_id)s
                AND m.user_id = ANY(%(mentioned_users)s::bigint[])
                UNION ALL
                (SELECT r.user_id, 1
                FROM member_role r
                WHERE r.role_id = ANY(%(mentioned_roles)s::bigint[])
                ORDER BY r.user_id
                LIMIT %(limit)s)
            ) mentioned
            GROUP BY user_id
            ORDER BY min(rank), user_id
            LIMIT %(limit)s
        ) first
        """,
        {**vars(subject), "limit": limit},
    )
    assert found is not None
    return found


def preview_replay(subject: FanoutMessage, after: int, up_to: int) -> list[Row]:
    """What a replay of one range would find: rows of {"decision", "told", "members"}.

    `told` says whether a notification exists already. Nothing is written.
    """
    return fetch_all(
        f"WITH decided AS MATERIALIZED ({DECISIONS_SQL})"
        " SELECT d.decision, n.user_id IS NOT NULL AS told, count(*) AS members"
        " FROM decided d"
        " LEFT JOIN notification n ON n.user_id = d.user_id AND n.message_id = %(message_id)s"
        " GROUP BY 1, 2"
        " ORDER BY 1, 2",
        subject.parameters(after, up_to),
    )
