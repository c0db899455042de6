"""Whom one may mention in a channel, as one types."""

import pytest

from belfry.core.db import execute, fetch_all
from belfry.messages import suggestions
from belfry.servers import servers
from belfry.servers.visibility import get_visible_channel
from tests.fanout_helpers import statements
from tests.people import make_person
from tests.web.test_errors import assert_problem


@pytest.fixture(autouse=True, params=["few", "many"])
def _how_many(request, override):
    """Each test as in a small community, and as in one that is walked by name."""
    if request.param == "many":
        override(suggestion_small_audience=0)


@pytest.fixture
def names(api, cast):
    """`names(person, "prefix", channel_id)`: the usernames that they are offered."""

    def ask(person, prefix="", channel_id=None, **query):
        path = f"/api/channels/{channel_id or cast.general}/mention-suggestions"
        answer = api(person).get(path, query_string={"q": prefix, **query})
        assert answer.status_code == 200
        assert answer.json["next"] is None
        return [item["username"] for item in answer.json["items"]]

    return ask


def test_members_are_found_by_the_beginning_of_their_username(cast, names):
    assert names(cast.subscriber, "") == ["ada", "lars", "moira", "sam", "vera"]
    assert names(cast.subscriber, "v") == names(cast.subscriber, "VE") == ["vera"]
    for nobody in ("x", "era", "%", "v_ra", "vera~", "ü", "\\", "'"):
        assert names(cast.subscriber, nobody) == []


def test_punctuation_is_part_of_a_beginning(cast, names):
    for username in ("a-b", "a.b", "a_b", "ab0", "a0b", "abz"):
        servers.put_member(cast.server_id, make_person(username).id)
    assert names(cast.subscriber, "a") == ["a-b", "a.b", "a0b", "a_b", "ab0", "abz", "ada"]
    assert names(cast.subscriber, "a-") == ["a-b"]
    assert names(cast.subscriber, "ab") == ["ab0", "abz"]


def test_an_item_says_who_it_is(api, cast):
    answer = api(cast.subscriber).get(f"/api/channels/{cast.general}/mention-suggestions?q=vera")
    assert answer.json["items"] == [{"kind": "user", "id": cast.vip.id, "username": "vera", "name": "Vera"}]


def test_strangers_are_not_offered_nor_who_cannot_see_the_channel(cast, names):
    assert names(cast.vip, "s") == ["sam"]
    assert names(cast.vip, "", cast.vault) == ["vera"]
    assert names(cast.admin, "s", cast.vault) == []


def test_groups_are_offered_to_those_who_may_ping_them(api, cast, names):
    assert names(cast.subscriber, "e") == []
    for person in (cast.moderator, cast.admin):
        assert names(person, "e") == ["everyone"]
        assert names(person, "V") == ["vip", "vera"]
        assert names(person) == ["everyone", "moderators", "vip", "ada", "lars", "moira", "sam", "vera"]
    items = api(cast.admin).get(f"/api/channels/{cast.general}/mention-suggestions?q=v").json["items"]
    assert [(item["kind"], item["id"]) for item in items] == [("role", cast.vip_role), ("user", cast.vip.id)]


def test_so_many_and_no_more(api, cast, names):
    assert names(cast.admin, limit=2) == ["everyone", "moderators"]
    assert len(names(cast.admin)) == 8
    for query in ("limit=0", "limit=51", "limit=x", "q=" + "a" * 33, "q=%00", "name=a"):
        assert_problem(api(cast.admin).get(f"/api/channels/{cast.general}/mention-suggestions?{query}"), 422, "invalid")


def test_it_takes_as_many_statements_however_many_there_are(api, cast):
    for person, most in ((cast.subscriber, 3), (cast.admin, 4)):
        with statements() as said:
            api(person).get(f"/api/channels/{cast.general}/mention-suggestions?q=s")
        assert len(said) == most


def test_who_has_two_roles_that_open_a_channel_is_offered_once(api, cast, names):
    api(cast.admin).put(
        f"/api/channels/{cast.vault}/roles", json={"role_ids": [cast.vip_role, cast.moderators_role]}
    )
    servers.put_member(cast.server_id, cast.vip.id, [cast.vip_role, cast.moderators_role])
    assert names(cast.vip, "v", cast.vault) == ["vip", "vera"]


def test_no_account_is_looked_at_but_by_an_index(cast):
    execute(
        "INSERT INTO user_account (username, name) SELECT 'member-' || n, 'Member' FROM generate_series(1, 5000) AS n"
    )
    execute(
        "INSERT INTO member (server_id, user_id) SELECT %(id)s, id FROM user_account ON CONFLICT DO NOTHING",
        {"id": cast.server_id},
    )
    execute("ANALYZE user_account, member")
    for channel_id in (cast.general, cast.vault):
        with statements() as said:
            suggestions.suggest_mentions(get_visible_channel(cast.vip.user, channel_id), "member-12", 8)
        parameters = {"prefix": "member-12", "beyond": "member-12~", "server_id": cast.server_id, "limit": 8}
        plan = " ".join(
            line["QUERY PLAN"] for line in fetch_all("EXPLAIN " + said[-1], {**parameters, "channel_id": channel_id})
        )
        assert "Index Cond: ((username >= 'member-12'::text) AND (username < 'member-12~'::text))" in plan
        assert "Seq Scan on user_account" not in plan
