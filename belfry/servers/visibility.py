"""Who can see a channel and post in it: the only place where these rules are written.

- Members see the open channels of their server, and the private ones that one of their roles opens.
- Admins see every channel, but like all members are notified only of channels that their roles open.
- A channel that a user cannot see does not exist for them: NotFound, as for an unknown id.
- Seeing a channel does not need a subscription; posting and being notified do.
"""

from dataclasses import dataclass

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.core.errors import Forbidden, NotFound, SubscriptionRequired
from belfry.identity.subscriptions import ACTIVE_SUBSCRIPTION_SQL
from config import settings
from models import User


def can_see_channel_sql(user_id: str, is_admin: str) -> str:
    """Whether the user that two SQL expressions name can see channel `chan`.

    OFFSET 0 makes PostgreSQL look each row up by its key. Otherwise it reads all members into a hash as soon as it
    expects many channels or authors.
    """
    return f"""(
    {is_admin}
    OR (EXISTS (SELECT FROM member mem WHERE mem.server_id = chan.server_id AND mem.user_id = {user_id} OFFSET 0)
        AND (NOT chan.private OR EXISTS (
            SELECT FROM channel_role cr
            JOIN member_role mr ON mr.role_id = cr.role_id
            WHERE cr.channel_id = chan.id
            AND mr.user_id = {user_id}
            OFFSET 0)))
)"""


_VISIBLE_SQL = can_see_channel_sql("%(user_id)s", "%(is_admin)s")

AUTHOR_CAN_POST_SQL = f"""(
    msg.visible_to_user_id IS NOT NULL
    OR author.is_admin
    OR (chan.posting = 'members' AND {can_see_channel_sql("msg.author_id", "author.is_admin")})
)"""
"""Whether `author` can still see channel `chan` and post message `msg` in it.

A subscription that has ended since does not count: other members keep what was posted while it was active. A test
message for one user is Belfry's own.
"""


@dataclass(frozen=True)
class VisibleChannel:
    """A channel as a user sees it. `moderates`: the user is an admin or has a moderating role."""

    id: int
    name: str
    private: bool
    posting: str
    server_id: int
    server_name: str
    moderates: bool
    subscribed: bool


def _parameters(user: User) -> Row:
    return {"user_id": user.id, "is_admin": user.is_admin, "grace_days": settings.past_due_grace_days}


VIEWER_CTE_SQL = "viewer AS MATERIALIZED (SELECT %(user_id)s::bigint AS id, %(is_admin)s::boolean AS is_admin)"
"""The user who asks, as a CTE and not as a parameter. PostgreSQL finds a plan for an admin's `true` that no other user
can use, and would plan the statement again each time, which may take longer than executing it."""

VISIBLE_CHANNEL_SQL = f"""
    SELECT chan.id, chan.name, chan.private, chan.posting, chan.server_id, srv.name AS server_name,
        viewer.is_admin OR EXISTS (
            SELECT FROM member_role mr
            JOIN role ro ON ro.id = mr.role_id AND ro.moderator
            WHERE mr.server_id = chan.server_id
            AND mr.user_id = viewer.id
        ) AS moderates,
        viewer.is_admin OR EXISTS (
            SELECT FROM subscription sub
            WHERE sub.user_id = viewer.id
            AND {ACTIVE_SUBSCRIPTION_SQL}
        ) AS subscribed
    FROM viewer
    JOIN channel chan ON chan.id = %(channel_id)s
    JOIN server srv ON srv.id = chan.server_id
    WHERE {can_see_channel_sql("viewer.id", "viewer.is_admin")}
"""
"""The row of a VisibleChannel; none where `viewer` cannot see the channel. For `access_parameters`."""

CAN_POST_SQL = "((seen.posting = 'members' OR viewer.is_admin) AND seen.subscribed)"
"""Whether `viewer` may post in `seen`, a row of VISIBLE_CHANNEL_SQL: then `require_posting` raises nothing."""


def access_parameters(user: User, channel_id: int) -> Row:
    """The parameters of VISIBLE_CHANNEL_SQL and VIEWER_CTE_SQL."""
    return {**_parameters(user), "channel_id": channel_id}


def get_visible_channel(user: User, channel_id: int) -> VisibleChannel:
    """Find a channel that the user can see. Raises NotFound."""
    found = fetch_one(f"WITH {VIEWER_CTE_SQL} {VISIBLE_CHANNEL_SQL}", access_parameters(user, channel_id))
    if found is None:
        raise NotFound(f"There is no channel {channel_id}.")
    return VisibleChannel(**found)


def require_posting(user: User, channel: VisibleChannel) -> None:
    """Raises Forbidden where only admins may post, SubscriptionRequired without an active subscription."""
    if channel.posting == "admins" and not user.is_admin:
        raise Forbidden(f"Only admins can post in #{channel.name}.")
    if not channel.subscribed:
        raise SubscriptionRequired("Posting needs an active subscription.")


def receives_notifications_in(user: User, channel_id: int) -> bool:
    """Whether the user's membership and roles let them be notified of a channel; admins see more channels than that."""
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM channel chan WHERE chan.id = %(channel_id)s"
            f" AND {can_see_channel_sql('%(user_id)s', 'false')}",
            {"channel_id": channel_id, "user_id": user.id},
        )
    )


def nest_server(channel: Row) -> Row:
    """A channel's row with {"id", "name"} as "server" in place of "server_id" and "server_name"."""
    server = {"id": channel.pop("server_id"), "name": channel.pop("server_name")}
    return {**channel, "server": server}


def visible_channels(user: User, *, after: int = 0, limit: int | None = None) -> list[Row]:
    """List channels that the user can see, by id, above id `after`: {"id", "name", "private", "posting", "server"}."""
    return [
        nest_server(channel)
        for channel in fetch_all(
            f"""
            SELECT chan.id, chan.name, chan.private, chan.posting, chan.server_id, srv.name AS server_name
            FROM channel chan
            JOIN server srv ON srv.id = chan.server_id
            WHERE chan.id > %(after)s
            AND (%(is_admin)s OR chan.server_id = ANY(ARRAY(  -- else each channel of all servers is asked
                SELECT mem.server_id FROM member mem WHERE mem.user_id = %(user_id)s)))
            AND {_VISIBLE_SQL}
            ORDER BY chan.id
            LIMIT %(limit)s
            """,
            {**_parameters(user), "after": after, "limit": limit},
        )
    ]


def author_can_post(message_id: int) -> bool:
    """Whether the author of a message may still post in its channel. Otherwise no inbox shows the message."""
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM message msg JOIN channel chan ON chan.id = msg.channel_id JOIN user_account author"
            f" ON author.id = msg.author_id WHERE msg.id = %(message_id)s AND {AUTHOR_CAN_POST_SQL}",
            {"message_id": message_id},
        )
    )


def is_member(user_id: int, server_id: int) -> bool:
    """Whether a user is a member of a server."""
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM member WHERE server_id = %(server_id)s AND user_id = %(user_id)s",
            {"server_id": server_id, "user_id": user_id},
        )
    )
