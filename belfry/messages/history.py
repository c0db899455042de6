"""Read messages: one, a list or a page of a channel, and as they are sent to a user."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.core.errors import NotFound
from belfry.fanout.runs import runs_of_messages
from belfry.messages import mentions
from belfry.servers.visibility import VisibleChannel, get_visible_channel
from models import User

PAGE_SIZE = 50  # messages
PAGE_CHARACTERS = 100_000  # of content in a page: as many as ten messages of the greatest length have

COLUMNS_SQL = """
    msg.id, msg.channel_id, msg.content, msg.created_at, msg.edited_at, msg.author_id, msg.visible_to_user_id,
    msg.mentioned_users, msg.mentioned_roles, msg.mentions_everyone, msg.allowed_mentions,
    usr.username, usr.name
"""
VISIBLE_SQL = "msg.deleted_at IS NULL AND (msg.visible_to_user_id IS NULL OR msg.visible_to_user_id = %(user_id)s)"


def find_message(user: User, message_id: int) -> tuple[Row, VisibleChannel]:
    """Find a message and its channel. Raises NotFound where the user cannot see it, or it is deleted."""
    found = fetch_one(
        f"SELECT {COLUMNS_SQL} FROM message msg JOIN user_account usr ON usr.id = msg.author_id"
        f" WHERE msg.id = %(message_id)s AND {VISIBLE_SQL}",
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
    user: User,
    channel_id: int,
    *,
    before: int | None = None,
    after: int | None = None,
    ids: Sequence[int] | None = None,
    limit: int,
) -> list[Row]:
    """Stored messages of a channel that the user can see; with `ids` only these.

    The newest below `before`, newest first; or with `after`, the oldest above it, oldest first.
    """
    return fetch_all(
        f"SELECT {COLUMNS_SQL} FROM message msg JOIN user_account usr ON usr.id = msg.author_id"
        " WHERE msg.channel_id = %(channel_id)s"
        + ("" if before is None else " AND msg.id < %(before)s")  # no `IS NULL OR`, which reads newer ones
        + ("" if after is None else " AND msg.id > %(after)s")
        + ("" if ids is None else " AND msg.id = ANY(%(ids)s::bigint[])")
        + f" AND {VISIBLE_SQL}"
        f" ORDER BY msg.id {'DESC' if after is None else 'ASC'}"
        " LIMIT %(limit)s",
        {"channel_id": channel_id, "before": before, "after": after, "ids": ids, "limit": limit, "user_id": user.id},
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


@dataclass(frozen=True)
class MessagePage:
    """Messages, oldest first, and whether there are older and newer ones."""

    messages: list[Row]
    older: bool
    newer: bool


def load_page(
    user: User,
    channel: VisibleChannel,
    *,
    before: int | None = None,
    after: int | None = None,
    around: int | None = None,
    ids: Sequence[int] | None = None,
    limit: int = PAGE_SIZE,
) -> MessagePage:
    """Load up to `limit` messages of a channel, fewer where they have more than PAGE_CHARACTERS in total.

    - With `ids`: those that exist.
    - With `around`: that message, and as many before it as after it, whether or not it exists.
    - With `after`: the oldest with a higher id.
    - Otherwise the newest, with `before` those with a lower id.
    """
    if ids is not None:
        found, older, newer = stored_messages(user, channel.id, ids=ids, limit=limit)[::-1], False, False
    elif around is not None:
        half = limit // 2
        above = stored_messages(user, channel.id, after=around, limit=half + 1)
        below = stored_messages(user, channel.id, before=around + 1, limit=half + 1)
        shown_above, shown_below = _fit(above, half, PAGE_CHARACTERS // 2), _fit(below, half, PAGE_CHARACTERS // 2)
        found = [*reversed(shown_below), *shown_above]
        older, newer = len(below) > len(shown_below), len(above) > len(shown_above)
    elif after is not None:
        above = stored_messages(user, channel.id, after=after, limit=limit + 1)
        found = _fit(above, limit, PAGE_CHARACTERS)
        older, newer = after > 0, len(above) > len(found)
    else:
        below = stored_messages(user, channel.id, before=before, limit=limit + 1)
        shown = _fit(below, limit, PAGE_CHARACTERS)
        found, older, newer = shown[::-1], len(below) > len(shown), before is not None
    return MessagePage(serialize_messages(user, found), older, newer)


def _fit(messages: Sequence[Row], limit: int, characters: int) -> list[Row]:
    """The first messages, at most `limit`, whose content has at most this many characters in total."""
    lengths = accumulate(len(message["content"]) for message in messages[:limit])
    return list(messages[: sum(length <= characters for length in lengths)])
