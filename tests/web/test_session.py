"""Browser sessions: the API with a session cookie and CSRF token, and the end of sessions."""

from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from flask import Flask
from flask.testing import FlaskClient

from belfry.core.db import execute
from belfry.identity import sessions, tokens
from belfry.worker import maintenance
from models import ApiToken, Session
from tests.fanout_helpers import statements
from tests.people import csrf_of
from tests.processes import web_process


@pytest.fixture
def page(client, cast):
    """The subscriber's browser, signed in."""
    form = client.get("/login").text
    client.post("/login", data={"csrf": csrf_of(form), "token": cast.subscriber.token})
    return client


def _message(cast) -> dict:
    return {"channel_id": cast.general, "content": "gold breaks out"}


def test_a_session_may_read(page, cast):
    assert page.get("/api/me").json["id"] == cast.subscriber.id


def test_a_session_may_write_with_its_csrf_token(page, cast):
    csrf = csrf_of(page.get("/login").text)
    response = page.post("/api/messages", json=_message(cast), headers={"X-CSRF-Token": csrf})
    assert (response.status_code, response.json["author"]["id"]) == (201, cast.subscriber.id)


@pytest.mark.parametrize("csrf", [None, "", "wrong", "ü"])
def test_a_session_may_not_write_without_its_csrf_token(page, cast, csrf):
    page.get("/login")  # creates a CSRF token
    headers = {} if csrf is None else {"X-CSRF-Token": csrf}
    preference = {"level": "none", "muted_until": None}
    for response in (
        page.post("/api/messages", json=_message(cast), headers=headers),
        page.put(f"/api/channels/{cast.general}/preference", json=preference, headers=headers),
    ):
        assert (response.status_code, response.json["code"]) == (403, "forbidden")
    assert page.get(f"/api/channels/{cast.general}/messages").json["items"] == []


def test_no_csrf_token_is_valid_before_a_page_was_served(page, cast):
    response = page.post("/api/messages", json=_message(cast), headers={"X-CSRF-Token": ""})
    assert response.status_code == 403


def test_an_authorization_header_overrides_the_session(page, cast):
    assert page.get("/api/me", headers={"Authorization": f"Bearer {cast.vip.token}"}).json["id"] == cast.vip.id
    for header in ("Bearer wrong", "Basic x", ""):
        assert page.get("/api/me", headers={"Authorization": header}).status_code == 401


def test_a_session_ends_with_its_token(page, cast):
    token = ApiToken.get(ApiToken.token_hash == tokens.hash_token(cast.subscriber.token))
    tokens.revoke_token(cast.subscriber.id, token.id)
    response = page.get("/api/me")
    assert (response.status_code, response.json["code"]) == (401, "unauthenticated")


def test_a_request_with_a_token_gets_no_cookie(api, cast):
    assert "Set-Cookie" not in api(cast.subscriber).get("/api/me").headers
    assert "Set-Cookie" not in api().get("/api/me").headers


# --- end of sessions


@pytest.fixture
def sign_in(app: Flask) -> Callable[..., FlaskClient]:
    """`sign_in(person)`: a signed-in browser."""

    def open_browser(person) -> FlaskClient:
        browser = app.test_client()
        sign_in_again(browser, person)
        return browser

    return open_browser


def sign_in_again(browser: FlaskClient, person) -> None:
    csrf = csrf_of(browser.get("/login").text)
    assert browser.post("/login", data={"csrf": csrf, "token": person.token}).status_code == 303


def copy_of(browser: FlaskClient) -> FlaskClient:
    """Another browser with a copy of the cookie."""
    copy = browser.application.test_client()
    copy.set_cookie("belfry", browser.get_cookie("belfry").value)
    return copy


def is_open(browser: FlaskClient) -> bool:
    """Whether the browser is signed in, for the API and the pages."""
    statuses = browser.get("/api/me").status_code, browser.get("/inbox").status_code
    assert statuses in ((200, 200), (401, 303))
    return statuses == (200, 200)


def sign_out(browser: FlaskClient, **fields: str) -> None:
    csrf = csrf_of(browser.get("/login").text)
    assert browser.post("/logout", data={"csrf": csrf, **fields}).status_code == 303


def test_a_copied_cookie_is_invalid_after_signing_out(sign_in, cast):
    browser = sign_in(cast.admin)
    headers = {"X-CSRF-Token": csrf_of(browser.get("/login").text), "Sec-Fetch-Site": "same-origin"}
    copy = copy_of(browser)
    assert copy.get("/api/me").status_code == 200, "the copied cookie is valid"
    assert copy.get("/rq/").status_code == 200
    sign_out(browser)
    assert not is_open(copy)
    for method, path in (("POST", "/api/messages"), ("GET", "/api/notifications/stream"), ("POST", "/inbox/read")):
        response = copy.open(path, method=method, json=_message(cast), headers=headers)
        assert response.status_code == 401, path
    assert copy.get("/rq/").status_code == 303
    assert copy.post("/rq/queue/bulk/requeue", headers=headers).status_code == 401
    assert "Signed in as" not in copy.get("/login").text


def test_signing_out_ends_one_session_and_signing_out_everywhere_all_of_the_user(sign_in, api, cast):
    browsers = [sign_in(cast.vip) for _ in range(3)]
    stranger = sign_in(cast.stranger)
    sign_out(browsers[0])
    assert [is_open(browser) for browser in browsers] == [False, True, True]
    sign_out(browsers[1], everywhere="1")
    assert [is_open(browser) for browser in browsers] == [False, False, False]
    again = sign_in(cast.vip)
    assert api(cast.vip).delete("/api/me/sessions").status_code == 204
    assert not is_open(again)
    assert is_open(stranger)
    assert api(cast.vip).get("/api/me").status_code == 200, "tokens stay valid"


def test_a_session_signs_out_everywhere_over_the_api_with_its_csrf_token(sign_in, cast):
    browser, other = sign_in(cast.vip), sign_in(cast.vip)
    assert browser.delete("/api/me/sessions").status_code == 403
    csrf = csrf_of(browser.get("/login").text)
    assert browser.delete("/api/me/sessions", headers={"X-CSRF-Token": csrf}).status_code == 204
    assert not is_open(browser)
    assert not is_open(other)


def test_signing_in_replaces_the_session_of_the_cookie(app, sign_in, cast):
    browser = app.test_client()
    browser.get("/login")
    copy = copy_of(browser)
    sign_in_again(browser, cast.vip)
    assert not is_open(copy), "signing in does not sign in a copy of the earlier cookie"
    first_session = copy_of(browser)
    sign_in_again(browser, cast.subscriber)
    assert not is_open(first_session)
    assert is_open(browser)
    assert Session.select().count() == 1
    csrf = csrf_of(browser.get("/login").text)
    assert browser.post("/login", data={"csrf": csrf, "token": "wrong"}).status_code == 401
    assert is_open(browser), "a wrong token does not end the session"


@pytest.mark.parametrize(
    ("column", "days", "ends"),
    [("last_seen_at", 6, False), ("last_seen_at", 7, True), ("created_at", 30, False), ("created_at", 31, True)],
)
def test_a_session_ends_when_idle_or_too_old(sign_in, cast, column, days, ends):
    browser = sign_in(cast.vip)
    execute(f"UPDATE session SET {column} = now() - make_interval(days => %(days)s)", {"days": days})
    assert is_open(browser) is not ends


def test_an_expired_token_ends_its_sessions(sign_in, cast):
    browser = sign_in(cast.vip)
    execute("UPDATE api_token SET expires_at = now() WHERE user_id = %(id)s", {"id": cast.vip.id})
    assert not is_open(browser)


def test_authentication_takes_one_statement_and_rarely_writes(sign_in, cast):
    browser = sign_in(cast.vip)
    with statements() as executed:
        assert browser.get("/login").status_code == 200
    assert len(executed) == 1
    assert browser.get("/api/me").status_code == 200
    [before] = Session.select()
    execute("UPDATE session SET last_seen_at = last_seen_at - interval '6 minutes'")
    assert browser.get("/api/me").status_code == 200
    [after] = Session.select()
    assert after.last_seen_at > before.last_seen_at
    browser.get("/api/me")
    [again] = Session.select()
    assert again.last_seen_at == after.last_seen_at


def test_the_cookie_has_no_token_and_the_database_no_session_id(sign_in, cast):
    browser = sign_in(cast.vip)
    with browser.session_transaction() as cookie:
        assert set(cookie) <= {"id", "csrf"}
        session_id = cookie["id"]
    [stored] = Session.select()
    assert len(session_id) == 43, "256 bits"
    assert bytes(stored.session_hash) == tokens.hash_token(session_id)
    assert browser.application.test_client().get(
        "/api/me", headers={"Authorization": f"Bearer {session_id}"}
    ).status_code == 401, "a session id is not a token"  # fmt: skip


def test_the_longest_idle_session_ends_beyond_the_limit_of_a_token(sign_in, cast):
    browser, stranger = sign_in(cast.vip), sign_in(cast.stranger)
    for _ in range(sessions.PER_TOKEN):
        sessions.open_session(cast.vip.token)
    assert not is_open(browser)
    assert is_open(stranger)
    assert Session.select().count() == sessions.PER_TOKEN + 1


def test_the_sweep_deletes_idle_sessions_in_bounded_batches(sign_in, cast):
    browser = sign_in(cast.vip)
    for _ in range(5):
        sessions.open_session(cast.stranger.token)
    execute(
        "UPDATE session SET last_seen_at = now() - interval '7 days' FROM api_token t"
        " WHERE t.id = session.token_id AND t.user_id = %(id)s",
        {"id": cast.stranger.id},
    )
    assert sessions.delete_idle_sessions(3) == 3
    maintenance.sweep()
    assert Session.select().count() == 1
    assert is_open(browser)


# --- own tokens


def test_users_list_and_revoke_their_own_tokens(sign_in, api, cast):
    _, second = tokens.create_token(cast.vip.user)
    browser = sign_in(cast.vip)
    shown = api(cast.vip).get("/api/me/tokens?limit=1").json
    [first] = shown["items"]
    assert set(first) == {"id", "created_at", "expires_at", "revoked_at", "current"}
    assert (first["current"], first["revoked_at"]) == (True, None)
    [other] = api(cast.vip).get(f"/api/me/tokens?cursor={shown['next']}").json["items"]
    assert other["current"] is False
    assert [one["current"] for one in browser.get("/api/me/tokens").json["items"]] == [True, False]

    assert api(cast.vip).delete(f"/api/me/tokens/{other['id']}").status_code == 204
    assert api(cast.vip).delete(f"/api/me/tokens/{other['id']}").status_code == 204, "repeating it is not an error"
    assert tokens.authenticate(second) is None
    assert [bool(one["revoked_at"]) for one in browser.get("/api/me/tokens").json["items"]] == [False, True]
    assert is_open(browser)
    csrf = csrf_of(browser.get("/login").text)
    assert browser.delete(f"/api/me/tokens/{first['id']}", headers={"X-CSRF-Token": csrf}).status_code == 204
    assert not is_open(browser)
    assert api(cast.vip).get("/api/me").status_code == 401


def test_another_users_token_is_404(api, cast):
    token = ApiToken.get(ApiToken.user == cast.subscriber.id)
    for person in (cast.vip, cast.admin):
        assert api(person).delete(f"/api/me/tokens/{token.id}").status_code == 404
        assert token.id not in [one["id"] for one in api(person).get("/api/me/tokens").json["items"]]
    assert api(cast.subscriber).get("/api/me").status_code == 200


def test_hsts_is_sent_only_with_an_https_public_url():
    for secure, address, expected in (
        ("1", "https://chat.example.com", "max-age=31536000"),
        ("1", "http://chat.example.com", None),
        ("0", "https://chat.example.com", None),
    ):
        with web_process(SESSION_COOKIE_SECURE=secure, PUBLIC_URL=address) as web:
            for path in ("/healthz", "/login", "/nowhere"):
                connection = HTTPConnection(urlsplit(web).netloc, timeout=30)
                with closing(connection):
                    connection.request("GET", path, headers={"X-Forwarded-Proto": "https"})
                    assert connection.getresponse().headers["Strict-Transport-Security"] == expected
