"""Every error of the API: its status, its code, and the common shape."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from marshmallow import fields
from peewee import OperationalError

from belfry.identity import tokens
from belfry.messages import history
from belfry.servers import preferences
from config import settings
from models import Message
from tools.dev import ROOT

SHAPE = {"type", "title", "status", "detail", "code"}
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}
TOO_LARGE_FOR_BIGINT = 2**63


def assert_problem(response, status: int, code: str) -> dict:
    """Assert that the response is this problem in the common shape; its body."""
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.mimetype == "application/problem+json"
    assert re.fullmatch(r"[A-Za-z0-9_.-]{8,64}", response.headers["X-Request-Id"])
    body = response.get_json()
    assert set(body) == (SHAPE | {"errors"} if code == "invalid" else SHAPE)
    assert (body["status"], body["code"]) == (status, code)
    assert all(body[member] and isinstance(body[member], str) for member in SHAPE - {"status"})
    for field, why in body.get("errors", {}).items():
        assert isinstance(field, str)
        assert why
        assert all(isinstance(reason, str) for reason in why)
    return body


@pytest.fixture
def post(api, cast):
    """POST /api/messages as the subscriber, with a raw body."""
    return lambda data, content_type="application/json", **arguments: api(cast.subscriber).post(
        "/api/messages", data=data, content_type=content_type, **arguments
    )


# Every route ----------------------------------------------------------------------------------------------


def api_routes(app):
    """(method, path with ids filled in, contract) of every route under /api."""
    routes = [
        (method, re.sub(r"<[^>]+>", "1", rule.rule), getattr(app.view_functions[rule.endpoint], "contract", None))
        for rule in app.url_map.iter_rules()
        if rule.rule.startswith("/api/")
        for method in sorted(rule.methods & METHODS)
    ]
    assert len(routes) > 40
    return routes


def test_every_route_needs_a_token(app, api, cast, subtests):
    for method, path, _ in api_routes(app):
        with subtests.test(f"{method} {path}"):
            response = api().open(method, path)
            assert_problem(response, 401, "unauthenticated")
            assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_other_methods_get_405_with_allow(app, api, cast, subtests):
    urls = app.url_map.bind("localhost")
    for path in {path for _, path, _ in api_routes(app)} | {"/healthz", "/openapi.json"}:
        allowed = set(urls.allowed_methods(path))
        for method in METHODS - allowed:
            with subtests.test(f"{method} {path}"):
                response = api(cast.admin).open(method, path)
                assert_problem(response, 405, "method_not_allowed")
                assert set(response.headers["Allow"].split(", ")) == allowed


def test_admin_routes_are_403_for_others(app, api, cast, subtests):
    admin_routes = [route for route in api_routes(app) if route[2] and route[2].admin]
    assert len(admin_routes) >= 24
    for method, path, _ in admin_routes:
        with subtests.test(f"{method} {path}"):
            assert_problem(api(cast.subscriber).open(method, path), 403, "forbidden")


# 400, 413, 415 --------------------------------------------------------------------------------------------


def test_a_body_that_is_not_a_json_object_is_400(post, subtests):
    for body in (
        b"", b"{", b"not json", b"[]", b'[{"content": "x"}]', b'"text"', b"7", b"null", b"{'a': 1}",
        b'{"channel_id": NaN}', b'{"channel_id": -Infinity}', b'{"content": "\xff"}', b"\xff\xfe{\x00}\x00",
        b"[" * 60_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b'{"channel_id": ' + b"9" * 5_000 + b"}",
    ):  # fmt: skip
        with subtests.test(body[:30]):
            assert_problem(post(body), 400, "malformed_json")


def test_other_media_types_get_415(post, subtests):
    for media_type in (None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ";;;", "\xe9"):
        with subtests.test(media_type):
            assert_problem(post(b'{"channel_id": 1, "content": "x"}', media_type), 415, "unsupported_media_type")


def test_json_with_media_type_parameters_is_accepted(post):
    assert post(b'{"channel_id": 1, "content": "x"}', "APPLICATION/JSON; charset=utf-8; q=1").status_code == 201


def test_a_body_over_64_kib_is_too_large(post):
    assert_problem(post(b'{"content": "' + b"x" * 65_536 + b'"}'), 413, "too_large")
    assert_problem(post(b'{"content": "' + b"x" * (65_536 - 15) + b'"}'), 422, "invalid")


# 401, 403, 404 --------------------------------------------------------------------------------------------


def test_invalid_tokens_get_401(api, cast, client):
    person = cast.subscriber
    _, expired = tokens.create_token(person.user, datetime.now(UTC) - timedelta(seconds=1))
    revoked_row, revoked = tokens.create_token(person.user)
    tokens.revoke_token(person.id, revoked_row["id"])
    for header in (
        f"Bearer {expired}", f"Bearer {revoked}", "Bearer belfry_unknown", "Bearer", "Bearer ", person.token,
        f"Basic {person.token}", f"Token {person.token}", f"Bearer {person.token} {person.token}",
        f"Bearer {person.token}x", "Bearer ü€".encode().decode("latin-1"), "Bearer ' OR 1=1 --", "",
    ):  # fmt: skip
        assert_problem(client.get("/api/me", headers={"Authorization": header}), 401, "unauthenticated")
    for header in (f"Bearer {person.token}", f"bearer  {person.token} "):
        assert client.get("/api/me", headers={"Authorization": header}).status_code == 200
    assert_problem(client.get(f"/api/me?access_token={person.token}"), 401, "unauthenticated")


def test_posting_without_a_right_is_403(api, cast):
    for person, channel, code in (
        (cast.lapsed, cast.general, "subscription_required"),
        (cast.moderator, cast.announcements, "forbidden"),
    ):
        response = api(person).post("/api/messages", json={"channel_id": channel, "content": "hello"})
        assert_problem(response, 403, code)


def test_other_paths_are_404(api, cast, subtests):
    for path in ("/api", "/api/", "/api/nothing", "/api/users/x", "/api/users/-1", "/api/users/0", "/api/%00"):
        with subtests.test(path):
            assert_problem(api(cast.admin).get(path), 404, "not_found")


def test_unknown_ids_are_404(api, cast, subtests):
    admin = api(cast.admin)
    for unknown in (999, TOO_LARGE_FOR_BIGINT - 1, TOO_LARGE_FOR_BIGINT, 10**400):
        for path in ("users/{}", "users/{}/tokens", "servers/{}/members", "channels/{}", "messages/{}", "runs/{}"):
            with subtests.test(path, unknown=str(unknown)[:30]):
                assert_problem(admin.get("/api/" + path.format(unknown)), 404, "not_found")
        for notification in (f"{cast.admin.id}-{unknown}", f"{unknown}-1", f"{unknown}", "-", "1-1-1", "%00", "²-1"):
            with subtests.test(notification[:30]):
                assert_problem(admin.delete(f"/api/notifications/{notification}"), 404, "not_found")


# 409, 422 -------------------------------------------------------------------------------------------------


def test_an_idempotency_key_in_use_is_a_conflict(api, cast):
    with psycopg.connect(settings.database_url) as first:
        name = f"idempotency {cast.subscriber.id} once"
        first.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
        response = api(cast.subscriber).post(
            "/api/messages", json={"channel_id": cast.general, "content": "x"}, headers={"Idempotency-Key": "once"}
        )
        assert_problem(response, 409, "conflict")
    assert Message.select().count() == 0


def test_an_idempotency_key_with_another_body_is_refused(api, cast):
    sam, key = api(cast.subscriber), {"Idempotency-Key": "once"}
    assert sam.post("/api/messages", json={"channel_id": 1, "content": "x"}, headers=key).status_code == 201
    response = sam.post("/api/messages", json={"channel_id": 1, "content": "y"}, headers=key)
    assert_problem(response, 422, "idempotency_mismatch")
    assert Message.select().count() == 1


def test_invalid_idempotency_keys_are_refused(post, subtests):
    for key in ("", " ", "two words", "x" * 256, "é", "tab\t.", "\x7f"):
        with subtests.test(key[:10]):
            response = post(b'{"channel_id": 1, "content": "x"}', headers={"Idempotency-Key": key})
            assert list(assert_problem(response, 422, "invalid")["errors"]) == ["Idempotency-Key"]
    assert Message.select().count() == 0


def test_taken_names_are_a_conflict(api, cast):
    admin, server = api(cast.admin), f"/api/servers/{cast.server_id}"
    assert_problem(admin.post("/api/users", json={"username": "SAM"}), 409, "conflict")
    assert_problem(admin.post(f"{server}/roles", json={"name": "vip"}), 409, "conflict")
    assert_problem(admin.post(f"{server}/channels", json={"name": " general "}), 409, "conflict")
    assert_problem(admin.patch(f"/api/channels/{cast.vault}", json={"name": "general"}), 409, "conflict")


INVALID_VALUES = {
    fields.Integer: (True, "1", 1.5, 1.0, 0, -1, TOO_LARGE_FOR_BIGINT, 10**400, [], {}, "x"),
    fields.Boolean: (0, 1, "true", "", [], {}),
    fields.DateTime: (
        0, True, "", "tomorrow", "2026-01-31", "2026-01-31T12:00:00", "2026-02-30T12:00:00Z",
        "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "0000-01-01T00:00:00Z", "12026-01-01T00:00:00Z",
        "2026-01-31T12:00:00+24:00", "2026-01-31T12:00:00Z'; DROP TABLE run; --", [], {},
    ),
    fields.String: (5, True, 1.5, [], {}, "", "  \t\n", "a\0b", "a\ud800b", "a" * 10_001),
    fields.List: (5, True, "1", {}, [True], ["1"], [[1]], [None], list(range(1, 1_002))),
    fields.Nested: (5, True, "x", [], [{}], {"nothing": 1}, {"users": ["1"]}, {"everyone": 1}),
}  # fmt: skip


def test_every_field_of_every_body_refuses_invalid_values(app, api, cast, subtests):
    bodies = [route for route in api_routes(app) if route[2] and route[2].body]
    assert len(bodies) >= 17
    for method, path, contract in bodies:
        for name, field in contract.body().fields.items():
            values = next(values for kind, values in INVALID_VALUES.items() if isinstance(field, kind))
            for value in values + (() if field.allow_none else (None,)):
                with subtests.test(f"{method} {path} {name}", value=str(value)[:30]):
                    response = api(cast.admin).open(method, path, json={name: value})
                    errors = assert_problem(response, 422, "invalid")["errors"]
                    why = [why for field, why in errors.items() if field.split(".")[0] == name]
                    assert why
                    assert "Missing" not in str(why)


def test_every_body_refuses_unknown_fields(app, api, cast, subtests):
    for method, path, contract in api_routes(app):
        if contract and contract.body:
            with subtests.test(f"{method} {path}"):
                response = api(cast.admin).open(method, path, json={"all": True, "colour": "red", "\ud800": 1})
                errors = assert_problem(response, 422, "invalid")["errors"]
                assert errors["colour"] == errors["\ud800"] == ["Unknown field."]


def numbered_names(count, length=5):
    return [f"{number:0{length}}" for number in range(count)]


OVERSIZED = {
    "6,000 unknown fields": dict.fromkeys(numbered_names(6_000), 1),
    "fields with long names": dict.fromkeys(numbered_names(20, length=3_000), 1),
    "one field with a name of 60,000 characters": {"x" * 60_000: 1},
    "names that JSON escapes": dict.fromkeys((f"{number}" + "\U0001f600" * 100 for number in range(100)), 1),
    "lists of invalid values": dict.fromkeys(
        ("ids", "role_ids", "user_id", "channel_id", "name", "content"), ["\U0001f600" * 40] * 60
    ),
    "nested lists": {"allowed_mentions": {name: ["x"] * 3_000 for name in ("users", "roles", "everyone", "nobody")}},
    "long values": dict.fromkeys(
        ("username", "name", "email", "status", "posting", "level", "muted_until", "up_to", "audience"), "\x01" * 1_000
    ),
}


@pytest.mark.parametrize("kind", OVERSIZED)
def test_an_error_about_a_body_is_at_most_8_kib(app, api, cast, subtests, kind):
    body = json.dumps(OVERSIZED[kind], ensure_ascii=False, separators=(",", ":")).encode()
    assert len(body) <= 65_536
    for method, path, contract in api_routes(app):
        if contract and contract.body:
            with subtests.test(f"{method} {path}"):
                response = api(cast.admin).open(method, path, data=body, content_type="application/json")
                assert_problem(response, 422, "invalid")
                assert len(response.data) <= 8_192


def test_an_error_about_a_query_or_header_is_at_most_8_kib(app, api, cast, subtests):
    queries = ["&".join(f"{name}=1" for name in numbered_names(600, 4)), "x" * 4_000 + "=1"]
    queries += ["&".join(["limit=1"] * 500), "limit=" + "9" * 4_000, "cursor=" + "x" * 4_000]
    for method, path, contract in api_routes(app):
        if method == "GET" and contract and contract.query:
            for query in queries:
                with subtests.test(f"{path}?{query[:20]}"):
                    response = api(cast.admin).get(f"{path}?{query}")
                    assert response.status_code in (404, 422)
                    assert len(response.data) <= 8_192
    for name in ("Last-Event-ID", "Idempotency-Key", "Authorization", "X-Request-Id", "Content-Type"):
        with subtests.test(name):
            for path in ("/api/messages", "/api/notifications/stream"):
                method = "POST" if path == "/api/messages" else "GET"
                body = {"channel_id": cast.general, "content": "x"} if method == "POST" else None
                response = api(cast.subscriber).open(method, path, json=body, headers={name: "x" * 8_000})
                assert len(response.data) <= 8_192
                assert sum(len(value) for _, value in response.headers) < 1_000


def test_an_error_names_twenty_fields_and_counts_the_others(post):
    many = json.dumps(dict.fromkeys(numbered_names(6_000), 1), separators=(",", ":"))
    errors = assert_problem(post(many), 422, "invalid")["errors"]
    assert len(errors) == 21
    assert errors["_schema"] == ["5982 more invalid fields are not shown."]  # including the two missing ones
    few = assert_problem(post(json.dumps(dict.fromkeys(numbered_names(18), 1))), 422, "invalid")["errors"]
    assert set(few) == {*numbered_names(18), "channel_id", "content"}


def test_an_error_shortens_long_field_names(post):
    errors = assert_problem(post(json.dumps({"a" * 60_000: 1, "a" * 31: 2, "a" * 30: 3})), 422, "invalid")["errors"]
    assert errors["a" * 30 + "…"] == ["Unknown field.", "Unknown field."]
    assert errors["a" * 30] == ["Unknown field."]


def test_every_list_refuses_invalid_query_parameters(app, api, cast, subtests):
    queries = [f"limit={limit}" for limit in ("0", "101", "-1", "x", "", "1.5", "1e1", "9" * 5_000)]
    queries += [f"cursor={cursor}" for cursor in ("", "x", "YXQg", "%00", "ü", "4", "YXQgLTE", "YXQgMQ/../", "' OR 1")]
    queries += ["colour=red", "limit=5&Limit=5", "cursor[]=x"]
    lists = [path for _, path, contract in api_routes(app) if contract and contract.many]
    assert len(lists) >= 11
    for path in lists:
        for query in queries:
            with subtests.test(f"{path}?{query[:30]}"):
                assert_problem(api(cast.admin).get(f"{path}?{query}"), 422, "invalid")


def test_invalid_filters_are_refused(api, cast, subtests):
    for path, query in (
        ("runs", "state=done"), ("runs", "channel_id=x"), ("runs", f"channel_id={TOO_LARGE_FOR_BIGINT}"),
        ("notifications", "unread=maybe"), ("notifications", "channel_id=0"),
        ("messages/1/explain", "user_id=x"), ("messages/1/explain", "user=1"),
        ("users", "username=%00"), ("users", "name=Sam"),
    ):  # fmt: skip
        with subtests.test(f"{path}?{query}"):
            errors = assert_problem(api(cast.admin).get(f"/api/{path}?{query}"), 422, "invalid")["errors"]
            assert list(errors) == [query.split("=")[0]]


# 429, 500, 503 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, int]]:
    """A separate web process with a low limit; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = ["-m", "gunicorn", "--bind", f"fd://{listening.fileno()}"]
        process = subprocess.Popen(
            [sys.executable, *command, "--log-level", "critical", "app:create_app()"],
            cwd=ROOT,
            env={**os.environ, "RATE_LIMIT_MESSAGES": "3 per 15 minutes"},
            pass_fds=[listening.fileno()],
        )
        try:
            yield listening.getsockname()
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def send(web):
    """`send(person, body, ...)`: POST /api/messages over a socket; (response, its body)."""

    def post_message(person, body, **headers):
        connection = http.client.HTTPConnection(*web, timeout=30)
        try:
            is_chunked = "Transfer-Encoding" in headers
            all_headers = {"Authorization": f"Bearer {person.token}", "Content-Type": "application/json", **headers}
            connection.request("POST", "/api/messages", body, all_headers, encode_chunked=is_chunked)
            response = connection.getresponse()
            return response, json.load(response)
        finally:
            connection.close()

    return post_message


def test_a_declared_length_that_is_too_large_is_refused(send, cast):
    response, problem = send(cast.subscriber, None, **{"Content-Length": "10000000"})
    assert (response.status, problem["code"]) == (413, "too_large")


def test_a_chunked_body_that_is_too_large_is_refused(send, cast, subtests):
    start = b'{"channel_id": 1, "content": "x"}'
    for status, rest in ((413, [b" " * 1_024] * 64), (413, [b" " * 1_024] * 64 + [b"["]), (201, [b" "])):
        with subtests.test(chunks=len(rest)):
            response, body = send(cast.subscriber, iter([start, *rest]), **{"Transfer-Encoding": "chunked"})
            assert (response.status, body.get("code")) == (status, "too_large" if status == 413 else None)
    assert Message.select().count() == 1


def test_the_rate_of_an_authors_messages_is_limited(send, cast, web):
    message = json.dumps({"channel_id": cast.general, "content": "hello"})
    remaining = []
    for _ in range(3):
        response, _ = send(cast.subscriber, message)
        assert response.status == 201
        remaining.append(response.headers["RateLimit-Remaining"])
    assert remaining == ["2", "1", "0"]
    response, problem = send(cast.subscriber, message)
    assert (response.status, response.headers["Content-Type"]) == (429, "application/problem+json")
    assert (set(problem), problem["code"]) == (SHAPE, "rate_limited")
    assert (response.headers["RateLimit-Limit"], response.headers["RateLimit-Remaining"]) == ("3", "0")
    assert 0 < int(response.headers["Retry-After"]) <= 15 * 60
    assert 0 < int(response.headers["RateLimit-Reset"]) <= 15 * 60 + 1
    assert send(cast.moderator, message)[0].status == 201
    assert Message.select().count() == 4


def test_a_successful_response_has_no_retry_after(api, cast):
    response = api(cast.subscriber).get("/api/me")
    assert "Retry-After" not in response.headers
    assert 0 <= int(response.headers["RateLimit-Reset"]) <= 61


def test_requests_get_503_while_the_database_is_unavailable(api, cast, client, database_unavailable):
    with database_unavailable():
        response = api(cast.subscriber).get("/api/me")
        assert_problem(response, 503, "unavailable")
        assert response.headers["Retry-After"] == "5"
        assert_problem(client.get("/api/me"), 401, "unauthenticated")


def test_a_request_gets_503_where_the_database_fails_during_it(api, cast, monkeypatch):
    def disconnect(*_):
        raise OperationalError("server closed the connection unexpectedly: host=10.0.0.7")

    monkeypatch.setattr(history, "find_message", disconnect)
    response = api(cast.subscriber).get("/api/messages/1")
    assert "10.0.0.7" not in assert_problem(response, 503, "unavailable")["detail"]
    assert response.headers["Retry-After"] == "5"


def test_an_unexpected_error_is_in_the_log_and_not_in_the_response(api, cast, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(preferences, "preference_of", fail)
    response = api(cast.subscriber).get("/api/channels/1/preference", headers={"X-Request-Id": "of-the-proxy-7"})
    assert_problem(response, 500, "internal")
    assert response.headers["X-Request-Id"] == "of-the-proxy-7"
    assert not re.search("hunter2|RuntimeError|Traceback|preference", response.get_data(as_text=True))
    assert "of-the-proxy-7" in caplog.text
    assert "hunter2" in caplog.text


def test_an_invalid_request_id_is_replaced(client):
    for given in ("short", "x" * 65, "two words", "<script>", "a\ttab-in-it"):
        response = client.get("/healthz", headers={"X-Request-Id": given})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-Id"])


def test_a_repeated_field_is_refused(api, cast):
    body = f'{{"channel_id": {cast.general}, "content": "gold", "content": "silver"}}'
    response = api(cast.subscriber).post("/api/messages", data=body, content_type="application/json")
    assert "given twice" in assert_problem(response, 400, "malformed_json")["detail"]
    assert Message.select().count() == 0


@pytest.mark.parametrize("username", ["\u212aate", "kate\u0130", "ſam"])
def test_a_username_that_folds_to_ascii_is_refused_and_finds_nobody(api, cast, username):
    admin = api(cast.admin)
    assert list(assert_problem(admin.post("/api/users", json={"username": username}), 422, "invalid")["errors"]) == [
        "username"
    ]
    admin.post("/api/users", json={"username": "kate"})
    assert admin.get("/api/users", query_string={"username": username}).get_json()["items"] == []


@pytest.mark.parametrize("name", ["\u200b", "\u2060\u00ad", "\u202e \u200f"])
def test_a_name_without_a_visible_character_is_refused(api, cast, name):
    for path in ("/api/servers", f"/api/servers/{cast.server_id}/channels"):
        response = api(cast.admin).post(path, json={"name": name})
        assert assert_problem(response, 422, "invalid")["errors"]["name"] == ["Must have a visible character."]


@pytest.mark.parametrize("impossible", ["0", str(2**63), "9" * 40])
@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
def test_an_impossible_id_is_404_for_every_method(api, cast, impossible, method):
    for path in ("channels", "messages"):
        response = api(cast.admin).open(method, f"/api/{path}/{impossible}", json={"name": "x"})
        assert_problem(response, 404, "not_found")


def test_every_route_that_writes_declares_what_it_publishes(app):
    for rule in app.url_map.iter_rules():
        contract = getattr(app.view_functions[rule.endpoint], "contract", None)
        if contract and rule.methods - {"GET", "HEAD", "OPTIONS"}:
            assert contract.publishes is not None, rule


def test_an_overlong_request_line_gets_a_problem_response(web):
    with socket.create_connection(web, timeout=30) as connection:
        connection.sendall(b"GET /" + b"a" * 8_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.headers["Content-Type"]) == (414, "application/problem+json")
        assert json.load(response)["code"] == "uri_too_long"
