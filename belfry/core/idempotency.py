"""`Idempotency-Key`: a repeated request gets the first response again, for one day."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from belfry.core.db import execute, fetch_one, idle_timeout, set_config_sql
from belfry.core.errors import Conflict, IdempotencyMismatch

RETENTION = "24 hours"  # how long a key is kept; belfry/worker/cleanup.py deletes older ones


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that must take effect once: its user, key and body, and how its response is made."""

    user_id: int
    key: str
    body: Any
    render: Callable[[Any], str]

    @property
    def request_hash(self) -> bytes:
        """A hash of a request's body, which does not depend on the order of its fields."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).digest()


def begin(once: IdempotentRequest, round_trip: float) -> str | None:
    """Lock a key until the transaction ends; the stored response, or None for the first request.

    `timed_transaction` began the transaction and yielded `round_trip`. Raises Conflict while another request holds the
    key, and IdempotencyMismatch where the key was used with another body.
    """
    limit = set_config_sql(idle_timeout(round_trip))
    locked = fetch_one(
        f"SELECT pg_try_advisory_xact_lock(hashtextextended(%(name)s, 0)) AS locked, {limit}",
        {"name": f"idempotency {once.user_id} {once.key}"},
    )
    if not locked or not locked["locked"]:
        raise Conflict("A request with this Idempotency-Key is still in progress.")
    found = fetch_one(
        "SELECT request_hash, response FROM idempotency_key"
        f" WHERE user_id = %(user_id)s AND key = %(key)s AND created_at > now() - interval '{RETENTION}'",
        {"user_id": once.user_id, "key": once.key},
    )
    if found is None:
        return None
    if bytes(found["request_hash"]) != once.request_hash:
        raise IdempotencyMismatch("This Idempotency-Key was used before with another body.")
    return str(found["response"])


def save_response(once: IdempotentRequest, answered: Any) -> None:
    """Store the response in the transaction of the request, or replace it where it has changed."""
    execute(
        "INSERT INTO idempotency_key (user_id, key, request_hash, response)"
        " VALUES (%(user_id)s, %(key)s, %(request_hash)s, %(response)s)"
        " ON CONFLICT (user_id, key) DO UPDATE"
        " SET request_hash = EXCLUDED.request_hash, response = EXCLUDED.response, created_at = now()",
        {
            "user_id": once.user_id,
            "key": once.key,
            "request_hash": once.request_hash,
            "response": once.render(answered),
        },
    )
