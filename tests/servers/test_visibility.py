"""The plans of the statements that contain the rules of visibility and subscription, on a large server."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from belfry.core.db import execute, fetch_all
from belfry.inbox import inbox
from belfry.messages import explanation, messages
from belfry.servers import visibility
from belfry.stream import updates
from models import User
from tests.fanout_helpers import executed_statements, post_and_notify

MEMBERS = 20_000
LARGE_TABLES = {"user_account", "subscription", "member", "member_role", "channel_role"}


@pytest.fixture
def large_server(cast) -> None:
    """MEMBERS more members with subscriptions and roles, and 2,000 private channels that the role opens."""
    execute(
        """
        WITH people AS (
            INSERT INTO user_account (username, name)
            SELECT 'crowd-' || n, 'One of many' FROM generate_series(1, %(members)s) AS n
            RETURNING id
        ),
        subscribed AS (INSERT INTO subscription (user_id, status) SELECT id, 'active' FROM people)
        INSERT INTO member (server_id, user_id) SELECT %(server_id)s, id FROM people
        """,
        {"members": MEMBERS, "server_id": cast.server_id},
    )
    execute(
        """
        WITH opened AS (
            INSERT INTO channel (server_id, name, private)
            SELECT %(server_id)s, 'channel-' || n, true FROM generate_series(1, 2000) AS n
            RETURNING id
        ),
        given AS (
            INSERT INTO member_role (role_id, user_id, server_id)
            SELECT %(role_id)s, user_id, server_id FROM member ON CONFLICT DO NOTHING
        )
        INSERT INTO channel_role (channel_id, role_id, server_id) SELECT id, %(role_id)s, %(server_id)s FROM opened
        """,
        {"server_id": cast.server_id, "role_id": cast.vip_role},
    )
    execute("ANALYZE")


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


def full_scans(call: Callable[[], object]) -> set[str]:
    """The large tables that a statement of `call` reads from the beginning to the end."""
    with executed_statements() as executed:
        call()
    assert executed
    found = set()
    for sql, parameters in executed:
        if sql.lstrip().startswith(("SELECT", "WITH")):
            (plan,) = fetch_all(f"EXPLAIN (FORMAT JSON) {sql}", parameters)[0]["QUERY PLAN"]
            for node in nodes(plan["Plan"]):
                if node.get("Relation Name") in LARGE_TABLES and node["Node Type"] == "Seq Scan":
                    found.add(node["Relation Name"])
    return found


STATEMENTS = {
    "a channel": lambda cast, user, _: visibility.get_visible_channel(user, cast.vault),
    "the channels": lambda cast, user, _: visibility.visible_channels(user, limit=50),
    "notifications in a channel": lambda cast, user, _: visibility.receives_notifications_in(user, cast.vault),
    "the author": lambda cast, user, message_id: visibility.author_can_post(message_id),
    "the inbox": lambda cast, user, _: inbox.list_notifications(user, before=None, limit=50),
    "the unread counts": lambda cast, user, _: inbox.unread_count(user),
    "mark as read": lambda cast, user, _: inbox.mark_all_read(user),
    "a post": lambda cast, user, _: messages.post_message(user, cast.vault, "gold, @sam"),
    "an explanation": lambda cast, user, message_id: explanation.explain(user, message_id, user.id),
    "the clients of the stream": lambda cast, user, _: updates.authorized_clients([b"0" * 32]),
}


@pytest.mark.parametrize("what", STATEMENTS)
def test_the_rules_look_up_rows_by_their_keys(cast, large_server, what):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    for person in (cast.vip, cast.admin):
        user = User.get_by_id(person.id)
        assert full_scans(lambda user=user: STATEMENTS[what](cast, user, message_id)) == set()
