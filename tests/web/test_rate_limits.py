"""Rate limits: what is counted, for whom, and when requests are accepted again."""

import time

import pytest

from belfry.web import rate_limit
from tests.fanout_helpers import statements
from tests.people import csrf_of
from tests.web.test_errors import assert_problem

SETTING_OF_SCOPE = {
    "messages": "rate_limit_messages",
    "streams": "stream_openings",
    "other": "rate_limit_default",
    "anonymous": "rate_limit_anonymous",
}


@pytest.fixture
def limit(override):
    """`limit("messages", "3 per second")`: set a limit from now on; the other scope gets `other`."""

    def set_limit(scope, text):
        override(**{SETTING_OF_SCOPE[scope]: text})

    return set_limit


@pytest.fixture
def post(api, cast):
    """Post as sam, or as another user."""

    def message(author=None):
        body = {"channel_id": cast.general, "content": "gold"}
        return api(author or cast.subscriber).post("/api/messages", json=body)

    return message


def limit_headers(response) -> tuple[str, str]:
    return response.headers["RateLimit-Limit"], response.headers["RateLimit-Remaining"]


def test_new_streams_are_limited_for_each_user(api, cast, limit):
    limit("streams", "2 per minute")
    path = "/api/notifications/stream"
    assert [api(cast.vip).get(path).status_code for _ in range(2)] == [501, 501]  # the test client has no socket
    response = api(cast.vip).get(path, headers={"Last-Event-ID": "1-3:3:"})
    assert_problem(response, 429, "rate_limited")
    assert int(response.headers["Retry-After"]) > 0
    assert api(cast.admin).get(path).status_code == 501
    assert api(cast.vip).get("/api/notifications").status_code == 200


def test_the_limit_recovers_with_time(post, limit):
    limit("messages", "2 per second")
    assert [post().status_code for _ in range(3)] == [201, 201, 429]
    time.sleep(2.1)
    assert limit_headers(post()) == ("2", "1")


def test_requests_of_the_previous_window_count_in_proportion(post, limit, redis):
    limit("messages", "10 per minute")
    assert [limit_headers(post())[1] for _ in range(8)] == [str(left) for left in range(9, 1, -1)]
    (key,) = redis.keys("LIMITER*")
    redis.hset(key, "began", float(redis.hget(key, "began")) - 90)  # so that half of it counts
    response = post()
    assert limit_headers(response) == ("10", "6"), "half of the eight requests count, and this one"
    assert 0 < int(response.headers["RateLimit-Reset"]) <= 8, "an eighth of a minute until one request less counts"


def test_refused_requests_do_not_count(post, limit, redis):
    limit("messages", "1 per minute")
    assert [post().status_code for _ in range(4)] == [201, 429, 429, 429]
    (key,) = redis.keys("LIMITER*")
    assert redis.hget(key, "count") == b"1"
    assert 60 < redis.ttl(key) <= 120, "the key expires when its requests no longer count"


def test_each_of_several_limits_applies_and_the_exceeded_one_is_named(post, limit):
    limit("messages", "5 per 15 minutes; 2 per second")
    assert limit_headers(post()) == ("2", "1"), "the shortest one is reported while none is exceeded"
    post()
    problem = post()
    assert assert_problem(problem, 429, "rate_limited")["detail"] == "Too many requests: 2 per 1 second for one user."
    assert (limit_headers(problem), problem.headers["Retry-After"]) == (("2", "0"), "1")
    time.sleep(2.1)
    post()
    post()
    time.sleep(2.1)
    assert post().status_code == 201
    assert limit_headers(post()) == ("5", "0")


def test_posts_and_edits_share_a_limit_of_their_own(api, cast, post, limit):
    limit("messages", "2 per minute")
    limit("other", "3 per minute")
    sam = api(cast.subscriber)
    posted = post().get_json()
    assert sam.patch(f"/api/messages/{posted['id']}", json={"content": "silver"}).status_code == 200
    assert_problem(post(), 429, "rate_limited")
    paths = ("/api/me", "/api/channels", f"/api/messages/{posted['id']}")
    assert [limit_headers(sam.get(path)) for path in paths] == [("3", "2"), ("3", "1"), ("3", "0")]
    assert_problem(sam.get("/api/me"), 429, "rate_limited")
    assert api(cast.vip).get("/api/me").status_code == 200


def test_all_requests_of_a_user_count_also_to_unknown_paths(api, cast, limit, app):
    limit("other", "3 per minute")
    admin = api(cast.admin)
    paths = ["/rq/", "/metrics", "/api/nothing"]
    assert [limit_headers(admin.get(path)) for path in paths] == [("3", "2"), ("3", "1"), ("3", "0")]
    for path in (*paths, "/nothing/either", "/rq/nothing", "/rq/0/view/workers", "/api/me"):
        response = admin.get(path)
        assert (response.status_code, response.headers["Retry-After"] > "0") == (429, True), path
    assert admin.put("/api/me").status_code == 429, "a method that the route does not have also counts"


def test_requests_of_a_session_count_for_its_user(client, cast, limit):
    limit("other", "4 per minute")
    csrf = csrf_of(client.get("/login").text)
    client.post("/login", data={"csrf": csrf, "token": cast.admin.token})
    responses = [client.get("/inbox"), client.get("/nothing"), client.get("/metrics")]
    responses.append(client.delete("/api/me/sessions"))
    assert [response.status_code for response in responses] == [200, 404, 200, 403]
    remaining = [limit_headers(response)[1] for response in responses]
    assert remaining == ["3", "2", "1", "0"], "a request with a wrong CSRF token also counts"
    for path in ("/inbox", "/nothing", "/rq/", "/login", "/api/me"):
        assert client.get(path).status_code == 429, path
    assert client.get("/docs").status_code == 200, "a page that is the same for all users counts by address"


ANONYMOUS = (
    ("GET", "/login", None), ("POST", "/login", None), ("GET", "/api/me", None), ("GET", "/api/me", "Bearer wrong"),
    ("GET", "/metrics", "Bearer wrong"), ("GET", "/rq/", None), ("GET", "/nothing", None), ("GET", "/readyz", None),
    ("GET", "/docs", None), ("GET", "/openapi.json", None), ("GET", "/", None),
)  # fmt: skip


def test_requests_without_a_user_count_by_client_address(client, api, cast, limit):
    limit("anonymous", f"{len(ANONYMOUS)} per minute")

    def send(method, path, token, address="192.0.2.1"):
        headers = {"Authorization": token} if token else {}
        return client.open(path, method=method, headers=headers, environ_base={"REMOTE_ADDR": address})

    for number, request in enumerate(ANONYMOUS, 1):
        assert limit_headers(send(*request)) == (str(len(ANONYMOUS)), str(len(ANONYMOUS) - number)), request
    for request in ANONYMOUS:
        problem = send(*request)
        assert problem.status_code == 429, request
        assert int(problem.headers["Retry-After"]) > 0
    assert "for one address" in assert_problem(send("GET", "/api/me", None), 429, "rate_limited")["detail"]
    assert send("GET", "/login", None, "192.0.2.2").status_code == 200
    vera = {"Authorization": f"Bearer {cast.vip.token}"}
    assert client.get("/api/me", headers=vera, environ_base={"REMOTE_ADDR": "192.0.2.1"}).status_code == 200


def test_health_checks_and_static_files_do_not_count(client, redis):
    for path in ("/healthz", "/static/colours.css"):
        response = client.get(path, buffered=True)
        assert response.status_code == 200
        assert "RateLimit-Limit" not in response.headers
    assert redis.keys("*") == []


def test_a_scraper_counts_by_address_without_reading_a_user(client, limit, override):
    override(metrics_token="s" * 32)
    limit("anonymous", "1 per minute")
    with statements() as executed:
        responses = [client.get("/metrics", headers={"Authorization": f"Bearer {'s' * 32}"}) for _ in range(2)]
    assert [response.status_code for response in responses] == [200, 429]
    assert not [sql for sql in executed if "api_token" in sql]


def test_an_unknown_path_takes_at_most_one_statement(client, api, cast):
    for get, statements_per_request in ((client.get, 0), (api(cast.vip).get, 1)):
        with statements() as executed:
            for path in ("/nothing", "/api/nothing"):
                assert get(path).status_code == 404
        assert len(executed) == 2 * statements_per_request


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "expected"),
    [
        (0, "192.0.2.1", None, "192.0.2.1"),
        (0, "192.0.2.1", "203.0.113.9", "192.0.2.1"),
        (1, "10.0.0.1", "203.0.113.9", "203.0.113.9"),
        (1, "10.0.0.1", "forged, 198.51.100.7 ,203.0.113.9", "203.0.113.9"),
        (2, "10.0.0.1", "198.51.100.7,203.0.113.9, 10.0.0.2", "203.0.113.9"),
        (2, "10.0.0.1", '198.51.100.7, "x, 203.0.113.9, 10.0.0.2', "203.0.113.9"),
        (2, "10.0.0.1", "203.0.113.9", "10.0.0.1"),
        (1, "10.0.0.1", None, "10.0.0.1"),
        (1, "10.0.0.1", "", "10.0.0.1"),
        (1, "10.0.0.1", "203.0.113.9,", "10.0.0.1"),
        (1, "10.0.0.1", "unknown", "10.0.0.1"),
        (1, "10.0.0.1", "203.0.113.9:5678", "203.0.113.9"),
        (1, "10.0.0.1", "[2001:db8:1:2:3::4]:5678", "2001:db8:1:2::/64"),
        (1, "10.0.0.1", "2001:DB8:1:2:ffff:0:0:1", "2001:db8:1:2::/64"),
        (0, "::ffff:192.0.2.1", None, "192.0.2.1"),
        (0, "fe80::1%eth0", None, "fe80::/64"),
        (0, "", None, "unknown"),
        (1, "", "203.0.113.9", "203.0.113.9"),
        (1, "", "x" * 5_000, "unknown"),
    ],
)
def test_the_client_address_is_that_of_the_trusted_proxy(app, override, proxies, peer, forwarded, expected):
    override(trusted_proxies=proxies)
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    with app.test_request_context("/", headers=headers, environ_base={"REMOTE_ADDR": peer}):
        assert rate_limit.client_address() == expected


def test_requests_pass_without_redis_and_a_warning_is_logged(post, redis_unavailable, caplog):
    with redis_unavailable():
        response = post()
    assert response.status_code == 201
    assert "RateLimit-Limit" not in response.headers
    assert "requests are not counted" in caplog.text


def test_a_replaced_redis_gets_the_script_again(post, redis):
    first = int(limit_headers(post())[1])
    redis.script_flush()
    assert int(limit_headers(post())[1]) == first - 1
