"""The documented decision for each member, in plain Python. The tests compare the SQL with it.

Written only from the documentation of decisions. Nothing here may be copied from, or shared with, the code under test:
an oracle with the code's own rules agrees with any mistake.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

PROVIDER_SLACK = timedelta(days=1)
NOTIFY_DECISIONS = ("message", "mention", "mention_role", "mention_everyone")
SILENT_DECISIONS = ("author", "no_channel_access", "no_subscription", "channel_off", "mentions_only", "muted")


@dataclass
class Subscription:
    status: str
    period_end: datetime | None = None


@dataclass
class Preference:
    level: str = "all"
    muted_until: datetime | None = None


@dataclass
class Member:
    """One member of the server. None for the subscription or the preference means that there is no row."""

    admin: bool = False
    subscription: Subscription | None = None
    roles: frozenset[int] = frozenset()
    preference: Preference | None = None


@dataclass
class Scenario:
    """A server with one channel and one message. Numbers identify users and roles.

    `author` and `mentioned` may contain users who are not members. `only_for` is set for a test notification "to me",
    whose audience is only that user.
    """

    members: dict[int, Member]
    author: int
    private: bool = False
    channel_roles: frozenset[int] = frozenset()
    mentioned: frozenset[int] = frozenset()
    mentioned_roles: frozenset[int] = frozenset()
    everyone: bool = False
    only_for: int | None = None
    grace: timedelta = timedelta(days=7)


def has_active_subscription(subscription: Subscription | None, now: datetime, grace: timedelta) -> bool:
    if subscription is None:
        return False
    if subscription.status in ("active", "trialing"):
        slack = PROVIDER_SLACK
    elif subscription.status == "past_due":
        slack = grace
    else:
        return False
    return subscription.period_end is None or now - subscription.period_end <= slack


def decision(scenario: Scenario, number: int, now: datetime) -> str:
    """The decision for this member. The order of the conditions is the documented order."""
    member = scenario.members[number]
    preference = member.preference or Preference()
    muted = preference.muted_until is not None and preference.muted_until > now

    if number == scenario.author:
        return "author"
    if scenario.private and not member.roles & scenario.channel_roles:
        return "no_channel_access"
    if not member.admin and not has_active_subscription(member.subscription, now, scenario.grace):
        return "no_subscription"
    if preference.level == "none":
        return "channel_off"
    if number in scenario.mentioned:
        return "mention"
    if member.roles & scenario.mentioned_roles and not muted:
        return "mention_role"
    if scenario.everyone and not muted:
        return "mention_everyone"
    if muted:
        return "muted"
    if preference.level == "mentions":
        return "mentions_only"
    return "message"


def decisions(scenario: Scenario, now: datetime) -> dict[int, str]:
    """The decisions for all members in the message's audience."""
    return {
        number: decision(scenario, number, now) for number in scenario.members if scenario.only_for in (None, number)
    }


def statistics(decided: dict[int, str]) -> dict:
    """The statistics of a run with these decisions. Decisions that no member got are included with 0."""
    counted = Counter(decided.values())
    return {
        "audience": len(decided),
        "notified": sum(counted[kind] for kind in NOTIFY_DECISIONS),
        "decisions": {kind: counted[kind] for kind in NOTIFY_DECISIONS + SILENT_DECISIONS},
    }
