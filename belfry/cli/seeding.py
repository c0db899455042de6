"""Sample data: members with every kind of subscription, role and preference.

The same numbers give the same data, so that figures can be compared. Of 100 members 78 are active or trialing, 4 are
past due (half of them within the grace period), and 18 have ended or have no subscription. Every tenth has the role
`vip`, every thousandth is a moderator, and every eighth restricts the first channel.
"""

from collections.abc import Callable, Iterator
from typing import Any

from belfry.core.db import db, execute, fetch_all, fetch_one
from models import Channel, ChannelRole, Role, Server

BATCH = 5_000

_MEMBERS = """
    WITH numbered AS (
        SELECT ordinal, %(offset)s + ordinal AS number
        FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS ordinal
    ),
    people AS (
        INSERT INTO user_account (username, name, email)
        SELECT 'member-' || number, 'Member ' || number, 'member-' || number || '@example.com' FROM numbered
        ORDER BY ordinal
        RETURNING id, username
    ),
    joined AS (
        SELECT people.id, numbered.ordinal
        FROM people
        JOIN numbered ON people.username = 'member-' || numbered.number
    ),
    subscribed AS (
        INSERT INTO subscription (user_id, status, current_period_end)
        SELECT id,
            CASE WHEN ordinal %% 100 < 73 THEN 'active' WHEN ordinal %% 100 < 78 THEN 'trialing'
                 WHEN ordinal %% 100 < 82 THEN 'past_due' ELSE 'canceled' END,
            CASE WHEN ordinal %% 100 < 70 THEN now() + interval '20 days'
                 WHEN ordinal %% 100 < 73 THEN NULL
                 WHEN ordinal %% 100 < 78 THEN now() + interval '5 days'
                 WHEN ordinal %% 100 < 80 THEN now() - interval '3 days'
                 WHEN ordinal %% 100 < 82 THEN now() - interval '30 days'
                 ELSE now() - interval '60 days' END
        FROM joined
        WHERE ordinal %% 100 < 92
    ),
    entered AS (
        INSERT INTO member (server_id, user_id) SELECT %(server_id)s, id FROM joined
    ),
    preferring AS (
        INSERT INTO preference (channel_id, user_id, level, muted_until)
        SELECT %(channel_id)s, id,
            CASE ordinal %% 32 WHEN 0 THEN 'none' WHEN 8 THEN 'mentions' WHEN 16 THEN 'mentions' ELSE 'all' END,
            CASE WHEN ordinal %% 32 IN (16, 24) THEN now() + interval '1 day' END
        FROM joined
        WHERE ordinal %% 8 = 0
    )
    SELECT id, ordinal FROM joined
"""


def seed(members: int, channels: int, on_progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Create a server with members `member-1`, `member-2`, …, and every admin.

    Channels: `general`; `announcements`, where only admins post; `vip`, private; then `channel-4` and so on.
    `on_progress` is called with the number of members just created. Returns {"server_id", "channel_ids", "members",
    "usernames": up to five}.
    """
    with db.atomic():
        server = Server.create(name="Golden Signals")
        vip = Role.create(server=server, name="vip")
        moderators = Role.create(server=server, name="moderators", moderator=True)
        channel_ids = [_channel(server.id, number, vip.id) for number in range(1, channels + 1)]
        offset = _highest_number()
        for first, last in _batches(members):
            created = fetch_all(
                _MEMBERS,
                {"first": first, "last": last, "offset": offset, "server_id": server.id, "channel_id": channel_ids[0]},
            )
            _give_role(server.id, vip.id, [user["id"] for user in created if user["ordinal"] % 10 == 0])
            _give_role(server.id, moderators.id, [user["id"] for user in created if user["ordinal"] % 1000 == 0])
            on_progress(len(created))
        execute(
            "INSERT INTO member (server_id, user_id) SELECT %(server_id)s, id FROM user_account WHERE is_admin",
            {"server_id": server.id},
        )
    execute("ANALYZE user_account, subscription, member, member_role, preference, channel_role")
    return {
        "server_id": server.id,
        "channel_ids": channel_ids,
        "members": members,
        "usernames": [f"member-{offset + number}" for number in range(1, min(members, 5) + 1)],
    }


def _batches(members: int) -> Iterator[tuple[int, int]]:
    for first in range(1, members + 1, BATCH):
        yield first, min(first + BATCH - 1, members)


def _highest_number() -> int:
    found = fetch_one(
        "SELECT max(substring(username FROM '^member-([0-9]{1,15})$')::bigint) AS highest FROM user_account"
    )
    return int(found["highest"] or 0) if found else 0


def _channel(server_id: int, number: int, vip_id: int) -> int:
    name = {1: "general", 2: "announcements", 3: "vip"}.get(number, f"channel-{number}")
    channel = Channel.create(
        server=server_id,
        name=name,
        private=name == "vip",
        posting="admins" if name == "announcements" else "members",
    )
    if channel.private:
        ChannelRole.create(channel_id=channel.id, role_id=vip_id, server_id=server_id)
    return int(channel.id)


def _give_role(server_id: int, role_id: int, user_ids: list[int]) -> None:
    execute(
        "INSERT INTO member_role (role_id, user_id, server_id)"
        " SELECT %(role_id)s, user_id, %(server_id)s FROM unnest(%(user_ids)s::bigint[]) AS user_id",
        {"role_id": role_id, "server_id": server_id, "user_ids": user_ids},
    )
