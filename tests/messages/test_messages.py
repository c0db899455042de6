"""Messages: posting, idempotency keys, listing, editing and deleting."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Barrier
from typing import Any

import psycopg
import pytest
from redis.connection import AbstractConnection

from belfry.identity import subscriptions, tokens, users
from belfry.messages import messages
from belfry.queue import queues
from belfry.servers import servers
from models import ApiToken, IdempotencyKey, Message, Run
from tests.fanout_helpers import generic_plans
from tests.web.test_errors import assert_problem

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture
def post(api, cast):
    """`post("text", author, channel_id, key="...", ...)`: the response to a post, by default by sam in #general."""

    def message(content, author=None, channel_id=None, key=None, **members):
        return api(author or cast.subscriber).post(
            "/api/messages",
            json={"channel_id": channel_id or cast.general, "content": content, **members},
            headers={"Idempotency-Key": key} if key else None,
        )

    return message


# Posting --------------------------------------------------------------------------------------------------


def test_the_response_to_a_post_is_as_documented(cast, post):
    response = post("gold breaks out, @moira, @bobby")
    message = response.get_json()
    created_at, number, run = message["created_at"], message["id"], message["run"]["id"]
    expected = {
        "id": number, "channel_id": cast.general,
        "author": {"id": cast.subscriber.id, "username": "sam", "name": "Sam"},
        "content": "gold breaks out, @moira, @bobby", "created_at": created_at, "edited_at": None,
        "mentions": {"users": [{"id": cast.moderator.id, "username": "moira"}], "roles": [], "everyone": False},
        "warnings": [{"code": "unknown_mention", "detail": "@bobby is not a member of this server"}],
        "run": {"id": run, "state": "queued", "url": f"/api/runs/{run}"},
    }  # fmt: skip
    assert json.dumps(message) == json.dumps(expected)  # including the order of the fields
    assert TIME.fullmatch(created_at)
    assert (response.status_code, response.mimetype) == (201, "application/json")
    assert response.headers["Location"] == f"/api/messages/{number}"
    assert "Idempotency-Replayed" not in response.headers


def test_a_stored_message_equals_the_response_to_its_post_without_warnings(api, cast, post):
    posted = post("@moira @bobby").get_json()
    del posted["warnings"]
    assert json.dumps(api(cast.subscriber).get(f"/api/messages/{posted['id']}").get_json()) == json.dumps(posted)
    assert api(cast.vip).get(f"/api/messages/{posted['id']}").get_json() == {**posted, "run": None}
    assert api(cast.vip).get(f"/api/channels/{cast.general}/messages").get_json() == {
        "items": [{**posted, "run": None}],
        "next": None,
    }


def test_only_moderators_can_mention_groups(api, cast, post):
    mentioned = post("@everyone and @vip", cast.moderator).get_json()
    assert mentioned["mentions"] == {"users": [], "roles": [{"id": cast.vip_role, "name": "vip"}], "everyone": True}
    assert mentioned["warnings"] == []
    refused = post("@everyone and @vip").get_json()
    assert refused["mentions"] == {"users": [], "roles": [], "everyone": False}
    assert [warning["code"] for warning in refused["warnings"]] == ["mention_not_allowed"] * 2


def test_a_user_who_cannot_see_the_channel_is_not_mentioned(cast, post):
    response = post("@sam, @ada, @stan", cast.vip, cast.vault).get_json()
    assert response["mentions"]["users"] == []  # an admin sees the vault, but only a role gives notifications
    codes = [warning["code"] for warning in response["warnings"]]
    assert codes == ["mention_without_access", "mention_without_access", "unknown_mention"]


def test_warnings_about_many_unknown_names_are_truncated(api, cast, post):
    content = " ".join(f"@{number:04}" for number in range(1_600))
    response = post(content, key="many-names")
    assert response.status_code == 201
    assert response.get_json()["warnings"][20:] == [
        {"code": "more_warnings", "detail": "1580 more warnings are not shown"}
    ]
    stored = len(IdempotencyKey.get().response)
    edited = api(cast.subscriber).patch(f"/api/messages/{response.get_json()['id']}", json={"content": content + "!"})
    assert len(edited.get_json()["warnings"]) == 21
    for size in (stored, len(response.data), len(edited.data)):
        assert size < len(content) + 3_000


def test_the_author_is_warned_when_the_mentions_of_a_text_cannot_be_parsed(api, cast, post):
    unreadable = "@vera " + "![![a](b" * 1_200
    response = post(unreadable)
    assert response.status_code == 201
    path = f"/api/messages/{response.get_json()['id']}"
    edited = api(cast.subscriber).patch(path, json={"content": unreadable + "!"})
    for message in (response.get_json(), edited.get_json()):
        assert message["mentions"] == {"users": [], "roles": [], "everyone": False}
        assert [warning["code"] for warning in message["warnings"]] == ["mentions_not_read"]
    assert "remove markup" in message["warnings"][0]["detail"]


def test_allowed_mentions_only_restrict_mentions(cast, post):
    text, no_mentions = "@sam @vera @vip @moderators @everyone", {"users": [], "roles": [], "everyone": False}
    nothing = post(text, cast.admin, allowed_mentions={}).get_json()
    assert nothing["mentions"] == no_mentions
    assert nothing["warnings"] == []
    some = {"users": [cast.subscriber.id, cast.lapsed.id, 999], "roles": [cast.vip_role, 999], "everyone": False}
    assert post(text, cast.admin, allowed_mentions=some).get_json()["mentions"] == {
        "users": [{"id": cast.subscriber.id, "username": "sam"}],
        "roles": [{"id": cast.vip_role, "name": "vip"}],
        "everyone": False,
    }
    wide = {"users": [cast.vip.id], "roles": [cast.vip_role], "everyone": True}
    assert post("nobody is named", cast.admin, allowed_mentions=wide).get_json()["mentions"] == no_mentions
    assert post("@everyone @vip", allowed_mentions=wide).get_json()["mentions"] == no_mentions
    assert len(post(text, cast.admin, allowed_mentions=None).get_json()["mentions"]["users"]) == 2


def test_content_is_trimmed_and_otherwise_unchanged(post):
    for content in (
        "a", "two\n\n  lines", "日本語 עברית العربية", "\U0001f469\u200d\U0001f469 e\u0301 \u202eto the left\u202c",
        "\ufeff\u200bzero", "\x01\x7f", "\\u0000 \\", "'; DROP TABLE message; --", "<script>alert(1)</script>",
        "{{ 7 * 7 }} ${7*7} %s %(id)s {0}",
    ):  # fmt: skip
        assert post(f" \t\r\n\u00a0{content}\u2003\n").get_json()["content"] == content


def test_content_is_limited_to_ten_thousand_characters(post):
    for longest in ("x" * 10_000, " " + "語" * 10_000 + " "):
        assert post(longest).get_json()["content"] == longest.strip()
    for content in ("x" * 10_001, "", "  \n\u2003", "a\0b"):
        assert list(assert_problem(post(content), 422, "invalid")["errors"]) == ["content"]


def test_characters_outside_the_basic_multilingual_plane_count_once(api, cast):
    body = json.dumps({"channel_id": cast.general, "content": "😀" * 10_000}, ensure_ascii=False)
    response = api(cast.subscriber).post("/api/messages", data=body.encode(), content_type="application/json")
    assert response.get_json()["content"] == "😀" * 10_000


@pytest.fixture
def round_trips(monkeypatch):
    """What is sent to PostgreSQL and Redis from here on: {"sql": statements, "redis": number of round trips}."""
    sent: dict[str, Any] = {"sql": [], "redis": 0}
    execute, send = psycopg.Cursor.execute, AbstractConnection.send_packed_command

    def counted_execute(self, query, *arguments, **named):
        sent["sql"].append(" ".join(query.split()[:2]))
        return execute(self, query, *arguments, **named)

    def counted_send(self, *arguments, **named):
        sent["redis"] += 1
        return send(self, *arguments, **named)

    monkeypatch.setattr(psycopg.Cursor, "execute", counted_execute)
    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted_send)
    return sent


def test_a_post_takes_one_statement_and_two_round_trips_to_redis(post, round_trips):
    post("the first post connects and loads the user")
    round_trips |= {"sql": [], "redis": 0}
    assert post("gold").status_code == 201
    assert round_trips == {"sql": ["WITH viewer"], "redis": 2}
    round_trips |= {"sql": [], "redis": 0}
    post("gold", key="once")
    with_key = ["SELECT usr.id,", "BEGIN TRANSACTION", "SELECT pg_try_advisory_xact_lock(hashtextextended(%(name)s,",
                "SELECT request_hash,", "WITH viewer", "INSERT INTO", "COMMIT"]  # fmt: skip
    assert round_trips == {"sql": with_key, "redis": 2}
    round_trips |= {"sql": [], "redis": 0}
    post("gold, @moira")
    assert (len(round_trips["sql"]), round_trips["redis"]) == (5, 2)


def request_counts(redis, person) -> dict[bytes, bytes]:
    """{rate limit: number of requests that are counted for a user}."""
    keys = redis.keys(f"LIMITER/*user:{person.id}/*")
    assert keys
    return {key: redis.hget(key, "count") for key in keys}


@pytest.mark.parametrize("change", [{"revoked_at": datetime.now(UTC)}, {"expires_at": datetime.now(UTC)}])
@pytest.mark.parametrize(("content", "key"), [("gold", None), ("gold, @moira", None), ("gold", "once")])
def test_an_ended_token_is_rejected_although_its_user_is_cached(cast, post, redis, change, content, key):
    assert post(content, key=key).status_code == 201
    ApiToken.update(change).where(ApiToken.user == cast.subscriber.id).execute()
    response = post(content, key=key)
    assert_problem(response, 401, "unauthenticated")
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    counted = request_counts(redis, cast.subscriber)
    post(content, key=key)
    assert request_counts(redis, cast.subscriber) == counted, "a request with an ended token is not counted"
    assert Message.select().count() == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("POST", {"json": {}}),
        ("POST", {"data": "gold"}),
        ("POST", {"json": {"channel_id": 1, "content": "gold"}, "headers": {"Idempotency-Key": "é"}}),
        ("OPTIONS", {}),
    ],
)
def test_requests_with_a_revoked_token_are_not_counted_for_its_user(api, cast, post, redis, method, options):
    assert post("gold").status_code == 201
    ApiToken.update(revoked_at=datetime.now(UTC)).where(ApiToken.user == cast.subscriber.id).execute()
    api(cast.subscriber).open(method, "/api/messages", **options)  # counted: the revocation is not known yet
    counted = request_counts(redis, cast.subscriber)
    for _ in range(3):
        response = api(cast.subscriber).open(method, "/api/messages", **options)
        assert response.status_code == (200 if method == "OPTIONS" else 401)
    assert request_counts(redis, cast.subscriber) == counted


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"data": b"{", "content_type": "application/json"}, 400),
        ({"data": b"{}", "content_type": "text/plain"}, 415),
        ({"data": b"x" * 70_000, "content_type": "application/json"}, 413),
        ({"json": {"content": 7}}, 422),
        ({"json": {"channel_id": 1, "content": "x"}, "headers": {"Idempotency-Key": "ü"}}, 422),
    ],
)
def test_a_revoked_token_is_reported_before_an_invalid_body(api, cast, post, arguments, status):
    sam = api(cast.subscriber)
    for _ in range(2):
        assert post("gold").status_code == 201  # sam's token is cached from here on
        assert sam.post("/api/messages", **arguments).status_code == status
    assert post("gold").status_code == 201
    ApiToken.update(revoked_at=datetime.now(UTC)).where(ApiToken.user == cast.subscriber.id).execute()
    assert sam.post("/api/messages", **arguments).status_code == 401


def test_the_rights_and_the_name_of_a_user_are_not_cached(cast, post):
    assert post("gold", cast.admin, cast.announcements).status_code == 201
    users.update_user(cast.admin.id, {"name": "Ada L."})
    assert post("gold", cast.admin).get_json()["author"]["name"] == "Ada L."
    users.update_user(cast.admin.id, {"is_admin": False})
    for content in ("gold", "gold, @moira"):
        assert_problem(post(content, cast.admin, cast.announcements), 403, "forbidden")
        assert_problem(post(content, cast.admin, cast.vault), 404, "not_found")


def test_the_token_cache_is_bounded(cast, post, override):
    override(token_cache_size=2)
    for person in (cast.admin, cast.subscriber, cast.moderator, cast.vip):
        assert post("gold", person).status_code == 201
        assert tokens.cached_user(tokens.hash_token(person.token)).id == person.id
    assert tokens.cached_user(tokens.hash_token(cast.admin.token)) is None


def test_a_post_uses_a_generic_plan(cast):
    """Also for an admin, whose permission needs fewer conditions."""
    for author in (cast.admin.user, cast.subscriber.user):
        post_one = partial(messages.post_message, author, cast.general, "gold")
        assert generic_plans(post_one, "INSERT INTO message") == [10]


def test_a_refused_post_writes_nothing_with_or_without_mentions(api, cast, post):
    for content in ("gold", "gold, @moira and @bobby"):
        for key in (None, "once"):
            assert_problem(post(content, cast.subscriber, cast.announcements, key), 403, "forbidden")
            assert_problem(post(content, cast.lapsed, key=key), 403, "subscription_required")
            assert_problem(post(content, cast.subscriber, cast.vault, key), 404, "not_found")
            assert_problem(post(content, cast.subscriber, 999, key), 404, "not_found")
    assert (Message.select().count(), Run.select().count(), queues.queue().count) == (0, 0, 0)


def test_a_post_conflicts_when_the_permission_is_granted_during_the_request(cast, post, monkeypatch):
    real = messages.get_visible_channel

    def channel_for(user, channel_id):
        subscriptions.set_subscription(cast.lapsed.id, "active", None)
        return real(user, channel_id)

    monkeypatch.setattr(messages, "get_visible_channel", channel_for)
    assert_problem(post("gold", cast.lapsed), 409, "conflict")
    assert post("gold", cast.lapsed).status_code == 201


def test_posting_does_not_need_redis(cast, post, redis_unavailable):
    with redis_unavailable():
        response = post("hello", key="once")
        assert response.status_code == 201
        assert response.get_json()["run"]["state"] == "pending"
        assert post("hello", key="once").data == response.data


def test_a_subscription_is_valid_until_the_end_of_its_grace_period(cast, post):
    now = datetime.now(UTC)
    for status, ended_days_ago, expected in (
        ("active", 0.9, 201), ("active", 1.1, 403), ("trialing", 1.1, 403), ("trialing", -1, 201),
        ("past_due", 6.9, 201), ("past_due", 7.1, 403), ("canceled", -1, 403), ("unpaid", -1, 403),
        ("incomplete", -1, 403), ("incomplete_expired", -1, 403), ("paused", -1, 403),
    ):  # fmt: skip
        subscriptions.set_subscription(cast.subscriber.id, status, now - timedelta(days=ended_days_ago))
        response = post("hello")
        assert (status, ended_days_ago, response.status_code) == (status, ended_days_ago, expected)


# Idempotency keys -----------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_first_response(cast, post):
    first, again = post("@moira", key="once"), post("@moira", key="once")
    assert (again.status_code, again.data) == (201, first.data)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert again.mimetype == first.mimetype
    assert (Message.select().count(), Run.select().count()) == (1, 1)


def test_the_first_response_is_repeated_after_an_edit_or_deletion(api, cast, post, run_jobs):
    first = post("hello", key="once")
    run_jobs()
    api(cast.subscriber).patch("/api/messages/1", json={"content": "edited"})
    assert post("hello", key="once").data == first.data
    api(cast.subscriber).delete("/api/messages/1")
    assert post("hello", key="once").data == first.data


def test_bodies_are_compared_by_values_and_not_by_the_order_of_fields(api, cast):
    def send(body):
        arguments = {"content_type": "application/json", "headers": {"Idempotency-Key": "once"}}
        return api(cast.subscriber).post("/api/messages", data=body, **arguments)

    first = send('{"channel_id": 1, "content": "x"}')
    assert send('{ "content":"\\u0078","channel_id":1 }').data == first.data
    assert_problem(send('{"channel_id": 1, "content": "y"}'), 422, "idempotency_mismatch")


def test_idempotency_keys_are_separate_for_each_author(cast, post):
    mine, theirs = post("hello", key="once"), post("hello", cast.vip, key="once")
    assert mine.get_json()["id"] != theirs.get_json()["id"]
    assert "Idempotency-Replayed" not in theirs.headers
    assert post("another", key="once" + "x" * 251).status_code == 201
    assert post("another", key="Once").status_code == 201


def test_an_idempotency_key_expires_after_a_day(cast, post):
    def age(hours):
        IdempotencyKey.update(created_at=datetime.now(UTC) - timedelta(hours=hours)).execute()

    first = post("hello", key="once")
    age(23.9)
    assert post("hello", key="once").data == first.data
    age(24.1)
    second = post("something else", key="once")
    assert second.status_code == 201
    assert "Idempotency-Replayed" not in second.headers
    assert post("something else", key="once").data == second.data


def test_a_refused_request_does_not_use_its_key(cast, post):
    assert_problem(post("hello", cast.lapsed, key="once"), 403, "subscription_required")
    assert_problem(post("", cast.lapsed, key="once"), 422, "invalid")
    subscriptions.set_subscription(cast.lapsed.id, "active", None)
    assert "Idempotency-Replayed" not in post("something else", cast.lapsed, key="once").headers
    assert Message.select().count() == 1


def test_concurrent_requests_with_the_same_key_post_once(post):
    for key in ("first", "second", "third"):
        start = Barrier(6)

        def send(_, key=key, start=start):
            start.wait(30)
            return post(key, key=key)

        with ThreadPoolExecutor(6) as threads:
            responses = list(threads.map(send, range(6)))
        posted = [response for response in responses if response.status_code == 201]
        new = [response for response in posted if "Idempotency-Replayed" not in response.headers]
        assert len(new) == 1
        for response in responses:
            if response in posted:
                assert response.get_json()["id"] == new[0].get_json()["id"]
            else:
                assert_problem(response, 409, "conflict")
        assert Message.select().where(Message.content == key).count() == 1
        assert post(key, key=key).data == new[0].data


# Listing --------------------------------------------------------------------------------------------------


def test_pages_are_newest_first_and_do_not_shift_when_messages_arrive(api, cast, post):
    for number in range(7):
        post(f"{number}")
    post("elsewhere", cast.admin, cast.announcements)
    seen, path = [], f"/api/channels/{cast.general}/messages?limit=3"
    page = api(cast.vip).get(path).get_json()
    while True:
        seen += [message["content"] for message in page["items"]]
        if page["next"] is None:
            break
        post("posted between two pages")
        page = api(cast.vip).get(f"{path}&cursor={page['next']}").get_json()
    assert seen == ["6", "5", "4", "3", "2", "1", "0"]


def test_an_exactly_full_last_page_has_no_cursor(api, cast, post):
    for number in range(4):
        post(f"{number}")
    vera, path = api(cast.vip), f"/api/channels/{cast.general}/messages"
    assert vera.get(f"{path}?limit=4").get_json()["next"] is None
    first = vera.get(f"{path}?limit=2").get_json()
    api(cast.subscriber).delete(f"/api/messages/{first['items'][-1]['id']}")  # the message that the cursor refers to
    second = vera.get(f"{path}?limit=2&cursor={first['next']}").get_json()
    assert [message["content"] for message in second["items"]] == ["1", "0"]
    assert second["next"] is None


def test_a_page_has_fifty_messages_by_default(api, cast):
    rows = [{"channel": cast.general, "author": cast.subscriber.id, "content": f"{n}"} for n in range(101)]
    Message.insert_many(rows).execute()
    path = f"/api/channels/{cast.general}/messages"
    for query, expected in (("", 50), ("?limit=1", 1), ("?limit=100", 100)):
        page = api(cast.vip).get(path + query).get_json()
        assert len(page["items"]) == expected
        assert page["next"]


# Editing and deleting -------------------------------------------------------------------------------------


def test_the_response_to_an_edit_is_the_edited_message(api, cast, post):
    before = post("hello @vera").get_json()
    path = f"/api/messages/{before['id']}"
    response = api(cast.subscriber).patch(path, json={"content": "  hello @moira and @bobby "})
    after = response.get_json()
    assert response.status_code == 200
    assert set(after) == set(before)
    assert after["content"] == "hello @moira and @bobby"
    assert TIME.fullmatch(after["edited_at"])
    assert after["created_at"] == before["created_at"]
    assert after["mentions"]["users"] == [{"id": cast.moderator.id, "username": "moira"}]
    assert [warning["code"] for warning in after["warnings"]] == ["unknown_mention"]
    assert after["run"]["id"] != before["run"]["id"]
    assert Run.get_by_id(after["run"]["id"]).kind == "edit"
    read = api(cast.subscriber).get(f"/api/messages/{before['id']}").get_json()
    assert read == {name: value for name, value in after.items() if name != "warnings"}


def test_an_edit_with_the_same_mentions_creates_no_run(api, cast, post):
    before = post("@vera, hello").get_json()
    after = api(cast.subscriber).patch(f"/api/messages/{before['id']}", json={"content": "hello, @vera!"}).get_json()
    assert after["run"]["id"] == before["run"]["id"]
    assert Run.select().count() == 1


def test_an_edit_is_restricted_by_the_allowed_mentions_of_the_post(api, cast, post):
    narrow = {"users": [cast.vip.id], "everyone": False}
    path = f"/api/messages/{post('hello', cast.admin, allowed_mentions=narrow).get_json()['id']}"
    edited = api(cast.admin).patch(path, json={"content": "@vera @sam @everyone"}).get_json()
    assert edited["mentions"] == {"users": [{"id": cast.vip.id, "username": "vera"}], "roles": [], "everyone": False}


def test_only_the_author_can_edit_and_only_the_content(api, cast, post):
    path = f"/api/messages/{post('hello').get_json()['id']}"
    for other in (cast.admin, cast.moderator, cast.vip):
        assert_problem(api(other).patch(path, json={"content": "mine now"}), 403, "forbidden")
    assert_problem(api(cast.subscriber).patch(path, json={"content": "x", "channel_id": 2}), 422, "invalid")
    subscriptions.set_subscription(cast.subscriber.id, "canceled", None)
    assert_problem(api(cast.subscriber).patch(path, json={"content": "later"}), 403, "subscription_required")
    assert api(cast.vip).get(path).get_json()["content"] == "hello"


def test_a_deleted_message_is_not_found(api, cast, post):
    for deleter in (cast.subscriber, cast.moderator, cast.admin):
        path = f"/api/messages/{post('hello').get_json()['id']}"
        response = api(deleter).delete(path)
        assert (response.status_code, response.get_json()) == (200, {"retracted": 0, "read": 0})
        for method in ("GET", "PATCH", "DELETE"):
            assert_problem(api(cast.subscriber).open(method, path, json={"content": "x"}), 404, "not_found")
        assert_problem(api(cast.subscriber).get(f"{path}/explain"), 404, "not_found")
        assert api(cast.vip).get(f"/api/channels/{cast.general}/messages").get_json()["items"] == []


def test_a_deleted_role_is_not_shown_as_mentioned(api, cast, post):
    message = post("@vip", cast.admin).get_json()
    servers.delete_role(cast.server_id, cast.vip_role)
    assert api(cast.admin).get(f"/api/messages/{message['id']}").get_json()["mentions"]["roles"] == []
