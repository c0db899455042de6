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

ALL = [(screen, colors) for screen in (DESKTOP, PHONE) for colors in ("light", "dark")]
TWO = [(DESKTOP, "light"), (PHONE, "dark")]


def check(page: Page, where: str) -> None:
    assert accessibility_violations(page) == [], where


@pytest.mark.parametrize(("screen", "color_scheme"), ALL, ids=["light", "dark", "phone-light", "phone-dark"])
def test_channel_and_inbox(visit, worker, faults, cast, post, screen, color_scheme) -> None:
    faults.expect("status of 422")
    look = {"color_scheme": color_scheme, **screen}
    first = post(RICH)
    page = visit(address(cast, cast.announcements), cast.vip, **look)
    wait_until_live(page)
    check(page, "a channel without messages")
    second = post("and @vera")
    expect(page.locator("#toast")).to_contain_text("and @vera")
    check(page, "a toast, and counts")
    page.locator("#toast a").click()
    expect(message(page, second)).to_be_in_viewport()
    check(page, "a channel with a message that one was led to")

    composer(page).press_sequentially("@")
    expect(page.get_by_role("option").first).to_be_visible()
    check(page, "suggestions")
    composer(page).fill("x" * 10_001)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#compose-status")).to_have_class("wrong")
    check(page, "a text that is refused")
    composer(page).fill("hello @bobby")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#compose-status")).to_contain_text("is not a member of this server")
    check(page, "a warning, and how many were notified")

    page.get_by_role("button", name=re.compile("^Notifications from")).click()
    page.get_by_role("button", name="For an hour").click()
    expect(page.locator("#effect")).to_contain_text("Until")
    check(page, "the setting")
    page.keyboard.press("Escape")
    message(page, first).get_by_role("button", name="Why?").click()
    expect(page.locator("#why-answer")).to_contain_text("You were notified")
    check(page, "why")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Recipients").click()
    expect(page.locator("#run-state")).to_contain_text("were notified")
    check(page, "who was notified")
    page.keyboard.press("Escape")
    if screen is PHONE:
        page.get_by_role("button", name="Channels").click()
        expect(page.get_by_role("navigation", name="Channels")).to_be_visible()
        check(page, "the menu")

    post("unread")
    page.goto("/inbox")
    expect(page.locator("#notifications li")).to_have_count(2)
    check(page, "the inbox")
    page.goto("/inbox?unread=1")
    check(page, "what is unread")


@pytest.mark.parametrize(("screen", "color_scheme"), TWO, ids=["light", "phone-dark"])
def test_the_admins_form_and_a_long_channel(visit, cast, post, screen, color_scheme) -> None:
    ids = [post(f"number {number}") for number in range(60)]
    path = address(cast, cast.general, f"?around={ids[5]}#message-{ids[5]}")
    page = visit(path, cast.admin, color_scheme=color_scheme, **screen)
    check(page, "old messages, and those that are not notified yet")
    message(page, ids[5]).get_by_role("button", name="Recipients").click()
    expect(page.locator("#run-state")).to_contain_text("Waiting")
    check(page, "under way")
    page.keyboard.press("Escape")
    message(page, ids[5]).get_by_role("button", name="Why?").click()
    page.get_by_role("combobox").press_sequentially("ver")
    expect(page.get_by_role("option")).to_have_count(1)
    check(page, "whom an admin asks about")


@pytest.mark.parametrize(("screen", "color_scheme"), TWO, ids=["light", "phone-dark"])
def test_pages_of_users_with_fewer_rights(visit, faults, cast, api, screen, color_scheme) -> None:
    faults.expect("status of 401")
    look = {"color_scheme": color_scheme, **screen}
    page = visit(address(cast, cast.general), cast.lapsed, **look)
    expect(page.get_by_text("Live updates need an active subscription")).to_be_visible()
    check(page, "who has no subscription")
    page = visit("/", cast.stranger, **look)
    check(page, "who is in no server")
    page = visit(address(cast, cast.general), cast.vip, **look)
    wait_until_live(page)
    ada = api(cast.admin)
    (token,) = ada.get(f"/api/users/{cast.vip.id}/tokens").json["items"]
    ada.delete(f"/api/users/{cast.vip.id}/tokens/{token['id']}")
    expect(page.get_by_role("link", name="Sign in again")).to_be_visible()
    check(page, "signed out")


@pytest.mark.parametrize(("screen", "color_scheme"), TWO, ids=["light", "phone-dark"])
def test_error_pages(visit, faults, cast, screen, color_scheme) -> None:
    faults.expect("status of 404")
    page = visit(address(cast, cast.vault), cast.subscriber, color_scheme=color_scheme, **screen)
    expect(page.get_by_role("link", name="To the channels")).to_be_visible()
    check(page, "a channel that is not there")
    page = visit("/inbox", cast.subscriber, color_scheme=color_scheme, **screen)
    check(page, "an empty inbox")
