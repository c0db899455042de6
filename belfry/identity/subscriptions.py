"""Subscriptions: what the payment provider says of a user, and which subscriptions are active."""

from datetime import datetime

from belfry.core.db import Row, fetch_one
from belfry.core.errors import NotFound
from belfry.identity.users import find_user

ACTIVE_SUBSCRIPTION_SQL = """(
    (sub.status IN ('active', 'trialing')
        AND (sub.current_period_end IS NULL OR sub.current_period_end >= now() - interval '24 hours'))
    OR (sub.status = 'past_due'
        AND (sub.current_period_end IS NULL
             OR sub.current_period_end >= now() - make_interval(hours => 24 * %(grace_days)s)))
)"""
"""Whether `subscription sub` is active: true, false, or NULL without a subscription (docs/reference/decisions.md).

- `active` and `trialing` count until one day after the period's end, because the provider's message may be late.
- `past_due` counts for PAST_DUE_GRACE_DAYS after it.
- A period without an end does not end. The database's clock decides, in days of 24 hours.
"""


def subscription_of(user_id: int) -> Row | None:
    """{"status", "current_period_end", "updated_at"}; None where there never was a subscription. Raises NotFound."""
    found = fetch_one(  # as SQL: most clients request this first, and peewee takes four times as long
        "SELECT sub.user_id, sub.status, sub.current_period_end, sub.updated_at"
        " FROM user_account usr LEFT JOIN subscription sub ON sub.user_id = usr.id"
        " WHERE usr.id = %(user_id)s",
        {"user_id": user_id},
    )
    if found is None:
        raise NotFound(f"There is no user {user_id}.")
    return found if found.pop("user_id") else None


def set_subscription(user_id: int, status: str, current_period_end: datetime | None) -> Row:
    """Set a user's subscription to what the payment provider says. Repeating it changes nothing. Raises NotFound."""
    find_user(user_id)
    found = fetch_one(
        "INSERT INTO subscription (user_id, status, current_period_end)"
        " VALUES (%(user_id)s, %(status)s, %(current_period_end)s)"
        " ON CONFLICT (user_id) DO UPDATE"
        " SET status = EXCLUDED.status, current_period_end = EXCLUDED.current_period_end, updated_at ="
        " CASE WHEN (subscription.status, subscription.current_period_end)"
        " IS DISTINCT FROM (EXCLUDED.status, EXCLUDED.current_period_end) THEN now() ELSE subscription.updated_at END"
        " RETURNING status, current_period_end, updated_at",
        {"user_id": user_id, "status": status, "current_period_end": current_period_end},
    )
    assert found is not None
    return found
