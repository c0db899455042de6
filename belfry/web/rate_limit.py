"""Rate limits: by user, and by client address where no user is known, counted on Redis for all web processes together.

- A user's posts and edits count as `messages`, everything else of theirs as `other`, unknown paths included.
- Requests without a user count by address as `anonymous`: one limit for all of them, wrong tokens included. Nobody
  guesses a token of 256 random bits, so what is limited is load.
- /healthz and static files do not count: counting would cost more than they do.

Never by anything that a caller can make up (a token's beginning, a forwarded address that no trusted proxy wrote).
With Redis out, requests pass, and the log says so.
"""

import ipaddress
import logging
import math
from functools import cache

from flask import Flask, Response, current_app, g, request
from limits import RateLimitItem, parse_many
from redis import Redis
from redis.commands.core import Script
from redis.exceptions import RedisError

from belfry.core.redis import redis_connection
from belfry.web.endpoint import View
from belfry.web.problems import HttpProblem
from config import settings, tuning

log = logging.getLogger(__name__)

_UNCOUNTED = ("static", "health.healthz")
WITHOUT_USER = (*_UNCOUNTED, "health.readyz", "openapi.docs", "openapi.openapi_json")
"""Endpoints that are the same for everybody: nobody is looked up for them, and the address counts."""

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
def _script(connection: Redis) -> Script:
    return connection.register_script(_HIT)


def _limits(scope: str) -> list[RateLimitItem]:
    """The limits of a scope, the one of the shortest period first."""
    return _parsed(
        {
            "messages": settings.rate_limit_messages,
            "streams": tuning.stream_openings,
            "other": settings.rate_limit_default,
            "anonymous": settings.rate_limit_anonymous,
        }[scope]
    )


@cache
def _parsed(text: str) -> list[RateLimitItem]:
    return sorted(parse_many(text))


def limit_messages(view: View) -> View:
    """RATE_LIMIT_MESSAGES for one author: posts and edits together. Everything else has RATE_LIMIT_DEFAULT."""
    view.limited_as = "messages"  # type: ignore[attr-defined]
    return view


def limit_streams(view: View) -> View:
    """`tuning.stream_openings` for one person: what a client missed costs more than other requests to find."""
    view.limited_as = "streams"  # type: ignore[attr-defined]
    return view


def register(app: Flask) -> None:
    """Count every request. After `_authenticate`, before the views."""
    app.before_request(_count)
    app.after_request(_set_headers)


def _count() -> None:
    """Count a request; `g.limit` gets the values of the response's headers. Raises 429 beyond the limit."""
    if request.endpoint in _UNCOUNTED:
        return
    if g.user is None:
        scope, key, whom = "anonymous", f"address:{client_address()}", "address"
    else:
        view = current_app.view_functions.get(request.endpoint or "")
        scope, key, whom = getattr(view, "limited_as", "other"), f"user:{g.user.id}", "person"
    for limit in _limits(scope):
        try:
            may, left, milliseconds = _hit(limit, key, scope)
        except RedisError as error:
            log.warning("Redis is unavailable, nobody is counted: %s", error)
            return
        seconds = math.ceil(milliseconds / 1000)
        if "limit" not in g or not may or left < g.limit[1]:
            g.limit = limit.amount, left, seconds
        if not may:
            detail = f"Too many requests: {limit} for one {whom}."
            raise HttpProblem(429, detail, {"Retry-After": str(seconds)})


def _hit(limit: RateLimitItem, key: str, scope: str) -> tuple[int, int, int]:
    """Whether it may, how many are left, and in how many milliseconds there is one more."""
    key = limit.key_for("belfry", key, scope)
    may, left, milliseconds = _script(redis_connection())([key], [limit.amount, limit.get_expiry()])
    return may, left, milliseconds


def client_address() -> str:
    """The client's IPv4 address, or the /64 of its IPv6 address, as far as TRUSTED_PROXIES can be believed.

    With 0 the peer's. With n the n-th of X-Forwarded-For from the right, which the n-th proxy wrote: clients can put
    anything to the left of it. Where that is missing or no address, the peer's; `unknown` for a Unix socket.
    """
    proxies, peer = settings.trusted_proxies, request.environ.get("REMOTE_ADDR", "")
    forwarded = request.headers.get("X-Forwarded-For", "").rsplit(",", proxies) if proxies else []
    named = forwarded[-proxies] if 0 < proxies <= len(forwarded) else peer
    return _network(named) or _network(peer) or "unknown"


def _network(text: str) -> str | None:
    """An address in its one spelling, without a port, an IPv6 address as its /64; None for what is no address."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"


def _set_headers(answer: Response) -> Response:
    if "limit" in g:
        most, left, seconds = g.limit
        answer.headers["RateLimit-Limit"] = str(most)
        answer.headers["RateLimit-Remaining"] = str(left)
        answer.headers["RateLimit-Reset"] = str(seconds)
    return answer
