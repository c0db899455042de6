"""Decide who is notified of a message, and why: the only place where these rules are written.

The fan-out inserts a notification where the decision is one of NOTIFY_DECISIONS. The statistics are a GROUP BY of the
decision, and `explain` evaluates it for one user. Tests compare it with an oracle in plain Python on random servers.
"""

from dataclasses import dataclass
from typing import Any

from belfry.core.db import LARGEST_ID, Row, fetch_all, fetch_one
from belfry.identity.subscriptions import ACTIVE_SUBSCRIPTION_SQL
from config import settings
from models import REASONS

NOTIFY_DECISIONS = REASONS
DECISIONS = {
    "author": "They wrote the message. Authors are not notified.",
    "no_channel_access": "The channel is private, and none of their roles opens it.",
    "no_subscription": "They are not an admin and have no active subscription.",
    "channel_off": "They switched this channel off. Mentions do not get through either.",
    "mention": "They were mentioned by name. This passes a mute and the preference for mentions only.",
    "mention_role": "One of their roles was mentioned. This passes the preference for mentions only, but not a mute.",
    "mention_everyone": "Everyone was mentioned. This passes the preference for mentions only, but not a mute.",
    "muted": "They muted this channel until a time in the future, and were not mentioned by name.",
    "mentions_only": "They want only mentions in this channel, and were not mentioned.",
    "message": "They can see the channel, are an admin or a subscriber, and want all messages.",
}


_USER_ID_RANGE_SQL = "AND {column} > %(after_user_id)s AND {column} <= %(to_user_id)s"
"""The members of one slice. It is repeated for each table: PostgreSQL carries an equality over a join, but not an
inequality, and would read all users, subscriptions and roles for each slice."""


def _has_role_sql(member: str, server_of: str, roles: str, within: str) -> str:
    """Whether a member has one of the roles in an array; the roles belong to the server of a channel or message."""
    return f"""EXISTS (
            SELECT FROM member_role
            WHERE member_role.server_id = {server_of}.server_id
            AND member_role.user_id = {member}.user_id
            AND member_role.role_id = ANY({roles})
            {within.format(column="member_role.user_id")})"""


def _audience_sql(channels: str, within: str) -> str:
    """What the rules read of each member of the channels' servers, whatever the message is."""
    return f"""
    SELECT chan.channel_id, member.user_id, usr.is_admin,
        {ACTIVE_SUBSCRIPTION_SQL} AS subscribed,
        NOT chan.private OR {_has_role_sql("member", "chan", "chan.opening_roles", within)} AS sees_channel,
        pref.level,
        pref.muted_until > now() AS muted
    FROM ({channels}) chan
    JOIN member ON member.server_id = chan.server_id {within.format(column="member.user_id")}
    JOIN user_account usr ON usr.id = member.user_id {within.format(column="usr.id")}
    LEFT JOIN subscription sub ON sub.user_id = member.user_id {within.format(column="sub.user_id")}
    LEFT JOIN preference pref ON pref.channel_id = chan.channel_id AND pref.user_id = member.user_id
        {within.format(column="pref.user_id")}
"""


def _decision_sql(within: str) -> str:
    """The decision for member `aud` of the audience and message `msg`: the first rule that applies.

    The order is that of docs/reference/decisions.md, except that `muted` is before the two group mentions: neither
    passes a mute, so a muted member who is not mentioned by name ends at `muted` in either order, and the rule is
    evaluated once.
    """
    return f"""CASE
    WHEN aud.user_id = msg.author_id
        THEN 'author'
    WHEN NOT aud.sees_channel
        THEN 'no_channel_access'
    WHEN NOT aud.is_admin AND aud.subscribed IS NOT TRUE
        THEN 'no_subscription'
    WHEN aud.level = 'none'
        THEN 'channel_off'
    WHEN aud.user_id = ANY(msg.mentioned_users)
        THEN 'mention'
    WHEN aud.muted
        THEN 'muted'
    WHEN msg.mentioned_roles <> '{{}}' AND {_has_role_sql("aud", "msg", "msg.mentioned_roles", within)}
        THEN 'mention_role'
    WHEN msg.mentions_everyone
        THEN 'mention_everyone'
    WHEN aud.level = 'mentions'
        THEN 'mentions_only'
    ELSE 'message'
END"""


_ONE_MESSAGE_SQL = """
        SELECT %(message_id)s::bigint AS message_id, %(server_id)s::bigint AS server_id,
            %(channel_id)s::bigint AS channel_id, %(author_id)s::bigint AS author_id,
            %(private)s::boolean AS private, %(opening_roles)s::bigint[] AS opening_roles,
            %(mentioned_users)s::bigint[] AS mentioned_users, %(mentioned_roles)s::bigint[] AS mentioned_roles,
            %(mentions_everyone)s::boolean AS mentions_everyone, %(visible_to_user_id)s::bigint AS visible_to_user_id
"""

_STORED_MESSAGES_SQL = """
    SELECT msg.id AS message_id, chan.server_id, chan.id AS channel_id, msg.author_id, chan.private,
        ARRAY(SELECT role_id FROM channel_role WHERE channel_id = chan.id ORDER BY 1) AS opening_roles,
        msg.mentioned_users, msg.mentioned_roles, msg.mentions_everyone,
        msg.visible_to_user_id, msg.deleted_at IS NOT NULL AS deleted
    FROM message msg
    JOIN channel chan ON chan.id = msg.channel_id
    WHERE msg.id = {which}
"""

DECISIONS_SQL = f"""
    SELECT aud.user_id, {_decision_sql(_USER_ID_RANGE_SQL)} AS decision
    FROM ({_ONE_MESSAGE_SQL}) msg
    CROSS JOIN ({_audience_sql(_ONE_MESSAGE_SQL, _USER_ID_RANGE_SQL)}) aud
    WHERE aud.user_id <> ALL(%(except_user_ids)s::bigint[])
    AND (%(only_user_ids)s::bigint[] IS NULL OR aud.user_id = ANY(%(only_user_ids)s::bigint[]))
    AND (msg.visible_to_user_id IS NULL OR aud.user_id = msg.visible_to_user_id)
"""
"""(user_id, decision) of the members in a range of user ids, for `FanoutMessage.parameters`."""

_MEMBER_SQL = ("user_id", "is_admin", "subscribed", "sees_channel", "level", "muted")  # the columns of `_audience_sql`

BATCH_DECISIONS_SQL = f"""
    WITH batch_message AS MATERIALIZED (
        {_STORED_MESSAGES_SQL.format(which="ANY(%(message_ids)s::bigint[]) AND msg.deleted_at IS NULL")}
    ),
    audience AS MATERIALIZED (
        SELECT channel_id, {", ".join(f"array_agg({name}) AS {name}" for name in _MEMBER_SQL)}
        FROM (
            {_audience_sql("SELECT DISTINCT channel_id, server_id, private, opening_roles FROM batch_message", "")}
        ) members
        GROUP BY channel_id
    )
    SELECT msg.message_id, aud.user_id, {_decision_sql("")} AS decision
    FROM batch_message msg
    JOIN audience ON audience.channel_id = msg.channel_id
    CROSS JOIN LATERAL unnest({", ".join(f"audience.{name}" for name in _MEMBER_SQL)})
        AS aud ({", ".join(_MEMBER_SQL)})
    WHERE msg.visible_to_user_id IS NULL OR aud.user_id = msg.visible_to_user_id
"""
"""(message_id, user_id, decision) of the audiences of messages that are not deleted, for {"message_ids", "grace_days"}.

The members of a channel are read once, however many messages it has. They are kept as arrays, so that no estimate of
their number makes the planner read all of them again for each message.
"""


@dataclass(frozen=True)
class FanoutMessage:
    """What the rules read of one message, as it is stored now."""

    message_id: int
    server_id: int
    channel_id: int
    author_id: int
    private: bool
    opening_roles: list[int]
    mentioned_users: list[int]
    mentioned_roles: list[int]
    mentions_everyone: bool
    visible_to_user_id: int | None
    deleted: bool

    def parameters(
        self,
        after_user_id: int = 0,
        to_user_id: int = LARGEST_ID,
        *,
        only_user_ids: str | None = None,
        except_user_ids: str = "{}",
    ) -> dict[str, Any]:
        """The parameters of DECISIONS_SQL for the members with `after_user_id < user_id <= to_user_id`.

        `only_user_ids` (None: all) and `except_user_ids` narrow the range further. Both are PostgreSQL's text of an
        array, as `mentioned_members` returns it.
        """
        return {
            **vars(self),
            "after_user_id": after_user_id,
            "to_user_id": to_user_id,
            "only_user_ids": only_user_ids,
            "except_user_ids": except_user_ids,
            "grace_days": settings.past_due_grace_days,
        }


def load_fanout_message(message_id: int) -> FanoutMessage | None:
    """Load what the rules read of a message; None where there is no such message."""
    found = fetch_one(_STORED_MESSAGES_SQL.format(which="%(message_id)s"), {"message_id": message_id})
    return FanoutMessage(**found) if found else None


def decision_for(message: FanoutMessage, user_id: int) -> str | None:
    """The decision for one user by the rules of now.

    None where the user is not in the audience: not a member of the server, or the message is a test message for
    another user.
    """
    found = fetch_one(DECISIONS_SQL, message.parameters(user_id - 1, user_id))
    return found["decision"] if found else None


def next_slice_bounds(message: FanoutMessage, after_user_id: int, members: int) -> Row:
    """The range of the next `members` members: {"after_user_id", "to_user_id", "members"}.

    `members` is how many there are in it. Where it is 0, both ids are None.
    """
    found = fetch_one(
        "SELECT min(user_id) - 1 AS after_user_id, max(user_id) AS to_user_id, count(*) AS members FROM ("
        " SELECT user_id FROM member"
        " WHERE server_id = %(server_id)s"
        " AND user_id > %(after_user_id)s"
        " AND (%(visible_to_user_id)s::bigint IS NULL OR user_id = %(visible_to_user_id)s)"
        " ORDER BY user_id"
        " LIMIT %(members)s) next_members",
        {**vars(message), "after_user_id": after_user_id, "members": members},
    )
    assert found is not None  # an aggregate always has a row
    return found


def member_range(message: FanoutMessage, after_user_id: int, to_user_id: int) -> tuple[int, int]:
    """Narrow a range of user ids to its first and last member: (after_user_id, to_user_id), empty without members.

    The first and the last slice have no outer bound, and would read the users of other servers: a slice of 20,000
    beside a server of 1,000,000 took four times as long.
    """
    found = fetch_one(
        "SELECT min(user_id) - 1 AS after_user_id, max(user_id) AS to_user_id FROM member"
        " WHERE server_id = %(server_id)s AND user_id > %(after_user_id)s AND user_id <= %(to_user_id)s",
        {"server_id": message.server_id, "after_user_id": after_user_id, "to_user_id": to_user_id},
    )
    if found is None or found["to_user_id"] is None:
        return after_user_id, after_user_id
    return found["after_user_id"], found["to_user_id"]


def mentioned_members(message: FanoutMessage, limit: int) -> Row:
    """Members who are mentioned by name or by a role: {"user_ids", "after_user_id", "to_user_id"}; None where none is.

    `user_ids` is PostgreSQL's text of an array, `{1,2}`: as Python's numbers the ids take a hundred times the memory.
    Where they are more than `limit`, those who are mentioned by name come first.
    """
    found = fetch_one(
        """
        SELECT array_agg(user_id ORDER BY user_id)::text AS user_ids,
            min(user_id) - 1 AS after_user_id,
            max(user_id) AS to_user_id
        FROM (
            SELECT user_id
            FROM (
                SELECT user_id, 0 AS rank
                FROM member
                WHERE server_id = %(server_id)s
                AND user_id = ANY(%(mentioned_users)s::bigint[])
                UNION ALL
                (SELECT user_id, 1
                FROM member_role
                WHERE role_id = ANY(%(mentioned_roles)s::bigint[])
                ORDER BY user_id
                LIMIT %(limit)s)
            ) mentioned
            GROUP BY user_id
            ORDER BY min(rank), user_id
            LIMIT %(limit)s
        ) first
        """,
        {**vars(message), "limit": limit},
    )
    assert found is not None  # an aggregate always has a row
    return found


def preview_replay(message: FanoutMessage, after_user_id: int, to_user_id: int) -> list[Row]:
    """What a replay would find in a range of user ids: rows of {"decision", "notified", "members"}.

    `notified` says whether the notification exists already. Nothing is written.
    """
    return fetch_all(
        f"WITH decided AS MATERIALIZED ({DECISIONS_SQL})"
        " SELECT decided.decision, note.user_id IS NOT NULL AS notified, count(*) AS members"
        " FROM decided"
        " LEFT JOIN notification note ON note.user_id = decided.user_id AND note.message_id = %(message_id)s"
        " GROUP BY 1, 2"
        " ORDER BY 1, 2",
        message.parameters(after_user_id, to_user_id),
    )
