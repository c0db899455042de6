"""Search the messages that a user can see, by their words."""

from peewee import OperationalError

from belfry.core.db import Row, fetch_all, transaction
from belfry.core.errors import Invalid
from belfry.messages.history import COLUMNS_SQL, VISIBLE_SQL
from belfry.servers.visibility import get_visible_channel, visible_channels
from models import User

SEARCH_SECONDS = 3
MAX_QUERY_CHARACTERS = 200


def search(user: User, query: str, *, channel_id: int | None, before: int | None, limit: int) -> list[Row]:
    """Find stored messages with an id below `before`, newest first, in all visible channels or in one.

    `query` is read as by search engines (`websearch_to_tsquery`): all words, "a phrase", -without, or. Words are
    compared as they are written, in any case. Rows have their "channel", as `visible_channels` returns it, as well.

    Raises NotFound for a channel that the user cannot see, Invalid where the search takes longer than SEARCH_SECONDS.
    """
    if channel_id is not None:
        get_visible_channel(user, channel_id)
    channels = {one["id"]: one for one in visible_channels(user) if channel_id in (None, one["id"])}
    parameters = {
        "query": query,
        "channel_ids": list(channels),
        "before": before,
        "limit": limit,
        "user_id": user.id,
    }
    try:
        with transaction(statement_timeout=f"{SEARCH_SECONDS}s"):
            found = fetch_all(
                f"""
                SELECT {COLUMNS_SQL}
                FROM message msg
                JOIN user_account usr ON usr.id = msg.author_id
                WHERE to_tsvector('simple', msg.content) @@ websearch_to_tsquery('simple', %(query)s)
                AND msg.channel_id = ANY(%(channel_ids)s::bigint[])
                {"" if before is None else "AND msg.id < %(before)s"}
                AND {VISIBLE_SQL}
                ORDER BY msg.id DESC
                LIMIT %(limit)s
                """,
                parameters,
            )
    except OperationalError as error:
        if "statement timeout" not in str(error):
            raise
        raise Invalid({"q": ["The search took too long. Search for rarer words, or in one channel."]}) from None
    return [message | {"channel": channels[message["channel_id"]]} for message in found]
