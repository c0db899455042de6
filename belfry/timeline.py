"""A stretch of a channel, as somebody who scrolls sees it."""

from dataclasses import dataclass

from belfry.access import SeenChannel
from belfry.messages import describe, stored_messages
from belfry.sql import Row
from models import User

STRETCH = 50  # messages


@dataclass(frozen=True)
class Stretch:
    """Messages, oldest first, and whether there are older and newer ones."""

    messages: list[Row]
    older: bool
    newer: bool


def stretch(
    user: User,
    channel: SeenChannel,
    *,
    before: int | None = None,
    after: int | None = None,
    around: int | None = None,
    limit: int = STRETCH,
) -> Stretch:
    """Up to `limit` messages of a channel:

    - with `around`: that message, as many above it as below it, whether or not it is there itself;
    - with `after`: the oldest with a higher id;
    - else the newest, with `before` of those with a lower id.
    """
    if around is not None:
        half = limit // 2
        above = stored_messages(user, channel.id, after=around, limit=half + 1)
        below = stored_messages(user, channel.id, before=around + 1, limit=half + 1)
        found = below[half - 1 :: -1] + above[:half]
        older, newer = len(below) > half, len(above) > half
    elif after is not None:
        above = stored_messages(user, channel.id, after=after, limit=limit + 1)
        found, older, newer = above[:limit], after > 0, len(above) > limit
    else:
        below = stored_messages(user, channel.id, before=before, limit=limit + 1)
        found, older, newer = below[limit - 1 :: -1], len(below) > limit, before is not None
    return Stretch(describe(user, found), older, newer)
