"""Read messages: one, a page of a channel, and as they are sent to a user."""

from collections.abc import Iterable, Sequence

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.core.errors import NotFound
from belfry.fanout.runs import runs_of_messages
from belfry.messages import mentions
from belfry.servers.visibility import VisibleChannel, get_visible_channel
from models import User

_COLUMNS = """
    msg.id, msg.channel_id, msg.content, msg.created_at, msg.edited_at, msg.author_id, msg.visible_to_user_id,
    msg.mentioned_users, msg.mentioned_roles, msg.mentions_everyone, msg.allowed_mentions,
    usr.username, usr.name
"""
_VISIBLE = "msg.deleted_at IS NULL AND (msg.visible_to_user_id IS NULL OR msg.visible_to_user_id = %(user_id)s)"


def find_message(user: User, message_id: int) -> tuple[Row, VisibleChannel]:
    """Find a message and its channel. Raises NotFound where the user cannot see it, or it is deleted."""
    found = fetch_one(
        f"SELECT {_COLUMNS} FROM message msg JOIN user_account usr ON usr.id = msg.author_id"
        f" WHERE msg.id = %(message_id)s AND {_VISIBLE}",
        {"message_id": message_id, "user_id": user.id},
    )
    if found is None:
        raise NotFound(f"There is no message {message_id}.")
    try:
        return found, get_visible_channel(user, found["channel_id"])
    except NotFound:
        raise NotFound(f"There is no message {message_id}.") from None


def list_messages(user: User, channel_id: int, *, before: int | None, limit: int) -> list[Row]:
    """List a channel's messages, newest first, with an id below `before`. Raises NotFound for the channel."""
    get_visible_channel(user, channel_id)
    return serialize_messages(user, stored_messages(user, channel_id, before=before, limit=limit))


def stored_messages(
    user: User, channel_id: int, *, before: int | None = None, after: int | None = None, limit: int
) -> list[Row]:
    """Stored messages of a channel that the user can see.

    The newest below `before`, newest first; or with `after`, the oldest above it, oldest first.
    """
    return fetch_all(
        f"SELECT {_COLUMNS} FROM message msg JOIN user_account usr ON usr.id = msg.author_id"
        " WHERE msg.channel_id = %(channel_id)s"
        + ("" if before is None else " AND msg.id < %(before)s")  # no `IS NULL OR`, which reads newer ones
        + ("" if after is None else " AND msg.id > %(after)s")
        + f" AND {_VISIBLE}"
        f" ORDER BY msg.id {'DESC' if after is None else 'ASC'}"
        " LIMIT %(limit)s",
        {"channel_id": channel_id, "before": before, "after": after, "limit": limit, "user_id": user.id},
    )


def serialize_messages(reader: User, messages: Sequence[Row]) -> list[Row]:
    """Serialize stored messages, with names, and the run for the author and admins. Takes at most three queries."""
    if not messages:
        return []
    usernames = _names("SELECT id, username AS name FROM user_account", _all_ids(messages, "mentioned_users"))
    roles = _names("SELECT id, name FROM role", _all_ids(messages, "mentioned_roles"))
    own = [message["id"] for message in messages if reader.is_admin or message["author_id"] == reader.id]
    runs = runs_of_messages(own) if own else {}
    return [
        {
            "id": message["id"],
            "channel_id": message["channel_id"],
            "author": {
                "id": message["author_id"],
                "username": message["username"],
                "name": message["name"],
            },
            "content": message["content"],
            "created_at": message["created_at"],
            "edited_at": message["edited_at"],
            "mentions": mentions.Mentions(
                users=tuple(
                    mentions.MentionedUser(id=id_, username=usernames[id_], sees_channel=True)
                    for id_ in message["mentioned_users"]
                    if id_ in usernames
                ),
                roles=tuple(
                    mentions.MentionedRole(id=id_, name=roles[id_])
                    for id_ in message["mentioned_roles"]
                    if id_ in roles
                ),
                everyone=message["mentions_everyone"],
                warnings=(),
            ),
            "run": runs.get(message["id"]),
        }
        for message in messages
    ]


def _all_ids(messages: Iterable[Row], column: str) -> list[int]:
    return sorted({id_ for message in messages for id_ in message[column]})


def _names(select: str, ids: list[int]) -> dict[int, str]:
    if not ids:
        return {}
    return {
        found["id"]: found["name"] for found in fetch_all(f"{select} WHERE id = ANY(%(ids)s::bigint[])", {"ids": ids})
    }
