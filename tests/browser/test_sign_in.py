"""The login page."""

import pytest
from playwright.sync_api import expect

from tests.browser.browsing import accessibility_violations, sign_in, watch_requests


def test_signing_in_with_a_wrong_and_then_the_right_token(visit, faults, cast) -> None:
    faults.expect("status of 401")
    page = visit("/login?next=/docs")
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("unknown")
    expect(page.get_by_label("Token")).to_be_focused()
    expect(page.get_by_label("Token")).to_have_value("")

    page.get_by_label("Token").fill(cast.admin.token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/docs")
    page.goto("/login")
    expect(page.get_by_text("Signed in as ada.")).to_be_visible()


def test_signing_out(visit, cast) -> None:
    page = visit("/login", cast.subscriber)
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    expect(page.get_by_text("Signed in as")).to_have_count(0)


def test_two_browsers_have_separate_sessions(visit, cast) -> None:
    one, other = visit("/login", cast.admin), visit("/login", cast.subscriber)
    for page, name in ((one, "ada"), (other, "sam"), (one, "ada")):
        page.reload()
        expect(page.get_by_text(f"Signed in as {name}.")).to_be_visible()


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/login", "/docs"])
def test_axe_finds_nothing(visit, path, color_scheme) -> None:
    page = visit(path, color_scheme=color_scheme)
    assert accessibility_violations(page) == []


def test_axe_finds_nothing_after_a_wrong_token(visit, faults) -> None:
    faults.expect("status of 401")
    page = visit("/login", color_scheme="dark")
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    assert accessibility_violations(page) == []


def test_the_login_page_has_no_script(visit, cast) -> None:
    page = visit("about:blank")
    scripts = watch_requests(page, "script")
    page.goto("/login")
    expect(page.locator("script")).to_have_count(0)
    sign_in(page, cast.admin.token)
    assert scripts() == []
