"""The API as a page of this site asks it: by the session's cookie, and to write with its CSRF token."""

import pytest

from belfry import accounts
from models import ApiToken
from tests.people import csrf_of


@pytest.fixture
def page(client, cast):
    """The subscriber's browser after signing in."""
    form = client.get("/login").text
    client.post("/login", data={"csrf": csrf_of(form), "token": cast.subscriber.token})
    return client


def _message(cast) -> dict:
    return {"channel_id": cast.general, "content": "gold breaks out"}


def test_a_session_reads(page, cast):
    assert page.get("/api/me").json["id"] == cast.subscriber.id


def test_a_session_writes_with_its_csrf_token(page, cast):
    csrf = csrf_of(page.get("/login").text)
    answer = page.post("/api/messages", json=_message(cast), headers={"X-CSRF-Token": csrf})
    assert (answer.status_code, answer.json["author"]["id"]) == (201, cast.subscriber.id)


@pytest.mark.parametrize("csrf", [None, "", "wrong", "ü"])
def test_a_session_writes_nothing_without_it(page, cast, csrf):
    page.get("/login")  # one was given out
    headers = {} if csrf is None else {"X-CSRF-Token": csrf}
    preference = {"level": "none", "muted_until": None}
    for answer in (
        page.post("/api/messages", json=_message(cast), headers=headers),
        page.put(f"/api/channels/{cast.general}/preference", json=preference, headers=headers),
    ):
        assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    assert page.get(f"/api/channels/{cast.general}/messages").json["items"] == []


def test_before_a_page_gave_one_out_no_csrf_token_counts(page, cast):
    answer = page.post("/api/messages", json=_message(cast), headers={"X-CSRF-Token": ""})
    assert answer.status_code == 403


def test_with_an_authorization_header_the_session_counts_for_nothing(page, cast):
    assert page.get("/api/me", headers={"Authorization": f"Bearer {cast.vip.token}"}).json["id"] == cast.vip.id
    for header in ("Bearer wrong", "Basic x", ""):
        assert page.get("/api/me", headers={"Authorization": header}).status_code == 401


def test_a_session_ends_with_its_token(page, cast):
    token = ApiToken.get(ApiToken.token_hash == accounts.hash_token(cast.subscriber.token))
    accounts.revoke_token(cast.subscriber.id, token.id)
    answer = page.get("/api/me")
    assert (answer.status_code, answer.json["code"]) == (401, "unauthenticated")


def test_who_sends_a_token_gets_no_cookie(api, cast):
    assert "Set-Cookie" not in api(cast.subscriber).get("/api/me").headers
    assert "Set-Cookie" not in api().get("/api/me").headers
