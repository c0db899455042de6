"""Decisions: the SQL is compared with the oracle on random servers and at every boundary.

Each example is one transaction that is rolled back: inside it the database's `now()` is constant, so that a
boundary can be tested to the microsecond.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from belfry.core.db import db, execute, fetch_all, fetch_one
from belfry.fanout import runs
from belfry.fanout.decision import DECISIONS, DECISIONS_SQL, decision_for, load_fanout_message
from belfry.messages.explanation import explain
from models import SUBSCRIPTION_STATUSES
from tests.fanout_helpers import run_to_end
from tests.oracle import NOTIFY_DECISIONS, Member, Preference, Scenario, Subscription, decision, decisions, statistics
from tests.overrides import overridden

SERVER, OTHER_SERVER = 1, 2
CHANNEL, OTHER_CHANNEL = 11, 12
MESSAGE = 21
ROLES, ROLE_OF_OTHER_SERVER = (31, 32, 33), 39
STRANGERS = (1, 2)  # users who are not members of the server
MEMBERS = range(100, 200, 7)  # possible members; ids have gaps, as in production
LAST_ID = 2**63 - 1

DAY, MINUTE, INSTANT = timedelta(days=1), timedelta(minutes=1), timedelta(microseconds=1)
NEARLY = (-MINUTE, -INSTANT, timedelta(), INSTANT, MINUTE)


# A server in the database ---------------------------------------------------------------------------------


@contextmanager
def constant_time() -> Iterator[datetime]:
    """One transaction of the database, in which `now()` is constant, and which is rolled back."""
    with db.atomic() as transaction:
        found = fetch_one("SELECT now() AS now")
        assert found is not None
        yield found["now"]
        transaction.rollback()


def insert(table: str, records: list[dict[str, Any]]) -> None:
    """Insert any number of rows in one statement; a column that no record names has its default."""
    if records:
        columns = ", ".join(records[0])
        execute(
            f"INSERT INTO {table} ({columns})"
            f" SELECT {columns} FROM jsonb_populate_recordset(NULL::{table}, %(records)s)",
            {"records": Jsonb(records, dumps=_json)},
        )


def _json(value: Any) -> str:
    return json.dumps(value, default=datetime.isoformat)


def store(scenario: Scenario) -> None:
    """Insert a scenario, with its numbers as ids.

    Also insert rows that must have no effect: all members are in another server too, with a role there, and
    have switched off another channel.
    """
    members = scenario.members
    admins = {number: member.admin for number, member in members.items()}
    people = dict.fromkeys((*STRANGERS, *MEMBERS), False) | admins
    insert("user_account", [{"id": n, "username": f"user-{n}", "name": "U", "is_admin": people[n]} for n in people])
    insert(
        "subscription",
        [
            {"user_id": n, "status": member.subscription.status, "current_period_end": member.subscription.period_end}
            for n, member in members.items()
            if member.subscription
        ],
    )
    insert("server", [{"id": place, "name": f"server {place}"} for place in (SERVER, OTHER_SERVER)])
    roles = {**dict.fromkeys(ROLES, SERVER), ROLE_OF_OTHER_SERVER: OTHER_SERVER}
    insert("role", [{"id": id_, "server_id": place, "name": f"role-{id_}"} for id_, place in roles.items()])
    insert("member", [{"server_id": place, "user_id": n} for n in members for place in (SERVER, OTHER_SERVER)])
    insert(
        "member_role",
        [
            {"role_id": id_, "user_id": n, "server_id": roles[id_]}
            for n, member in members.items()
            for id_ in (*member.roles, ROLE_OF_OTHER_SERVER)
        ],
    )
    insert(
        "channel",
        [
            {"id": CHANNEL, "server_id": SERVER, "name": "this", "private": scenario.private, "posting": "members"},
            {"id": OTHER_CHANNEL, "server_id": SERVER, "name": "other", "private": False, "posting": "members"},
        ],
    )
    insert(
        "channel_role",
        [{"channel_id": CHANNEL, "role_id": id_, "server_id": SERVER} for id_ in scenario.channel_roles],
    )
    nothing = Preference("none")
    insert(
        "preference",
        [
            {"channel_id": channel, "user_id": n, "level": preference.level, "muted_until": preference.muted_until}
            for n, member in members.items()
            for channel, preference in ((CHANNEL, member.preference), (OTHER_CHANNEL, nothing))
            if preference
        ],
    )
    message = {"id": MESSAGE, "channel_id": CHANNEL, "author_id": scenario.author, "content": "content"}
    insert("message", [{**message, **mentions_of(scenario), "visible_to_user_id": scenario.only_for}])


def mentions_of(scenario: Scenario) -> dict[str, Any]:
    return {
        "mentioned_users": sorted(scenario.mentioned),
        "mentioned_roles": sorted(scenario.mentioned_roles),
        "mentions_everyone": scenario.everyone,
    }


def notified() -> dict[int, str]:
    return {found["user_id"]: found["reason"] for found in fetch_all("SELECT user_id, reason::text FROM notification")}


def run(kind: str, mention_diff: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fan the message out and return the run's statistics."""
    run_id = runs.create_run(MESSAGE, kind, mention_diff)
    assert run_to_end(run_id) == "succeeded"
    return runs.statistics(runs.find_run(run_id))


# Random servers -------------------------------------------------------------------------------------------


# Few choices for each member, each with many values, so that a few hundred examples differ.


def subscriptions(now: datetime) -> st.SearchStrategy[Subscription | None]:
    """Half of the subscriptions are active, some close to their end; some of the others have just ended."""
    ends = [None, now + 20 * DAY, now - DAY / 2, now - 3 * DAY, now - 400 * DAY]
    ends += [now - slack * DAY + off for slack in (0, 1, 7) for off in NEARLY]
    counting = [Subscription(status, end) for status in ("active", "trialing", "past_due") for end in ends]
    others = [Subscription(status, end) for status in SUBSCRIPTION_STATUSES for end in (None, now + DAY)]
    return st.sampled_from([*counting, *others, *[None] * 5])


def preferences(now: datetime) -> st.SearchStrategy[Preference | None]:
    mutes = [None, None, *(now + off for off in (*NEARLY, -DAY, DAY))]
    levels = ("all", "all", "mentions", "mentions", "none")
    choices = [Preference(level, until) for level in levels for until in mutes]
    return st.sampled_from([*choices, *[None] * 15])


SOME_ROLES = [frozenset(roles) for count in range(4) for roles in combinations(ROLES, count)]


def scenarios(now: datetime) -> st.SearchStrategy[Scenario]:
    anybody = st.sampled_from([*MEMBERS, *STRANGERS])
    some_roles = st.sampled_from(SOME_ROLES)
    member = st.builds(
        Member,
        admin=st.sampled_from([False] * 5 + [True]),
        subscription=subscriptions(now),
        roles=some_roles,
        preference=preferences(now),
    )
    return st.builds(
        Scenario,
        members=st.dictionaries(st.sampled_from(MEMBERS), member, min_size=6),
        author=anybody,
        private=st.sampled_from([False, False, True]),
        channel_roles=some_roles,
        mentioned=st.frozensets(anybody, max_size=6),
        mentioned_roles=st.sampled_from([frozenset(), *SOME_ROLES[:4]]),
        everyone=st.sampled_from([False, False, False, True]),
        only_for=st.sampled_from([None] * 20 + [*MEMBERS[:4], STRANGERS[0]]),
    )


RANDOM_SCENARIOS = settings(
    deadline=None,
    database=None,
    derandomize=True,  # the same examples each time, so that a failure is reproducible
    phases=[Phase.generate, Phase.shrink],
)


@settings(RANDOM_SCENARIOS, max_examples=175)
@given(st.data(), st.integers(1, 20))
def test_decisions_agree_with_the_oracle_for_any_slice_size(data, fanout_slice_size):
    with constant_time() as now, overridden(fanout_slice_size=fanout_slice_size):
        scenario = data.draw(scenarios(now))
        store(scenario)
        expected = decisions(scenario, now)
        expected_notifications = {number: reason for number, reason in expected.items() if reason in NOTIFY_DECISIONS}

        subject = load_fanout_message(MESSAGE)
        found = fetch_all(DECISIONS_SQL, subject.parameters(0, LAST_ID))
        decided = [(one["user_id"], one["decision"]) for one in found]
        assert sorted(decided) == sorted(expected.items())
        for number in (*scenario.members, *STRANGERS):
            assert decision_for(subject, number) == expected.get(number)

        counted = run("test" if scenario.only_for else "message")
        assert notified() == expected_notifications
        assert counted == {**statistics(expected), "inserted": len(expected_notifications), "retracted": 0}


@settings(RANDOM_SCENARIOS, max_examples=50)
@given(st.data())
def test_the_explanation_is_the_same_before_and_after_the_fan_out(data):
    with constant_time() as now:
        scenario = data.draw(scenarios(now))
        store(scenario)
        expected = decisions(scenario, now)
        before = {number: explain(None, MESSAGE, number) for number in expected}
        run("test" if scenario.only_for else "message")
        after = {number: explain(None, MESSAGE, number) for number in expected}
        for number, reason in expected.items():
            assert before[number]["decision"] == after[number]["decision"] == reason
            assert before[number]["notified_at"] is None
            assert after[number]["notified_at"] == (now if reason in NOTIFY_DECISIONS else None)
            assert after[number]["detail"].startswith(DECISIONS[reason])
            assert ("may no longer post" in after[number]["detail"]) == (not may_post(scenario))


def may_post(scenario: Scenario) -> bool:
    """Whether the author is an admin, or in the server with a role that opens the channel."""
    author = scenario.members.get(scenario.author)
    if scenario.only_for or (author and author.admin):
        return True
    return author is not None and (not scenario.private or bool(author.roles & scenario.channel_roles))


@settings(RANDOM_SCENARIOS, max_examples=100)
@given(st.data(), st.integers(1, 20))
def test_after_an_edit_the_notifications_are_those_of_the_new_text(data, fanout_slice_size):
    with constant_time() as now, overridden(fanout_slice_size=fanout_slice_size):
        first, other = data.draw(scenarios(now)), data.draw(scenarios(now))
        mentions = {name: getattr(other, name) for name in ("mentioned", "mentioned_roles", "everyone")}
        edited = replace(first, **mentions)
        store(first)
        run("message")
        before = notified()

        execute(
            "UPDATE message SET mentioned_users = %(mentioned_users)s::bigint[],"
            " mentioned_roles = %(mentioned_roles)s::bigint[], mentions_everyone = %(mentions_everyone)s",
            mentions_of(edited),
        )
        counted = run("edit", changes(first, edited))

        expected = decisions(edited, now)
        after = {number: reason for number, reason in expected.items() if reason in NOTIFY_DECISIONS}
        assert notified() == after
        inserted, retracted = after.keys() - before.keys(), before.keys() - after.keys()
        assert counted == {**statistics(expected), "inserted": len(inserted), "retracted": len(retracted)}


def changes(before: Scenario, after: Scenario) -> dict[str, Any]:
    return {
        "added_users": sorted(after.mentioned - before.mentioned),
        "added_roles": sorted(after.mentioned_roles - before.mentioned_roles),
        "added_everyone": after.everyone and not before.everyone,
        "removed_users": sorted(before.mentioned - after.mentioned),
        "removed_roles": sorted(before.mentioned_roles - after.mentioned_roles),
        "removed_everyone": before.everyone and not after.everyone,
    }


# Each rule, and each pair of consecutive rules ------------------------------------------------------------

MEMBER = MEMBERS[0]
AUTHOR = STRANGERS[0]
PAID = Subscription("active")


@dataclass
class Case:
    """One member of a scenario and the expected decision. `member` is called with the current time."""

    decision: str
    member: Callable[[datetime], Member]
    scenario: dict[str, Any]

    def check(self, **changed: Any) -> None:
        with constant_time() as now:
            options = {"author": AUTHOR, **self.scenario, **changed}
            scenario = Scenario({MEMBER: self.member(now)}, **options)
            assert decision(scenario, MEMBER, now) == self.decision, "the oracle itself is wrong"
            store(scenario)
            assert decision_for(load_fanout_message(MESSAGE), MEMBER) == self.decision


def subscriber(**preference: Any) -> Callable[[datetime], Member]:
    return lambda now: Member(subscription=PAID, preference=Preference(**preference) if preference else None)


def subscribed(status: str, end: timedelta | None) -> Callable[[datetime], Member]:
    return lambda now: Member(subscription=Subscription(status, None if end is None else now + end))


def muted(level: str = "all", until: timedelta = DAY, **member: Any) -> Callable[[datetime], Member]:
    return lambda now: Member(**{"subscription": PAID, "preference": Preference(level, now + until), **member})


def member_with(**member: Any) -> Callable[[datetime], Member]:
    return lambda now: Member(**{"subscription": PAID, **member})


MENTIONED = {"mentioned": frozenset({MEMBER})}
ROLE = frozenset({ROLES[0]})
MENTIONED_ROLE = {"mentioned_roles": ROLE}
EVERYONE = {"everyone": True}
ALL_MENTIONS = MENTIONED | MENTIONED_ROLE | EVERYONE
PRIVATE = {"private": True}
OWN_MESSAGE = {"author": MEMBER}
ONLY_MENTIONS, SWITCHED_OFF = Preference("mentions"), Preference("none")

CASES = {
    # the author
    "the author": ("author", subscriber(), OWN_MESSAGE),
    "an author who mentions themselves": ("author", member_with(roles=ROLE), OWN_MESSAGE | ALL_MENTIONS),
    "an author who is an admin": ("author", member_with(admin=True), OWN_MESSAGE),
    "author before no_channel_access": ("author", subscriber(), OWN_MESSAGE | PRIVATE),
    # access to the channel
    "a private channel without an opening role": ("no_channel_access", member_with(roles=ROLE), PRIVATE),
    "the role that opens a private channel": ("message", member_with(roles=ROLE), PRIVATE | {"channel_roles": ROLE}),
    "one of several opening roles is enough": (
        "message",
        member_with(roles=frozenset(ROLES[1:2])),
        PRIVATE | {"channel_roles": frozenset(ROLES)},
    ),
    "another role gives no access": (
        "no_channel_access",
        member_with(roles=frozenset(ROLES[1:])),
        PRIVATE | {"channel_roles": ROLE},
    ),
    "an admin needs an opening role too": ("no_channel_access", member_with(admin=True), PRIVATE),
    "opening roles do not restrict an open channel": ("message", subscriber(), {"channel_roles": ROLE}),
    "a mention gives no access": ("no_channel_access", member_with(roles=ROLE), PRIVATE | ALL_MENTIONS),
    "no_channel_access before no_subscription": ("no_channel_access", member_with(subscription=None), PRIVATE),
    # the subscription
    "no subscription at all": ("no_subscription", member_with(subscription=None), {}),
    "an admin needs no subscription": ("message", member_with(admin=True, subscription=None), {}),
    "an admin's subscription may have ended": (
        "message",
        member_with(admin=True, subscription=Subscription("canceled")),
        {},
    ),
    "no_subscription before channel_off": (
        "no_subscription",
        member_with(subscription=None, preference=SWITCHED_OFF),
        {},
    ),
    "a mention does not replace a subscription": (
        "no_subscription",
        member_with(subscription=None, roles=ROLE),
        ALL_MENTIONS,
    ),
    # the channel is switched off
    "switched off": ("channel_off", subscriber(level="none"), {}),
    "an admin can switch off as well": ("channel_off", member_with(admin=True, preference=SWITCHED_OFF), {}),
    "channel_off before mention": ("channel_off", member_with(roles=ROLE, preference=SWITCHED_OFF), ALL_MENTIONS),
    "channel_off before muted": ("channel_off", muted("none"), {}),
    # mentions
    "a mentioned user": ("mention", subscriber(), MENTIONED),
    "a mentioned user with the level mentions": ("mention", subscriber(level="mentions"), MENTIONED),
    "a mentioned user with a mute": ("mention", muted(), MENTIONED),
    "a mentioned user with a mute and the level mentions": ("mention", muted("mentions"), MENTIONED),
    "another mentioned user": ("message", subscriber(), {"mentioned": frozenset({MEMBERS[1], *STRANGERS})}),
    "mention before mention_role": ("mention", member_with(roles=ROLE), ALL_MENTIONS),
    "a mentioned role": ("mention_role", member_with(roles=ROLE), MENTIONED_ROLE),
    "another mentioned role": ("message", member_with(roles=frozenset(ROLES[1:])), MENTIONED_ROLE),
    "a mentioned role with the level mentions": (
        "mention_role",
        member_with(roles=ROLE, preference=ONLY_MENTIONS),
        MENTIONED_ROLE,
    ),
    "a mentioned role with a mute": ("muted", muted(roles=ROLE), MENTIONED_ROLE),
    "mention_role before mention_everyone": ("mention_role", member_with(roles=ROLE), MENTIONED_ROLE | EVERYONE),
    "everyone": ("mention_everyone", subscriber(), EVERYONE),
    "everyone with the level mentions": ("mention_everyone", subscriber(level="mentions"), EVERYONE),
    "everyone with a mute": ("muted", muted(), EVERYONE),
    # mutes
    "muted": ("muted", muted(), {}),
    "muted for one more microsecond": ("muted", muted(until=INSTANT), {}),
    "a mute that ends now has ended": ("message", muted(until=timedelta()), {}),
    "a mute that ended": ("message", muted(until=-INSTANT), {}),
    "a mentioned role after a mute that ended": ("mention_role", muted(until=-INSTANT, roles=ROLE), MENTIONED_ROLE),
    "muted before mentions_only": ("muted", muted("mentions"), {}),
    # the level
    "mentions only, and not mentioned": ("mentions_only", subscriber(level="mentions"), {}),
    "the level mentions after a mute that ended": ("mentions_only", muted("mentions", until=-INSTANT), {}),
    "the level all": ("message", subscriber(level="all"), {}),
    "no preference row means the level all": ("message", subscriber(), {}),
    "another user is the author": ("message", subscriber(), {"author": STRANGERS[1]}),
}


@pytest.mark.parametrize("case", [Case(*case) for case in CASES.values()], ids=list(CASES))
def test_decision(case):
    case.check()


ENTITLED, NOT = "message", "no_subscription"
SUBSCRIPTIONS = [
    *(
        (status, end, expected)
        for status in ("active", "trialing")
        for end, expected in (
            (None, ENTITLED),
            (20 * DAY, ENTITLED),
            (timedelta(), ENTITLED),
            (-DAY + MINUTE, ENTITLED),
            (-DAY, ENTITLED),
            (-DAY - INSTANT, NOT),
            (-DAY - MINUTE, NOT),
            (-400 * DAY, NOT),
        )
    ),
    ("past_due", None, ENTITLED),
    ("past_due", 20 * DAY, ENTITLED),
    ("past_due", -DAY - MINUTE, ENTITLED),
    ("past_due", -7 * DAY + MINUTE, ENTITLED),
    ("past_due", -7 * DAY, ENTITLED),
    ("past_due", -7 * DAY - INSTANT, NOT),
    ("past_due", -7 * DAY - MINUTE, NOT),
    *(
        (status, end, NOT)
        for status in ("canceled", "unpaid", "incomplete", "incomplete_expired", "paused")
        for end in (None, 20 * DAY)
    ),
]


@pytest.mark.parametrize(
    ("status", "end", "expected"),
    SUBSCRIPTIONS,
    ids=[f"{status}-{end}-{decided}" for status, end, decided in SUBSCRIPTIONS],
)
def test_subscription(status, end, expected):
    Case(expected, subscribed(status, end), {}).check()


def test_the_cases_have_every_status_and_every_decision():
    assert {status for status, _, _ in SUBSCRIPTIONS} == set(SUBSCRIPTION_STATUSES)
    assert {expected for expected, _, _ in CASES.values()} == set(DECISIONS)


@pytest.mark.parametrize("days", [0, 1, 30])
def test_the_grace_period_is_configurable(override, days):
    override(past_due_grace_days=days)
    grace = timedelta(days=days)
    Case(ENTITLED, subscribed("past_due", -grace), {}).check(grace=grace)
    Case(NOT, subscribed("past_due", -grace - INSTANT), {}).check(grace=grace)
    Case(ENTITLED, subscribed("active", -DAY), {}).check(grace=grace)
    Case(NOT, subscribed("active", -DAY - INSTANT), {}).check(grace=grace)


def test_a_test_message_for_one_user_has_an_audience_of_one():
    with constant_time() as now:
        scenario = Scenario(
            {number: Member(subscription=PAID) for number in MEMBERS}, author=AUTHOR, only_for=MEMBER, everyone=True
        )
        store(scenario)
        assert run("test")["audience"] == 1
        assert notified() == {MEMBER: "mention_everyone"} == decisions(scenario, now)
        assert decision_for(load_fanout_message(MESSAGE), MEMBERS[1]) is None
