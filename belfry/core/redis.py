"""The connection to Redis that web processes, jobs and the sweeper share."""

from functools import cache

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as RedisRetry

from config import settings


def redis_connection() -> Redis:
    """The connection to Redis. Its time-outs are short, because requests must not wait for Redis."""
    return _connection_to(settings.redis_url)


@cache
def _connection_to(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_connect_timeout=0.5,
        socket_timeout=2,
        retry=RedisRetry(NoBackoff(), 1),  # a connection that a restart of Redis has ended is opened again once
        health_check_interval=30,
    )


def redis_answers() -> bool:
    """Whether Redis answers."""
    try:
        return bool(redis_connection().ping())
    except RedisError:
        return False
