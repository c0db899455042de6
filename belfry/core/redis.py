"""Connect to Redis: the connection that web processes, jobs and the sweeper share."""

from functools import cache

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as RedisRetry

from config import settings


def redis_connection() -> Redis:
    """The connection of web processes and jobs to Redis. Its timeouts are short: a request must not wait for it."""
    return _connection_to(settings.redis_url)


@cache
def _connection_to(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_connect_timeout=0.5,
        socket_timeout=2,
        retry=RedisRetry(NoBackoff(), 1),  # a connection that a restart of Redis left dead is made again once
        health_check_interval=30,
    )


def redis_answers() -> bool:
    """Whether Redis is in reach."""
    try:
        return bool(redis_connection().ping())
    except RedisError:
        return False
