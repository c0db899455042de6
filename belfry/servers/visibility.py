"""Who may know of a channel, and post in it.

- Members see their server's open channels, and the private ones that a role of theirs opens.
- Admins see every channel. (They are told only of those that their roles open, like everybody.)
- What one may not see does not exist: NotFound, the same as for an unknown id.
- Seeing does not need a subscription; posting, and being told, do.
"""

from dataclasses import dataclass

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.core.errors import Forbidden, NotFound, SubscriptionRequired
from belfry.identity.subscriptions import ACTIVE_SUBSCRIPTION_SQL
from config import settings
from models import User


def can_see_channel_sql(user_id: str, is_admin: str) -> str:
    """Whether channel `c` may be seen by the user whom two SQL expressions name.

    Each is looked up by the key, for the OFFSET: else PostgreSQL reads all members there are into a hash, as soon as it
    takes the channels or authors in question for many.
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
"""Of message `g` in channel `c` by author `a`: whether they still see the channel and may post in it.

A subscription that has ended since does not count: what was posted while it lasted is owed to the others. A test
message for one person is Belfry's own.
"""


@dataclass(frozen=True)
class VisibleChannel:
    """A channel, as somebody who may see it does. `moderates`: an admin, or in a moderating role."""

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
"""Who asks, as a query before another one, and no parameter of it: by an admin's `true` PostgreSQL would find a plan
that is good for nobody else, and plan the statement anew each time, which may take as long as all the rest."""

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
"""The row of a SeenChannel; none where `viewer` (VIEWER_CTE_SQL, or the like) may not know of the channel. For
`access_parameters`."""

CAN_POST_SQL = "((seen.posting = 'members' OR viewer.is_admin) AND seen.subscribed)"
"""Of a row of VISIBLE_CHANNEL_SQL as `seen`, and its `viewer`: whether `require_posting` raises nothing."""


def access_parameters(user: User, channel_id: int) -> Row:
    """What VISIBLE_CHANNEL_SQL and an `viewer` ask for."""
    return {**_parameters(user), "channel_id": channel_id}


def get_visible_channel(user: User, channel_id: int) -> VisibleChannel:
    """The channel. Raises NotFound where there is none that the user may know of."""
    found = fetch_one(f"WITH {VIEWER_CTE_SQL} {VISIBLE_CHANNEL_SQL}", access_parameters(user, channel_id))
    if found is None:
        raise NotFound(f"There is no channel {channel_id}.")
    return VisibleChannel(**found)


def require_posting(user: User, channel: VisibleChannel) -> None:
    """Raises Forbidden where the channel is for admins to post in, SubscriptionRequired without one."""
    if channel.posting == "admins" and not user.is_admin:
        raise Forbidden(f"Only admins post in #{channel.name}.")
    if not channel.subscribed:
        raise SubscriptionRequired("Posting needs an active subscription.")


def receives_notifications_in(user: User, channel_id: int) -> bool:
    """Whether the user is told of a channel as far as that is its server's to say: admins see more than that."""
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM channel chan WHERE chan.id = %(channel_id)s"
            f" AND {can_see_channel_sql('%(user_id)s', 'false')}",
            {"channel_id": channel_id, "user_id": user.id},
        )
    )


def nest_server(channel: Row) -> Row:
    """A channel's row in which {"id", "name"} as "server" stand for "server_id" and "server_name", which it loses."""
    server = {"id": channel.pop("server_id"), "name": channel.pop("server_name")}
    return {**channel, "server": server}


def visible_channels(user: User, *, after: int = 0, limit: int | None = None) -> list[Row]:
    """Channels that the user may see, by id, above id `after`: {"id", "name", "private", "posting", "server"}."""
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
    """Whether a message's author still may post where it stands. While not, nobody's inbox shows it."""
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM message msg JOIN channel chan ON chan.id = msg.channel_id JOIN user_account author"
            f" ON author.id = msg.author_id WHERE msg.id = %(message_id)s AND {AUTHOR_CAN_POST_SQL}",
            {"message_id": message_id},
        )
    )


def is_member(user_id: int, server_id: int) -> bool:
    """Whether somebody is in a server."""
    return bool(
        fetch_one(
            "SELECT 1 AS yes FROM member WHERE server_id = %(server_id)s AND user_id = %(user_id)s",
            {"server_id": server_id, "user_id": user_id},
        )
    )
