"""Mention suggestions: which users, roles and groups are offered for a prefix in a channel."""

import pytest

from belfry.core.db import execute, fetch_all
from belfry.messages import suggestions
from belfry.servers import servers
from belfry.servers.visibility import get_visible_channel
from tests.fanout_helpers import statements
from tests.people import make_person
from tests.web.test_errors import assert_problem


@pytest.fixture(autouse=True, params=["few", "many"])
def _audience_size(request, override):
    """Run each test with the query for small audiences and with the query that walks the index of usernames."""
    if request.param == "many":
        override(suggestion_small_audience=0)


@pytest.fixture
def names(api, cast):
    """`names(person, "prefix", channel_id)`: the names that are offered to this user."""

    def suggest(person, prefix="", channel_id=None, **query):
        path = f"/api/channels/{channel_id or cast.general}/mention-suggestions"
        response = api(person).get(path, query_string={"q": prefix, **query})
        assert response.status_code == 200
        assert response.json["next"] is None
        return [item["username"] for item in response.json["items"]]

    return suggest


def test_members_are_found_by_a_prefix_of_their_username(cast, names):
    assert names(cast.subscriber, "") == ["ada", "lars", "moira", "sam", "vera"]
    assert names(cast.subscriber, "v") == names(cast.subscriber, "VE") == ["vera"]
    for prefix in ("x", "era", "%", "v_ra", "vera~", "ü", "\\", "'"):
        assert names(cast.subscriber, prefix) == []


def test_a_prefix_can_contain_punctuation(cast, names):
    for username in ("a-b", "a.b", "a_b", "ab0", "a0b", "abz"):
        servers.put_member(cast.server_id, make_person(username).id)
    assert names(cast.subscriber, "a") == ["a-b", "a.b", "a0b", "a_b", "ab0", "abz", "ada"]
    assert names(cast.subscriber, "a-") == ["a-b"]
    assert names(cast.subscriber, "ab") == ["ab0", "abz"]


def test_a_user_item_has_kind_id_username_and_name(api, cast):
    response = api(cast.subscriber).get(f"/api/channels/{cast.general}/mention-suggestions?q=vera")
    assert response.json["items"] == [{"kind": "user", "id": cast.vip.id, "username": "vera", "name": "Vera"}]


def test_only_members_who_can_see_the_channel_are_offered(cast, names):
    assert names(cast.vip, "s") == ["sam"]
    assert names(cast.vip, "", cast.vault) == ["vera"]
    assert names(cast.admin, "s", cast.vault) == []


def test_groups_are_offered_only_to_users_who_may_mention_them(api, cast, names):
    assert names(cast.subscriber, "e") == []
    for person in (cast.moderator, cast.admin):
        assert names(person, "e") == ["everyone"]
        assert names(person, "V") == ["vip", "vera"]
        assert names(person) == ["everyone", "moderators", "vip", "ada", "lars", "moira", "sam", "vera"]
    items = api(cast.admin).get(f"/api/channels/{cast.general}/mention-suggestions?q=v").json["items"]
    assert [(item["kind"], item["id"]) for item in items] == [("role", cast.vip_role), ("user", cast.vip.id)]


def test_the_number_of_suggestions_is_limited(api, cast, names):
    assert names(cast.admin, limit=2) == ["everyone", "moderators"]
    assert len(names(cast.admin)) == 8
    for query in ("limit=0", "limit=51", "limit=x", "q=" + "a" * 33, "q=%00", "name=a"):
        assert_problem(api(cast.admin).get(f"/api/channels/{cast.general}/mention-suggestions?{query}"), 422, "invalid")


def test_suggestions_take_a_fixed_number_of_statements(api, cast):
    for person, most in ((cast.subscriber, 3), (cast.admin, 4)):
        with statements() as executed:
            api(person).get(f"/api/channels/{cast.general}/mention-suggestions?q=s")
        assert len(executed) == most


def test_a_member_with_two_roles_that_open_the_channel_is_offered_once(api, cast, names):
    api(cast.admin).put(
        f"/api/channels/{cast.vault}/roles", json={"role_ids": [cast.vip_role, cast.moderators_role]}
    )
    servers.put_member(cast.server_id, cast.vip.id, [cast.vip_role, cast.moderators_role])
    assert names(cast.vip, "v", cast.vault) == ["vip", "vera"]


def test_accounts_are_read_only_by_an_index(cast):
    execute(
        "INSERT INTO user_account (username, name) SELECT 'member-' || n, 'Member' FROM generate_series(1, 5000) AS n"
    )
    execute(
        "INSERT INTO member (server_id, user_id) SELECT %(id)s, id FROM user_account ON CONFLICT DO NOTHING",
        {"id": cast.server_id},
    )
    execute("ANALYZE user_account, member")
    for channel_id in (cast.general, cast.vault):
        with statements() as executed:
            suggestions.suggest_mentions(get_visible_channel(cast.vip.user, channel_id), "member-12", 8)
        parameters = {"prefix": "member-12", "beyond": "member-12~", "server_id": cast.server_id, "limit": 8}
        plan = " ".join(
            line["QUERY PLAN"]
            for line in fetch_all("EXPLAIN " + executed[-1], {**parameters, "channel_id": channel_id})
        )
        assert "Index Cond: ((username >= 'member-12'::text) AND (username < 'member-12~'::text))" in plan
        assert "Seq Scan on user_account" not in plan
