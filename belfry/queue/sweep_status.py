"""How the parts of the sweep went, kept in Redis for /readyz and /metrics."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import RedisError

from belfry.core.redis import redis_connection

log = logging.getLogger(__name__)


RECOVERY = "recovery"  # the part of the sweep without which lost work is not done; jobs.py has the others
SWEEP_KEY = "belfry:sweep"
SWEEP_KEPT_SECONDS = 3_600  # without a sweep, after which nothing is known of it


def record_sweep(failures: Mapping[str, bool]) -> None:
    """Keep in Redis which parts of a sweep failed (True) or succeeded (False), for /readyz and /metrics.

    In Redis, since what makes a part fail may be that PostgreSQL accepts no write.
    """
    if not failures:
        return
    when = round(time.time())
    try:
        with redis_connection().pipeline() as pipeline:
            for part, failed in failures.items():
                if failed:
                    pipeline.hsetnx(SWEEP_KEY, f"{part} failing since", when)
                else:
                    pipeline.hdel(SWEEP_KEY, f"{part} failing since")
                    pipeline.hset(SWEEP_KEY, f"{part} succeeded at", when)
            pipeline.expire(SWEEP_KEY, SWEEP_KEPT_SECONDS)
            pipeline.execute()
    except RedisError as error:
        log.warning("Redis is out of reach, it is not recorded how the sweep went: %s", error)


def sweep_times(what: str) -> dict[str, int]:
    """By part of the sweep, when it succeeded last (`succeeded at`), or since when it has failed each time (`failing
    since`), in seconds since 1970; {} where there is none, or Redis is out of reach."""
    try:
        found: Any = redis_connection().hgetall(SWEEP_KEY)
    except RedisError:
        return {}
    times = {field.decode(): int(when) for field, when in found.items()}
    return {field.removesuffix(f" {what}"): when for field, when in times.items() if field.endswith(f" {what}")}
