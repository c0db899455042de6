"""Messages: posted, listed, edited and deleted; and a request that comes again."""

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
    """`post("text", author, channel_id, key="...", ...)`: the answer to a post, by default sam's in #general."""

    def message(content, author=None, channel_id=None, key=None, **members):
        return api(author or cast.subscriber).post(
            "/api/messages",
            json={"channel_id": channel_id or cast.general, "content": content, **members},
            headers={"Idempotency-Key": key} if key else None,
        )

    return message


# Posting --------------------------------------------------------------------------------------------------


def test_the_answer_to_a_post_is_that_of_the_contract(cast, post):
    answer = post("gold breaks out, @moira, @bobby")
    message = answer.get_json()
    created_at, number, run = message["created_at"], message["id"], message["run"]["id"]
    expected = {
        "id": number, "channel_id": cast.general,
        "author": {"id": cast.subscriber.id, "username": "sam", "name": "Sam"},
        "content": "gold breaks out, @moira, @bobby", "created_at": created_at, "edited_at": None,
        "mentions": {"users": [{"id": cast.moderator.id, "username": "moira"}], "roles": [], "everyone": False},
        "warnings": [{"code": "unknown_mention", "detail": "@bobby is not a member of this server"}],
        "run": {"id": run, "state": "queued", "url": f"/api/runs/{run}"},
    }  # fmt: skip
    assert json.dumps(message) == json.dumps(expected)  # the order of the members too
    assert TIME.fullmatch(created_at)
    assert (answer.status_code, answer.mimetype) == (201, "application/json")
    assert answer.headers["Location"] == f"/api/messages/{number}"
    assert "Idempotency-Replayed" not in answer.headers


def test_a_stored_message_is_shown_as_it_was_answered_without_its_warnings(api, cast, post):
    posted = post("@moira @bobby").get_json()
    del posted["warnings"]
    assert json.dumps(api(cast.subscriber).get(f"/api/messages/{posted['id']}").get_json()) == json.dumps(posted)
    assert api(cast.vip).get(f"/api/messages/{posted['id']}").get_json() == {**posted, "run": None}
    assert api(cast.vip).get(f"/api/channels/{cast.general}/messages").get_json() == {
        "items": [{**posted, "run": None}],
        "next": None,
    }


def test_groups_are_mentioned_by_those_who_may(api, cast, post):
    mentioned = post("@everyone and @vip", cast.moderator).get_json()
    assert mentioned["mentions"] == {"users": [], "roles": [{"id": cast.vip_role, "name": "vip"}], "everyone": True}
    assert mentioned["warnings"] == []
    refused = post("@everyone and @vip").get_json()
    assert refused["mentions"] == {"users": [], "roles": [], "everyone": False}
    assert [warning["code"] for warning in refused["warnings"]] == ["mention_not_allowed"] * 2


def test_who_cannot_see_the_channel_is_not_mentioned(cast, post):
    answer = post("@sam, @ada, @stan", cast.vip, cast.vault).get_json()
    assert answer["mentions"]["users"] == []  # an admin sees the vault, but is notified only of what a role opens
    codes = [warning["code"] for warning in answer["warnings"]]
    assert codes == ["mention_without_access", "mention_without_access", "unknown_mention"]


def test_a_content_of_unknown_names_is_answered_and_kept_in_short(api, cast, post):
    content = " ".join(f"@{number:04}" for number in range(1_600))
    answer = post(content, key="many-names")
    assert answer.status_code == 201
    assert answer.get_json()["warnings"][20:] == [
        {"code": "more_warnings", "detail": "1580 more warnings are not shown"}
    ]
    kept = len(IdempotencyKey.get().response)
    edited = api(cast.subscriber).patch(f"/api/messages/{answer.get_json()['id']}", json={"content": content + "!"})
    assert len(edited.get_json()["warnings"]) == 21
    for size in (kept, len(answer.data), len(edited.data)):
        assert size < len(content) + 3_000


def test_the_author_is_warned_of_a_text_that_cannot_be_read_for_mentions(api, cast, post):
    unreadable = "@vera " + "![![a](b" * 1_200
    answer = post(unreadable)
    assert answer.status_code == 201
    edited = api(cast.subscriber).patch(f"/api/messages/{answer.get_json()['id']}", json={"content": unreadable + "!"})
    for message in (answer.get_json(), edited.get_json()):
        assert message["mentions"] == {"users": [], "roles": [], "everyone": False}
        assert [warning["code"] for warning in message["warnings"]] == ["mentions_not_read"]
    assert "remove markup" in message["warnings"][0]["detail"]


def test_allowed_mentions_narrow_and_never_add(cast, post):
    text, everything = "@sam @vera @vip @moderators @everyone", {"users": [], "roles": [], "everyone": False}
    nothing = post(text, cast.admin, allowed_mentions={}).get_json()
    assert nothing["mentions"] == everything
    assert nothing["warnings"] == []
    some = {"users": [cast.subscriber.id, cast.lapsed.id, 999], "roles": [cast.vip_role, 999], "everyone": False}
    assert post(text, cast.admin, allowed_mentions=some).get_json()["mentions"] == {
        "users": [{"id": cast.subscriber.id, "username": "sam"}],
        "roles": [{"id": cast.vip_role, "name": "vip"}],
        "everyone": False,
    }
    wide = {"users": [cast.vip.id], "roles": [cast.vip_role], "everyone": True}
    assert post("nobody is named", cast.admin, allowed_mentions=wide).get_json()["mentions"] == everything
    assert post("@everyone @vip", allowed_mentions=wide).get_json()["mentions"] == everything
    assert len(post(text, cast.admin, allowed_mentions=None).get_json()["mentions"]["users"]) == 2


def test_content_is_trimmed_and_otherwise_kept(post):
    for content in (
        "a", "two\n\n  lines", "日本語 עברית العربية", "\U0001f469\u200d\U0001f469 e\u0301 \u202eto the left\u202c",
        "\ufeff\u200bzero", "\x01\x7f", "\\u0000 \\", "'; DROP TABLE message; --", "<script>alert(1)</script>",
        "{{ 7 * 7 }} ${7*7} %s %(id)s {0}",
    ):  # fmt: skip
        assert post(f" \t\r\n\u00a0{content}\u2003\n").get_json()["content"] == content


def test_ten_thousand_characters_and_no_more(post):
    for longest in ("x" * 10_000, " " + "語" * 10_000 + " "):
        assert post(longest).get_json()["content"] == longest.strip()
    for content in ("x" * 10_001, "", "  \n\u2003", "a\0b"):
        assert list(assert_problem(post(content), 422, "invalid")["errors"]) == ["content"]


def test_ten_thousand_characters_beyond_the_basic_plane(api, cast):
    body = json.dumps({"channel_id": cast.general, "content": "😀" * 10_000}, ensure_ascii=False)
    answer = api(cast.subscriber).post("/api/messages", data=body.encode(), content_type="application/json")
    assert answer.get_json()["content"] == "😀" * 10_000


@pytest.fixture
def round_trips(monkeypatch):
    """What is sent to PostgreSQL and to Redis from here on: {"sql": the statements, "redis": how many times}."""
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
    post("the first one connects, and asks who it is")
    round_trips |= {"sql": [], "redis": 0}
    assert post("gold").status_code == 201
    assert round_trips == {"sql": ["WITH viewer"], "redis": 2}
    round_trips |= {"sql": [], "redis": 0}
    post("gold", key="once")
    kept = ["SELECT usr.id,", "BEGIN TRANSACTION", "SELECT pg_try_advisory_xact_lock(hashtextextended(%(name)s,",
            "SELECT request_hash,", "WITH viewer", "INSERT INTO", "COMMIT"]  # fmt: skip
    assert round_trips == {"sql": kept, "redis": 2}
    round_trips |= {"sql": [], "redis": 0}
    post("gold, @moira")
    assert (len(round_trips["sql"]), round_trips["redis"]) == (5, 2)


def counted_of(redis, person) -> dict[bytes, bytes]:
    """How many requests are counted for a user, by limit."""
    keys = redis.keys(f"LIMITER/*user:{person.id}/*")
    assert keys
    return {key: redis.hget(key, "count") for key in keys}


@pytest.mark.parametrize("how", [{"revoked_at": datetime.now(UTC)}, {"expires_at": datetime.now(UTC)}])
@pytest.mark.parametrize(("content", "key"), [("gold", None), ("gold, @moira", None), ("gold", "once")])
def test_a_token_that_ends_is_refused_though_its_person_is_remembered(cast, post, redis, how, content, key):
    assert post(content, key=key).status_code == 201
    ApiToken.update(how).where(ApiToken.user == cast.subscriber.id).execute()
    answer = post(content, key=key)
    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    counted = counted_of(redis, cast.subscriber)
    post(content, key=key)
    assert counted_of(redis, cast.subscriber) == counted, "nor is it counted from then on"
    assert Message.select().count() == 1


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("POST", {"json": {}}),
        ("POST", {"data": "gold"}),
        ("POST", {"json": {"channel_id": 1, "content": "gold"}, "headers": {"Idempotency-Key": "é"}}),
        ("OPTIONS", {}),
    ],
)
def test_with_a_token_that_ended_nobody_uses_up_its_persons_limit(api, cast, post, redis, method, asked):
    assert post("gold").status_code == 201
    ApiToken.update(revoked_at=datetime.now(UTC)).where(ApiToken.user == cast.subscriber.id).execute()
    api(cast.subscriber).open(method, "/api/messages", **asked)  # counted, for nobody has asked for the token
    counted = counted_of(redis, cast.subscriber)
    for _ in range(3):
        answer = api(cast.subscriber).open(method, "/api/messages", **asked)
        assert answer.status_code == (200 if method == "OPTIONS" else 401)
    assert counted_of(redis, cast.subscriber) == counted


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
def test_a_revoked_token_is_reported_before_what_is_wrong_with_the_body(api, cast, post, arguments, status):
    sam = api(cast.subscriber)
    for _ in range(2):
        assert post("gold").status_code == 201  # from here on sam is remembered
        assert sam.post("/api/messages", **arguments).status_code == status
    assert post("gold").status_code == 201
    ApiToken.update(revoked_at=datetime.now(UTC)).where(ApiToken.user == cast.subscriber.id).execute()
    assert sam.post("/api/messages", **arguments).status_code == 401


def test_what_a_person_may_and_how_they_are_called_is_not_remembered(cast, post):
    assert post("gold", cast.admin, cast.announcements).status_code == 201
    users.update_user(cast.admin.id, {"name": "Ada L."})
    assert post("gold", cast.admin).get_json()["author"]["name"] == "Ada L."
    users.update_user(cast.admin.id, {"is_admin": False})
    for content in ("gold", "gold, @moira"):
        assert_problem(post(content, cast.admin, cast.announcements), 403, "forbidden")
        assert_problem(post(content, cast.admin, cast.vault), 404, "not_found")


def test_no_more_than_so_many_are_remembered(cast, post, override):
    override(token_cache_size=2)
    for person in (cast.admin, cast.subscriber, cast.moderator, cast.vip):
        assert post("gold", person).status_code == 201
        assert tokens.cached_user(tokens.hash_token(person.token)).id == person.id
    assert tokens.cached_user(tokens.hash_token(cast.admin.token)) is None


def test_a_post_is_not_planned_anew_each_time(cast):
    """An admin's neither, for whom half of the question is answered before it is asked."""
    for author in (cast.admin.user, cast.subscriber.user):
        post_one = partial(messages.post_message, author, cast.general, "gold")
        assert generic_plans(post_one, "INSERT INTO message") == [10]


def test_a_post_that_is_refused_leaves_nothing_with_or_without_mentions(api, cast, post):
    for content in ("gold", "gold, @moira and @bobby"):
        for key in (None, "once"):
            assert_problem(post(content, cast.subscriber, cast.announcements, key), 403, "forbidden")
            assert_problem(post(content, cast.lapsed, key=key), 403, "subscription_required")
            assert_problem(post(content, cast.subscriber, cast.vault, key), 404, "not_found")
            assert_problem(post(content, cast.subscriber, 999, key), 404, "not_found")
    assert (Message.select().count(), Run.select().count(), queues.queue().count) == (0, 0, 0)


def test_who_may_post_only_a_moment_later_is_asked_to_try_again(cast, post, monkeypatch):
    real = messages.get_visible_channel

    def channel_for(user, channel_id):
        subscriptions.set_subscription(cast.lapsed.id, "active", None)
        return real(user, channel_id)

    monkeypatch.setattr(messages, "get_visible_channel", channel_for)
    assert_problem(post("gold", cast.lapsed), 409, "conflict")
    assert post("gold", cast.lapsed).status_code == 201


def test_posting_does_not_need_redis(cast, post, redis_away):
    with redis_away():
        answer = post("hello", key="once")
        assert answer.status_code == 201
        assert answer.get_json()["run"]["state"] == "pending"
        assert post("hello", key="once").data == answer.data


def test_a_subscription_counts_until_its_grace_is_over(cast, post):
    now = datetime.now(UTC)
    for status, ended_days_ago, expected in (
        ("active", 0.9, 201), ("active", 1.1, 403), ("trialing", 1.1, 403), ("trialing", -1, 201),
        ("past_due", 6.9, 201), ("past_due", 7.1, 403), ("canceled", -1, 403), ("unpaid", -1, 403),
        ("incomplete", -1, 403), ("incomplete_expired", -1, 403), ("paused", -1, 403),
    ):  # fmt: skip
        subscriptions.set_subscription(cast.subscriber.id, status, now - timedelta(days=ended_days_ago))
        answer = post("hello")
        assert (status, ended_days_ago, answer.status_code) == (status, ended_days_ago, expected)


# The same request again -----------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_first_answer_again(cast, post):
    first, again = post("@moira", key="once"), post("@moira", key="once")
    assert (again.status_code, again.data) == (201, first.data)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert again.mimetype == first.mimetype
    assert (Message.select().count(), Run.select().count()) == (1, 1)


def test_the_first_answer_stays_whatever_became_of_the_message(api, cast, post, run_jobs):
    first = post("hello", key="once")
    run_jobs()
    api(cast.subscriber).patch("/api/messages/1", json={"content": "edited"})
    assert post("hello", key="once").data == first.data
    api(cast.subscriber).delete("/api/messages/1")
    assert post("hello", key="once").data == first.data


def test_the_order_of_the_fields_does_not_distinguish_bodies_but_their_values_do(api, cast):
    def send(body):
        arguments = {"content_type": "application/json", "headers": {"Idempotency-Key": "once"}}
        return api(cast.subscriber).post("/api/messages", data=body, **arguments)

    first = send('{"channel_id": 1, "content": "x"}')
    assert send('{ "content":"\\u0078","channel_id":1 }').data == first.data
    assert_problem(send('{"channel_id": 1, "content": "y"}'), 422, "idempotency_mismatch")


def test_keys_are_each_authors_own(cast, post):
    mine, theirs = post("hello", key="once"), post("hello", cast.vip, key="once")
    assert mine.get_json()["id"] != theirs.get_json()["id"]
    assert "Idempotency-Replayed" not in theirs.headers
    assert post("another", key="once" + "x" * 251).status_code == 201
    assert post("another", key="Once").status_code == 201


def test_a_key_is_forgotten_after_a_day(cast, post):
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


def test_a_refused_request_leaves_its_key_free(cast, post):
    assert_problem(post("hello", cast.lapsed, key="once"), 403, "subscription_required")
    assert_problem(post("", cast.lapsed, key="once"), 422, "invalid")
    subscriptions.set_subscription(cast.lapsed.id, "active", None)
    assert "Idempotency-Replayed" not in post("something else", cast.lapsed, key="once").headers
    assert Message.select().count() == 1


def test_the_same_request_many_times_at_once_posts_once(post):
    for key in ("first", "second", "third"):
        start = Barrier(6)

        def send(_, key=key, start=start):
            start.wait(30)
            return post(key, key=key)

        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(send, range(6)))
        posted = [answer for answer in answers if answer.status_code == 201]
        new = [answer for answer in posted if "Idempotency-Replayed" not in answer.headers]
        assert len(new) == 1
        for answer in answers:
            if answer in posted:
                assert answer.get_json()["id"] == new[0].get_json()["id"]
            else:
                assert_problem(answer, 409, "conflict")
        assert Message.select().where(Message.content == key).count() == 1
        assert post(key, key=key).data == new[0].data


# Listing --------------------------------------------------------------------------------------------------


def test_a_channel_is_listed_newest_first_and_its_pages_stay_put(api, cast, post):
    for number in range(7):
        post(f"{number}")
    post("elsewhere", cast.admin, cast.announcements)
    seen, path = [], f"/api/channels/{cast.general}/messages?limit=3"
    page = api(cast.vip).get(path).get_json()
    while True:
        seen += [message["content"] for message in page["items"]]
        if page["next"] is None:
            break
        post("a new one, meanwhile")
        page = api(cast.vip).get(f"{path}&cursor={page['next']}").get_json()
    assert seen == ["6", "5", "4", "3", "2", "1", "0"]


def test_a_page_that_is_just_full_is_the_last(api, cast, post):
    for number in range(4):
        post(f"{number}")
    vera, path = api(cast.vip), f"/api/channels/{cast.general}/messages"
    assert vera.get(f"{path}?limit=4").get_json()["next"] is None
    first = vera.get(f"{path}?limit=2").get_json()
    api(cast.subscriber).delete(f"/api/messages/{first['items'][-1]['id']}")  # the one that the cursor stands on
    second = vera.get(f"{path}?limit=2&cursor={first['next']}").get_json()
    assert [message["content"] for message in second["items"]] == ["1", "0"]
    assert second["next"] is None


def test_fifty_are_listed_unless_one_asks(api, cast):
    rows = [{"channel": cast.general, "author": cast.subscriber.id, "content": f"{n}"} for n in range(101)]
    Message.insert_many(rows).execute()
    path = f"/api/channels/{cast.general}/messages"
    for query, expected in (("", 50), ("?limit=1", 1), ("?limit=100", 100)):
        page = api(cast.vip).get(path + query).get_json()
        assert len(page["items"]) == expected
        assert page["next"]


# Editing and deleting -------------------------------------------------------------------------------------


def test_an_edit_is_answered_as_the_message_is_then(api, cast, post):
    before = post("hello @vera").get_json()
    answer = api(cast.subscriber).patch(f"/api/messages/{before['id']}", json={"content": "  hello @moira and @bobby "})
    after = answer.get_json()
    assert answer.status_code == 200
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


def test_an_edit_that_mentions_the_same_people_needs_no_run(api, cast, post):
    before = post("@vera, hello").get_json()
    after = api(cast.subscriber).patch(f"/api/messages/{before['id']}", json={"content": "hello, @vera!"}).get_json()
    assert after["run"]["id"] == before["run"]["id"]
    assert Run.select().count() == 1


def test_an_edit_mentions_no_more_than_the_post_allowed(api, cast, post):
    narrow = {"users": [cast.vip.id], "everyone": False}
    path = f"/api/messages/{post('hello', cast.admin, allowed_mentions=narrow).get_json()['id']}"
    edited = api(cast.admin).patch(path, json={"content": "@vera @sam @everyone"}).get_json()
    assert edited["mentions"] == {"users": [{"id": cast.vip.id, "username": "vera"}], "roles": [], "everyone": False}


def test_only_its_author_edits_and_only_content(api, cast, post):
    path = f"/api/messages/{post('hello').get_json()['id']}"
    for other in (cast.admin, cast.moderator, cast.vip):
        assert_problem(api(other).patch(path, json={"content": "mine now"}), 403, "forbidden")
    assert_problem(api(cast.subscriber).patch(path, json={"content": "x", "channel_id": 2}), 422, "invalid")
    subscriptions.set_subscription(cast.subscriber.id, "canceled", None)
    assert_problem(api(cast.subscriber).patch(path, json={"content": "later"}), 403, "subscription_required")
    assert api(cast.vip).get(path).get_json()["content"] == "hello"


def test_a_deleted_message_is_gone(api, cast, post):
    for deleter in (cast.subscriber, cast.moderator, cast.admin):
        path = f"/api/messages/{post('hello').get_json()['id']}"
        answer = api(deleter).delete(path)
        assert (answer.status_code, answer.data) == (204, b"")
        for method in ("GET", "PATCH", "DELETE"):
            assert_problem(api(cast.subscriber).open(method, path, json={"content": "x"}), 404, "not_found")
        assert_problem(api(cast.subscriber).get(f"{path}/explain"), 404, "not_found")
        assert api(cast.vip).get(f"/api/channels/{cast.general}/messages").get_json()["items"] == []


def test_a_role_that_is_no_more_is_not_shown_as_mentioned(api, cast, post):
    message = post("@vip", cast.admin).get_json()
    servers.delete_role(cast.server_id, cast.vip_role)
    assert api(cast.admin).get(f"/api/messages/{message['id']}").get_json()["mentions"]["roles"] == []
