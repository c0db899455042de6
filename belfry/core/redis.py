"""Connect to Redis: the connection that web processes, jobs and the sweeper share."""

from functools import cache

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as RedisRetry

from config import settings


@cache
def redis_connection() -> Redis:
    """The web's and the jobs' connection to Redis: short timeouts, for a request must not wait for it."""
    return Redis.from_url(
        settings.redis_url,
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
