"""Publish changes over Redis, so that the web processes send them to their streams at once."""

import json
import logging
from typing import Any

from redis.exceptions import RedisError

from belfry.core.redis import redis_connection

log = logging.getLogger(__name__)


def live_channel() -> str:
    """The channel of `publish`. It has the database's number, because Redis's channels are common to all databases."""
    return f"belfry:{redis_connection().connection_pool.connection_kwargs.get('db', 0)}:live"


def publish(**change: Any) -> None:
    """Publish a change to the web processes. Call it after the commit.

    - `notified=True`: there are notifications.
    - `user_id`: the user's unread count changed.
    - `message_id`: the message was deleted.
    - `messages`: ids of messages that were posted, edited or deleted.
    - `access`: what a user (by id), or any user (True), may see changed.
    - `signed_out`: a session ended.

    A lost change is harmless, because the hub and the pages also poll.
    """
    try:
        redis_connection().publish(live_channel(), json.dumps(change))
    except RedisError as error:
        log.warning("Redis is unavailable, %s is not published: %s", change, error)
