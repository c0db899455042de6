"""Publish over Redis that something has changed, so that the web processes send it to their streams at once."""

import json
import logging
from typing import Any

from redis.exceptions import RedisError

from belfry.core.redis import redis_connection

log = logging.getLogger(__name__)


def live_channel() -> str:
    """Where `publish` publishes. Redis has one set of channels for all of its databases."""
    return f"belfry:{redis_connection().connection_pool.connection_kwargs.get('db', 0)}:live"


def publish(**what: Any) -> None:
    """Tell the web processes that something has changed that they may have to show at once: after the commit.

    `told=True`, `user_id`, `message_id`, `access` (a user id, or True for all) or `signed_out`: the hub says what it
    does with each. One that is lost does no harm: they look by themselves as well, every few seconds.
    """
    try:
        redis_connection().publish(live_channel(), json.dumps(what))
    except RedisError as error:
        log.warning("Redis is out of reach, %s is not announced: %s", what, error)
