"""Rate limits: by the person who asks, counted on Redis for all web processes together.

Never by anything that a caller can make up (a header, a token's beginning, an address behind a proxy). With
Redis out, requests pass, and the log says so.
"""

import logging
from collections.abc import Callable
from typing import Any

from flask import Flask, g
from flask_limiter import HeaderNames, Limiter

from config import settings
from jobs import redis_connection

log = logging.getLogger(__name__)


def _person() -> str:
    return f"user:{g.user.id}"


limiter = Limiter(
    key_func=_person,
    key_prefix="belfry",
    default_limits=[settings.rate_limit_default],
    default_limits_exempt_when=lambda: g.get("user") is None,
    storage_uri="redis://",  # which server it is, TLS, sockets and time-outs: the pool knows
    storage_options={"connection_pool": redis_connection().connection_pool},  # type: ignore[dict-item]
    strategy="sliding-window-counter",
    swallow_errors=True,
    headers_enabled=True,
    header_name_mapping={
        HeaderNames.LIMIT: "RateLimit-Limit",
        HeaderNames.REMAINING: "RateLimit-Remaining",
        HeaderNames.RESET: "RateLimit-Reset",
    },
)


def limit_messages(view: Callable[..., Any]) -> Callable[..., Any]:
    """RATE_LIMIT_MESSAGES for one author: posts and edits together."""
    limit = limiter.shared_limit(
        settings.rate_limit_messages, scope="messages", exempt_when=lambda: g.get("user") is None
    )
    limited: Callable[..., Any] = limit(view)
    return limited


def register(app: Flask) -> None:
    """Count every request of somebody who is known. After `authenticate`, before the views."""
    limiter.init_app(app)
