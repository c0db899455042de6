"""axe-core finds no violation on any screen, in light and dark colours, on a desktop and a phone."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsing import accessibility_violations, address, composer, message, wait_until_live

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
RICH = """# Gold

*breaks* **out**, @vera, see [the chart](https://example.com/chart) and `code`

> as was said

- one
- two

```
1 < 2
```
"""

ALL_SCREENS = [(screen, colors) for screen in (DESKTOP, PHONE) for colors in ("light", "dark")]
TWO_SCREENS = [(DESKTOP, "light"), (PHONE, "dark")]


def assert_accessible(page: Page, state: str) -> None:
    assert accessibility_violations(page) == [], state


@pytest.mark.parametrize(("screen", "color_scheme"), ALL_SCREENS, ids=["light", "dark", "phone-light", "phone-dark"])
def test_channel_and_inbox(visit, worker, faults, cast, post, screen, color_scheme) -> None:
    faults.expect("status of 422")
    options = {"color_scheme": color_scheme, **screen}
    first = post(RICH)
    page = visit(address(cast, cast.announcements), cast.vip, **options)
    wait_until_live(page)
    assert_accessible(page, "a channel without messages")
    second = post("and @vera")
    expect(page.locator("#toast")).to_contain_text("and @vera")
    assert_accessible(page, "a toast and unread counts")
    page.locator("#toast a").click()
    expect(message(page, second)).to_be_in_viewport()
    assert_accessible(page, "a channel after following the link to a message")

    composer(page).press_sequentially("@")
    expect(page.get_by_role("option").first).to_be_visible()
    assert_accessible(page, "suggestions")
    composer(page).fill("x" * 10_001)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#compose-status")).to_have_class("wrong")
    assert_accessible(page, "a refused message")
    composer(page).fill("hello @bobby")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#compose-status")).to_contain_text("is not a member of this server")
    assert_accessible(page, "a warning and the number of notified members")

    page.get_by_role("button", name=re.compile("^Notifications from")).click()
    page.get_by_role("button", name="For an hour").click()
    expect(page.locator("#effect")).to_contain_text("Until")
    assert_accessible(page, "the preference dialog")
    page.keyboard.press("Escape")
    message(page, first).get_by_role("button", name="Why?").click()
    expect(page.locator("#why-answer")).to_contain_text("You were notified")
    assert_accessible(page, "the dialog Why?")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Recipients").click()
    expect(page.locator("#run-state")).to_contain_text("were notified")
    assert_accessible(page, "the recipients dialog")
    page.keyboard.press("Escape")
    if screen is PHONE:
        page.get_by_role("button", name="Channels").click()
        expect(page.get_by_role("navigation", name="Channels")).to_be_visible()
        assert_accessible(page, "the channel menu")

    post("unread")
    page.goto("/inbox")
    expect(page.locator("#notifications li")).to_have_count(2)
    assert_accessible(page, "the inbox")
    page.goto("/inbox?unread=1")
    assert_accessible(page, "the unread notifications")


@pytest.mark.parametrize(("screen", "color_scheme"), TWO_SCREENS, ids=["light", "phone-dark"])
def test_the_admins_form_and_a_long_channel(visit, cast, post, screen, color_scheme) -> None:
    ids = [post(f"number {number}") for number in range(60)]
    path = address(cast, cast.general, f"?around={ids[5]}#message-{ids[5]}")
    page = visit(path, cast.admin, color_scheme=color_scheme, **screen)
    assert_accessible(page, "old messages with unfinished runs")
    message(page, ids[5]).get_by_role("button", name="Recipients").click()
    expect(page.locator("#run-state")).to_contain_text("Waiting")
    assert_accessible(page, "the recipients of an unfinished run")
    page.keyboard.press("Escape")
    message(page, ids[5]).get_by_role("button", name="Why?").click()
    page.get_by_role("combobox").press_sequentially("ver")
    expect(page.get_by_role("option")).to_have_count(1)
    assert_accessible(page, "the user suggestions of Why?")


@pytest.mark.parametrize(("screen", "color_scheme"), TWO_SCREENS, ids=["light", "phone-dark"])
def test_pages_of_users_with_fewer_rights(visit, faults, cast, api, screen, color_scheme) -> None:
    faults.expect("status of 401")
    options = {"color_scheme": color_scheme, **screen}
    page = visit(address(cast, cast.general), cast.lapsed, **options)
    expect(page.get_by_text("Live updates need an active subscription")).to_be_visible()
    assert_accessible(page, "a user without a subscription")
    page = visit("/", cast.stranger, **options)
    assert_accessible(page, "a user without a server")
    page = visit(address(cast, cast.general), cast.vip, **options)
    wait_until_live(page)
    ada = api(cast.admin)
    (token,) = ada.get(f"/api/users/{cast.vip.id}/tokens").json["items"]
    ada.delete(f"/api/users/{cast.vip.id}/tokens/{token['id']}")
    expect(page.get_by_role("link", name="Sign in again")).to_be_visible()
    assert_accessible(page, "an ended session")


@pytest.mark.parametrize(("screen", "color_scheme"), TWO_SCREENS, ids=["light", "phone-dark"])
def test_error_pages(visit, faults, cast, screen, color_scheme) -> None:
    faults.expect("status of 404")
    page = visit(address(cast, cast.vault), cast.subscriber, color_scheme=color_scheme, **screen)
    expect(page.get_by_role("link", name="To the channels")).to_be_visible()
    assert_accessible(page, "the error page of an invisible channel")
    page = visit("/inbox", cast.subscriber, color_scheme=color_scheme, **screen)
    assert_accessible(page, "an empty inbox")
