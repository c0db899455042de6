"""Rate limits: by the person who asks, counted on Redis for all web processes together.

Never by anything that a caller can make up (a header, a token's beginning, an address behind a proxy). With
Redis out, requests pass, and the log says so.
"""

import logging
import math
from functools import cache

from flask import Flask, Response, current_app, g, request
from limits import RateLimitItem, parse_many
from redis.commands.core import Script
from redis.exceptions import RedisError

from config import settings
from queues import redis_connection
from views.endpoint import View
from views.problems import HttpProblem

log = logging.getLogger(__name__)

STREAM_OPENINGS = "120 per minute"  # of one person: each of 20 streams may come back six times

_LIMITS = {
    scope: sorted(parse_many(text))  # the shortest first
    for scope, text in (
        ("messages", settings.rate_limit_messages),
        ("streams", STREAM_OPENINGS),
        ("other", settings.rate_limit_default),
    )
}

# A sliding window, of two that are counted: those of the last one weigh as much as of it is still in sight. What is
# refused does not count. Redis's own clock, and one round trip: whether it may, how many are left, and the
# milliseconds until there is one more.
_HIT = """
local most, period = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local found = redis.call('HMGET', KEYS[1], 'began', 'count', 'before')
local began, count, before = tonumber(found[1] or now), tonumber(found[2] or 0), tonumber(found[3] or 0)
began = math.min(began, now)  -- of a Redis whose clock went back
if now >= began + 2 * period then
    began, count, before = now, 0, 0
elseif now >= began + period then
    began, count, before = began + period, 0, count
end
local to_come = began + period - now
local left = most - count - math.floor(before * to_come / period)
local may = left > 0
if may then
    count, left = count + 1, left - 1
    redis.call('HSET', KEYS[1], 'began', began, 'count', count, 'before', before)
    redis.call('EXPIRE', KEYS[1], 2 * period)
end
local one_more = to_come
if before > 0 then
    one_more = to_come % (period / before)
end
return {may and 1 or 0, math.max(0, left), math.ceil(one_more * 1000)}
"""


@cache
def _script() -> Script:
    return redis_connection().register_script(_HIT)


def limit_messages(view: View) -> View:
    """RATE_LIMIT_MESSAGES for one author: posts and edits together. Everything else has RATE_LIMIT_DEFAULT."""
    view.limited_as = "messages"  # type: ignore[attr-defined]
    return view


def limit_streams(view: View) -> View:
    """STREAM_OPENINGS for one person: what a client missed costs more than other requests to find."""
    view.limited_as = "streams"  # type: ignore[attr-defined]
    return view


def register(app: Flask) -> None:
    """Count every request of somebody who is known. After `authenticate`, before the views."""
    app.before_request(_count)
    app.after_request(_tell)


def _count() -> None:
    """Raises 429 where there were too many; what is told of it is in `g.limit`."""
    if g.user is None or request.endpoint is None:
        return
    scope = getattr(current_app.view_functions[request.endpoint], "limited_as", "other")
    for limit in _LIMITS[scope]:
        try:
            may, left, milliseconds = _hit(limit, scope)
        except RedisError as error:
            log.warning("Redis is out of reach, nobody is counted: %s", error)
            return
        seconds = math.ceil(milliseconds / 1000)
        if "limit" not in g or not may or left < g.limit[1]:
            g.limit = limit.amount, left, seconds
        if not may:
            detail = f"Too many requests: {limit} for one person."
            raise HttpProblem(429, detail, {"Retry-After": str(seconds)})


def _hit(limit: RateLimitItem, scope: str) -> tuple[int, int, int]:
    """Whether it may, how many are left, and in how many milliseconds there is one more."""
    key = limit.key_for("belfry", f"user:{g.user.id}", scope)
    may, left, milliseconds = _script()([key], [limit.amount, limit.get_expiry()])
    return may, left, milliseconds


def _tell(answer: Response) -> Response:
    if "limit" in g:
        most, left, seconds = g.limit
        answer.headers["RateLimit-Limit"] = str(most)
        answer.headers["RateLimit-Remaining"] = str(left)
        answer.headers["RateLimit-Reset"] = str(seconds)
    return answer
