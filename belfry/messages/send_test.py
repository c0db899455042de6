"""Test notifications: a real message and a real run, to check the whole path.

- `me`: a message from Belfry itself that only the caller can see and is notified of.
- `channel`: an ordinary message of the caller in the channel, which notifies the other members.
- Without a channel it is the first one of a server that the caller is a member of. Where there is none, a server
  `Belfry test` is created with the caller as its member, so that a new installation can be tried.
"""
from belfry.core.db import db, fetch_one
from belfry.core.errors import Invalid
from belfry.fanout.runs import create_run
from belfry.identity.users import SYSTEM_USERNAME
from belfry.messages.mentions import find_mentions
from belfry.messages.messages import resolve_mentions
from belfry.servers.visibility import get_visible_channel, is_member
from models import Channel, Member, Server, User

AUDIENCES = ("me", "channel")


def send_test(caller: User, channel_id: int | None, content: str | None, audience: str) -> int:
    """Insert the message and its run, of kind `test`; the run's id.

    Raises NotFound for the channel, Invalid where the caller is not a member of its server and would not be notified.
    """
    with db.atomic():
        channel = get_visible_channel(caller, channel_id or _first_channel(caller))
        if audience == "me" and not is_member(caller.id, channel.server_id):
            raise Invalid({"channel_id": ["You are not a member of its server, so nobody would be notified."]})
        text = content or (
            f"Test notification for @{caller.username}" if audience == "me" else "Test notification for this channel"
        )
        found = resolve_mentions(channel, find_mentions(text), may_ping_groups=channel.moderates, allowed=None)
        author_id = _sender() if audience == "me" else caller.id
        written = fetch_one(
            """
            INSERT INTO message (channel_id, author_id, content, mentioned_users, mentioned_roles,
                mentions_everyone, visible_to_user_id)
            VALUES (%(channel_id)s, %(author_id)s, %(content)s, %(users)s::bigint[], %(roles)s::bigint[],
                %(everyone)s, %(visible_to_user_id)s)
            RETURNING id
            """,
            {
                "channel_id": channel.id,
                "author_id": author_id,
                "content": text,
                "users": [user.id for user in found.users],
                "roles": [role.id for role in found.roles],
                "everyone": found.everyone,
                "visible_to_user_id": caller.id if audience == "me" else None,
            },
        )
        assert written is not None
        return create_run(written["id"], "test")


def _sender() -> int:
    """The account that sends Belfry's own messages. It has no token, so nobody can sign in with it."""
    fetch_one(
        "INSERT INTO user_account (username, name) VALUES (%(sender)s, 'Belfry')"
        " ON CONFLICT (username) DO NOTHING RETURNING id",
        {"sender": SYSTEM_USERNAME},
    )
    return int(User.get(User.username == SYSTEM_USERNAME).id)


def _first_channel(caller: User) -> int:
    found = fetch_one(
        "SELECT chan.id FROM channel chan JOIN member mem ON mem.server_id = chan.server_id"
        " WHERE mem.user_id = %(user_id)s ORDER BY chan.private, chan.id LIMIT 1",
        {"user_id": caller.id},
    )
    if found:
        return int(found["id"])
    server = Server.create(name="Belfry test")
    Member.create(server=server, user=caller)
    return int(Channel.create(server=server, name="test").id)
