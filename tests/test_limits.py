"""Rate limits: what is counted, whose it is, and when there is more."""

import time

import pytest
from limits import parse_many
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.test_refusals import assert_problem
from views import limits


@pytest.fixture
def limit(monkeypatch):
    """`limit("messages", "3 per second")` from here on; the other scope is `other`."""

    def set_limit(scope, text):
        monkeypatch.setitem(limits._LIMITS, scope, sorted(parse_many(text)))

    return set_limit


@pytest.fixture
def post(api, cast):
    """A post of sam's, or somebody else's."""

    def message(author=None):
        body = {"channel_id": cast.general, "content": "gold"}
        return api(author or cast.subscriber).post("/api/messages", json=body)

    return message


def told(answer) -> tuple[str, str]:
    return answer.headers["RateLimit-Limit"], answer.headers["RateLimit-Remaining"]


def test_openings_of_streams_are_limited_for_each_person(api, cast, limit):
    limit("streams", "2 per minute")
    path = "/api/notifications/stream"
    assert [api(cast.vip).get(path).status_code for _ in range(2)] == [501, 501]  # the test's client has no socket
    answer = api(cast.vip).get(path, headers={"Last-Event-ID": "1-3:3:"})
    assert_problem(answer, 429, "rate_limited")
    assert int(answer.headers["Retry-After"]) > 0
    assert api(cast.admin).get(path).status_code == 501
    assert api(cast.vip).get("/api/notifications").status_code == 200


def test_there_is_more_when_time_has_passed(post, limit):
    limit("messages", "2 per second")
    assert [post().status_code for _ in range(3)] == [201, 201, 429]
    time.sleep(2.1)
    assert told(post()) == ("2", "1")


def test_what_was_posted_in_the_last_window_weighs_until_it_is_out_of_sight(post, limit, redis):
    limit("messages", "10 per minute")
    assert [told(post())[1] for _ in range(8)] == [str(left) for left in range(9, 1, -1)]
    (key,) = redis.keys("LIMITER*")
    redis.hset(key, "began", float(redis.hget(key, "began")) - 90)  # so that half of it is in sight
    answer = post()
    assert told(answer) == ("10", "6"), "four of eight weigh still: 3.9, and this one"
    assert 0 < int(answer.headers["RateLimit-Reset"]) <= 8, "an eighth of a minute until one less does"


def test_what_is_refused_does_not_count(post, limit, redis):
    limit("messages", "1 per minute")
    assert [post().status_code for _ in range(4)] == [201, 429, 429, 429]
    (key,) = redis.keys("LIMITER*")
    assert redis.hget(key, "count") == b"1"
    assert 60 < redis.ttl(key) <= 120, "and it is forgotten when it is out of sight"


def test_of_several_limits_each_holds_and_the_one_that_refuses_is_told(post, limit):
    limit("messages", "5 per 15 minutes; 2 per second")
    assert told(post()) == ("2", "1"), "the shortest, while none refuses"
    post()
    problem = post()
    assert assert_problem(problem, 429, "rate_limited")["detail"] == "Too many requests: 2 per 1 second for one person."
    assert (told(problem), problem.headers["Retry-After"]) == (("2", "0"), "1")
    time.sleep(2.1)
    post()
    post()
    time.sleep(2.1)
    assert post().status_code == 201
    assert told(post()) == ("5", "0")


def test_posts_and_edits_count_together_and_apart_from_everything_else(api, cast, post, limit):
    limit("messages", "2 per minute")
    limit("other", "3 per minute")
    sam = api(cast.subscriber)
    posted = post().get_json()
    assert sam.patch(f"/api/messages/{posted['id']}", json={"content": "silver"}).status_code == 200
    assert_problem(post(), 429, "rate_limited")
    paths = ("/api/me", "/api/channels", f"/api/messages/{posted['id']}")
    assert [told(sam.get(path)) for path in paths] == [("3", "2"), ("3", "1"), ("3", "0")]
    assert_problem(sam.get("/api/me"), 429, "rate_limited")
    assert api(cast.vip).get("/api/me").status_code == 200


def test_nobody_and_what_is_no_address_are_not_counted(api, cast, client, redis):
    for answer in (client.get("/api/me"), client.get("/healthz"), api(cast.admin).get("/api/nothing")):
        assert "RateLimit-Limit" not in answer.headers
    assert redis.keys("*") == []


def test_while_redis_is_out_of_reach_requests_pass_and_the_log_says_so(post, monkeypatch, caplog):
    nowhere = Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    monkeypatch.setattr(limits, "_script", lambda: nowhere.register_script(limits._HIT))
    answer = post()
    assert answer.status_code == 201
    assert "RateLimit-Limit" not in answer.headers
    assert "nobody is counted" in caplog.text


def test_a_redis_that_was_replaced_learns_the_script_again(post, redis):
    first = int(told(post())[1])
    redis.script_flush()
    assert int(told(post())[1]) == first - 1
