"""The results of the steps of the sweep, kept in Redis for /readyz and /metrics."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import RedisError

from belfry.core.redis import redis_connection

log = logging.getLogger(__name__)


RECOVERY = "recovery"  # the step without which lost work is not found again
SWEEP_KEY = "belfry:sweep"
STATUS_SECONDS = 3_600  # how long the status is kept after the last sweep


def record_sweep(failures: Mapping[str, bool]) -> None:
    """Record which steps of a sweep failed (True) or succeeded (False).

    In Redis, because a step may fail for the reason that PostgreSQL accepts no writes.
    """
    if not failures:
        return
    when = round(time.time())
    try:
        with redis_connection().pipeline() as pipeline:
            for step, failed in failures.items():
                if failed:
                    pipeline.hsetnx(SWEEP_KEY, f"{step} failing since", when)
                else:
                    pipeline.hdel(SWEEP_KEY, f"{step} failing since")
                    pipeline.hset(SWEEP_KEY, f"{step} succeeded at", when)
            pipeline.expire(SWEEP_KEY, STATUS_SECONDS)
            pipeline.execute()
    except RedisError as error:
        log.warning("Redis is unavailable, the result of the sweep is not recorded: %s", error)


def sweep_times(what: str) -> dict[str, int]:
    """{step: time} of the last success (`succeeded at`) or the first of the latest failures (`failing since`).

    In seconds since 1970; {} where nothing is recorded, or Redis is unavailable.
    """
    try:
        found: Any = redis_connection().hgetall(SWEEP_KEY)
    except RedisError:
        return {}
    times = {field.decode(): int(when) for field, when in found.items()}
    return {field.removesuffix(f" {what}"): when for field, when in times.items() if field.endswith(f" {what}")}
