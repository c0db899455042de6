"""Rate limits by user, or by client address without a user, counted in Redis for all web processes together.

- A user's posts and edits count as `messages`; all other requests of a user count as `other`, unknown paths included.
- Requests without a user, invalid tokens included, count by address as `anonymous`. Nobody guesses a token of 256
  random bits, so this limits load and not guesses.
- /healthz and static files are not counted: counting would cost more than serving them.

Requests never count by something that a client can choose, such as a forwarded address that no trusted proxy wrote.
While Redis is unavailable, requests are allowed, and a warning is logged.
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
"""Flask endpoints whose response is the same for everybody: no user is read, and they count by address."""

_HIT_LUA = """
-- A sliding window over two counted periods: the earlier one counts by the share of it that is within the window.
-- KEYS: the counter. ARGV: limit, seconds of the period.
-- Returns 1 if the request is allowed, how many remain, and the milliseconds until one more is allowed. A refused
-- request does not count.
local most, period = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local found = redis.call('HMGET', KEYS[1], 'began', 'count', 'before')
local began, count, before = tonumber(found[1] or now), tonumber(found[2] or 0), tonumber(found[3] or 0)
began = math.min(began, now)  -- the clock may have been set back
if now >= began + 2 * period then
    began, count, before = now, 0, 0
elseif now >= began + period then
    began, count, before = began + period, 0, count
end
local to_come = began + period - now
local left = most - count - math.floor(before * to_come / period)
local allowed = left > 0
if allowed then
    count, left = count + 1, left - 1
    redis.call('HSET', KEYS[1], 'began', began, 'count', count, 'before', before)
    redis.call('EXPIRE', KEYS[1], 2 * period)
end
local one_more = to_come
if before > 0 then
    one_more = to_come % (period / before)
end
return {allowed and 1 or 0, math.max(0, left), math.ceil(one_more * 1000)}
"""


@cache
def _script(connection: Redis) -> Script:
    return connection.register_script(_HIT_LUA)


def _limits(scope: str) -> list[RateLimitItem]:
    """The limits of a scope, the shortest period first."""
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
    """Apply RATE_LIMIT_MESSAGES to a view in place of RATE_LIMIT_DEFAULT."""
    view.limited_as = "messages"  # type: ignore[attr-defined]
    return view


def limit_streams(view: View) -> View:
    """Apply `tuning.stream_openings` to a view: finding what a client missed is expensive."""
    view.limited_as = "streams"  # type: ignore[attr-defined]
    return view


def register(app: Flask) -> None:
    """Count every request, after authentication and before the views."""
    app.before_request(_count)
    app.after_request(_set_headers)


def _count() -> None:
    """Count a request, and set `g.limit` for the response's headers. Raises 429 beyond the limit."""
    if request.endpoint in _UNCOUNTED:
        return
    if g.user is None:
        scope, key, subject = "anonymous", f"address:{client_address()}", "address"
    else:
        view = current_app.view_functions.get(request.endpoint or "")
        scope, key, subject = getattr(view, "limited_as", "other"), f"user:{g.user.id}", "user"
    for limit in _limits(scope):
        try:
            counter = limit.key_for("belfry", key, scope)
            allowed, left, milliseconds = _script(redis_connection())([counter], [limit.amount, limit.get_expiry()])
        except RedisError as error:
            log.warning("Redis is unavailable, requests are not counted: %s", error)
            return
        seconds = math.ceil(milliseconds / 1000)
        if "limit" not in g or not allowed or left < g.limit[1]:
            g.limit = limit.amount, left, seconds
        if not allowed:
            detail = f"Too many requests: {limit} for one {subject}."
            raise HttpProblem(429, detail, {"Retry-After": str(seconds)})


def client_address() -> str:
    """The client's IPv4 address, or the /64 of its IPv6 address; `unknown` for a Unix socket.

    With TRUSTED_PROXIES=0 the address of the peer. With n the n-th address of X-Forwarded-For from the right, which the
    n-th proxy wrote, because clients can write anything to the left of it; the peer's where it is missing or invalid.
    """
    proxies, peer = settings.trusted_proxies, request.environ.get("REMOTE_ADDR", "")
    forwarded = request.headers.get("X-Forwarded-For", "").rsplit(",", proxies) if proxies else []
    named = forwarded[-proxies] if 0 < proxies <= len(forwarded) else peer
    return _network(named) or _network(peer) or "unknown"


def _network(text: str) -> str | None:
    """An address in its canonical form without a port, an IPv6 address as its /64; None for an invalid one."""
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


def _set_headers(response: Response) -> Response:
    if "limit" in g:
        for name, value in zip(("Limit", "Remaining", "Reset"), g.limit, strict=True):
            response.headers[f"RateLimit-{name}"] = str(value)
    return response
