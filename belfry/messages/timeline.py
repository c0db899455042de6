"""Load the part of a channel that a page shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from belfry.core.db import Row
from belfry.messages.history import serialize_messages, stored_messages
from belfry.servers.visibility import VisibleChannel
from models import User

PAGE_SIZE = 50  # messages
PAGE_CHARACTERS = 100_000  # of content in a page: as many as ten messages of the greatest length have


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
    limit: int = PAGE_SIZE,
) -> MessagePage:
    """Load up to `limit` messages of a channel, fewer where they have more than PAGE_CHARACTERS in total.

    - With `around`: that message, and as many before it as after it, whether or not it exists.
    - With `after`: the oldest with a higher id.
    - Otherwise the newest, with `before` those with a lower id.
    """
    if around is not None:
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
