"""A login link signs a user in once, within ten minutes, and is no token."""

import re

import pytest

from belfry.core.db import execute
from belfry.identity import tokens
from models import ApiToken
from tests.people import csrf_of


@pytest.fixture
def secret(cast) -> str:
    return tokens.create_login_link(cast.vip.user)


def use(app, secret: str):
    """Open a link in a new browser and press its button: (the browser, the response)."""
    browser = app.test_client()
    opened = browser.get(f"/login/link/{secret}")
    assert opened.status_code == 200
    response = browser.post("/login", data={"csrf": csrf_of(opened.text), "token": secret, "next": "/"})
    return browser, response


def test_a_link_signs_in_once(app, secret):
    browser, response = use(app, secret)
    assert (response.status_code, response.location) == (303, "/")
    assert browser.get("/api/me").get_json()["username"] == "vera"
    other, again = use(app, secret)
    assert (again.status_code, "used before" in again.text) == (401, True)
    assert other.get("/api/me").status_code == 401
    assert browser.get("/api/me").status_code == 200, "the first session stays open"


def test_opening_a_link_does_not_use_it(app, secret):
    for _ in range(3):
        assert app.test_client().get(f"/login/link/{secret}").status_code == 200
    assert use(app, secret)[1].status_code == 303


def test_a_link_expires(app, secret):
    execute("UPDATE api_token SET expires_at = now() - interval '1 second' WHERE expires_at IS NOT NULL")
    assert use(app, secret)[1].status_code == 401


def test_a_link_is_no_token(app, secret):
    response = app.test_client().get("/api/me", headers={"Authorization": f"Bearer {secret}"})
    assert response.status_code == 401
    assert use(app, secret)[1].status_code == 303, "and it can still be used"


def test_the_session_can_be_ended_by_revoking_its_token(app, api, cast, secret):
    browser, _ = use(app, secret)
    newest = ApiToken.select().order_by(ApiToken.id.desc()).first()
    assert newest.expires_at is not None
    assert api(cast.vip).delete(f"/api/me/tokens/{newest.id}").status_code == 204
    assert browser.get("/api/me").status_code == 401


def test_the_command_prints_a_link(app, command, cast):
    printed = command("login-link", "vera", code=0).output.strip()
    found = re.fullmatch(r"http://localhost:8000/login/link/(\S+)", printed)
    assert found, printed
    assert use(app, found[1])[1].status_code == 303
    assert "nobody" in command("login-link", "nobody", code=1).output
