"""The search finds messages that the user can see, by their words."""

import pytest

from belfry.core.db import execute, fetch_all
from belfry.messages.search import search
from belfry.messages.send_test import send_test
from tests.fanout_helpers import post


def found(person, query: str, **restrictions) -> list[str]:
    options = {"channel_id": None, "before": None, "limit": 50} | restrictions
    return [one["content"] for one in search(person.user, query, **options)]


@pytest.fixture
def texts(cast):
    for content in ("Gold breaks out above 2,075", "silver is quiet", "GOLD and silver: two metals", "nothing"):
        post(cast.subscriber, cast.general, content)


def test_words_are_found_in_any_case_the_newest_first(cast, texts):
    assert found(cast.vip, "gold") == ["GOLD and silver: two metals", "Gold breaks out above 2,075"]
    assert found(cast.vip, "gold silver") == ["GOLD and silver: two metals"]
    assert found(cast.vip, "gold -silver") == ["Gold breaks out above 2,075"]
    assert found(cast.vip, '"breaks out"') == ["Gold breaks out above 2,075"]
    assert found(cast.vip, "nothing or quiet") == ["nothing", "silver is quiet"]
    assert found(cast.vip, "platinum") == []


def test_pages_continue_before_the_last_message(cast, texts):
    (newest,) = search(cast.vip.user, "gold", channel_id=None, before=None, limit=1)
    assert found(cast.vip, "gold", before=newest["id"]) == ["Gold breaks out above 2,075"]


def test_only_visible_messages_are_found(cast, api):
    post(cast.vip, cast.vault, "secret gold")
    send_test(cast.admin.user, cast.general, "gold for the admin", "me")
    message_id, _ = post(cast.subscriber, cast.general, "deleted gold")
    api(cast.subscriber).delete(f"/api/messages/{message_id}")
    assert found(cast.subscriber, "gold") == []
    assert found(cast.vip, "gold") == ["secret gold"]
    assert found(cast.admin, "gold") == ["gold for the admin", "secret gold"]
    assert found(cast.stranger, "gold") == []
    assert found(cast.vip, "gold", channel_id=cast.general) == []


@pytest.mark.parametrize("query", ["'", '"', "a & | !", "-", "((", "\\", "%", ":*", "a" * 200, "ä ß 漢字", "<script>"])
def test_any_query_is_accepted(cast, texts, query):
    assert isinstance(found(cast.vip, query), list)


def test_the_api_pages_and_refuses_invalid_queries(api, cast, texts):
    page = api(cast.vip).get("/api/messages/search?q=gold&limit=1").get_json()
    assert [one["content"] for one in page["items"]] == ["GOLD and silver: two metals"]
    rest = api(cast.vip).get(f"/api/messages/search?q=gold&limit=1&cursor={page['next']}").get_json()
    assert [one["content"] for one in rest["items"]] == ["Gold breaks out above 2,075"]
    assert rest["next"] is None
    for query in ("", "q=", f"q={'a' * 201}", "q=a%00b"):
        assert api(cast.vip).get(f"/api/messages/search?{query}").status_code == 422
    assert api(cast.subscriber).get(f"/api/messages/search?q=a&channel_id={cast.vault}").status_code == 404


def test_a_rare_word_is_found_by_the_index(cast):
    execute(
        "INSERT INTO message (channel_id, author_id, content) SELECT %(channel)s, %(author)s, 'word ' || number"
        " FROM generate_series(1, 20000) AS number",
        {"channel": cast.general, "author": cast.subscriber.id},
    )
    execute("ANALYZE message")
    plan = fetch_all(
        "EXPLAIN SELECT id FROM message msg WHERE to_tsvector('simple', msg.content)"
        " @@ websearch_to_tsquery('simple', '17011') ORDER BY id DESC LIMIT 50"
    )
    assert any("message_words" in row["QUERY PLAN"] for row in plan)
    assert found(cast.vip, "17011") == ["word 17011"]
