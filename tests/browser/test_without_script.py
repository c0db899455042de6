"""Reading without JavaScript, and marking read by forms."""

import pytest
from playwright.sync_api import expect

from tests.browser.browsing import bell, composer, message, shown

WITHOUT_SCRIPT = {"java_script_enabled": False}


@pytest.fixture
def ids(post, cast, run_jobs) -> list[int]:
    ids = [post(f"number {number}") for number in range(60)] + [post("look, @vera", cast.announcements, cast.admin)]
    run_jobs()
    return ids


def test_channels_and_messages_are_readable_without_a_script(visit, cast, ids) -> None:
    page = visit("/", cast.vip, **WITHOUT_SCRIPT)
    expect(page.get_by_role("link", name="#general 60 unread")).to_be_visible()
    expect(page.get_by_role("link", name="#announcements 1 unread, 1 mentioning you")).to_be_visible()
    expect(page.get_by_role("link", name="Inbox, 61 unread, 1 mentioning you")).to_be_visible()
    expect(page).to_have_title("(61) #general – Belfry")
    notice = page.locator("noscript .notice")
    expect(notice).to_be_visible()
    assert "You are notified of every message here." in notice.evaluate("one => one.textContent")
    assert shown(page) == ids[:26]  # the first unread messages
    expect(message(page, ids[25])).to_contain_text("UTC")
    for gone in (composer(page), page.get_by_role("button", name="Why?"), page.locator("#setting-button")):
        expect(gone.locator("visible=true")).to_have_count(0)
    page.get_by_role("link", name="The newest").click()
    expect(message(page, ids[59])).to_be_in_viewport()
    page.get_by_role("link", name="Older messages").click()
    assert shown(page) == ids[:10]
    page.get_by_role("link", name="Newer messages").click()
    assert shown(page) == ids[10:60]
    expect(message(page, ids[10])).to_be_in_viewport()
    page.get_by_role("link", name="#announcements").click()
    expect(message(page, ids[60]).locator(".mention.me")).to_have_text("@vera")


def test_the_inbox_is_marked_read_without_a_script(visit, cast, ids) -> None:
    page = visit("/inbox?unread=1", cast.vip, **WITHOUT_SCRIPT)
    page.get_by_role("link", name="Older notifications").click()
    assert shown(page) == ids[10::-1]
    page.get_by_role("link", name="Unread", exact=True).click()
    page.locator(f"[data-id='{ids[60]}']").get_by_role("button", name="Mark read").click()
    expect(bell(page)).to_have_text("60")
    page.locator(f"[data-id='{ids[20]}']").get_by_role("link").click()
    page.wait_for_url(f"**?around={ids[20]}#message-{ids[20]}")
    expect(message(page, ids[20])).to_be_in_viewport()
    page.get_by_role("link", name="Inbox").click()
    page.get_by_role("button", name="Mark all read").click()
    expect(bell(page)).to_be_hidden()
    expect(page.get_by_role("button", name="Mark all read")).to_be_disabled()


def test_the_channels_are_reachable_on_a_phone_without_a_script(visit, cast, ids) -> None:
    page = visit("/", cast.vip, **WITHOUT_SCRIPT, viewport={"width": 390, "height": 844})
    page.get_by_role("button", name="Channels").click()
    page.get_by_role("link", name="#announcements").click()
    expect(message(page, ids[60])).to_be_in_viewport()


def test_signing_in_and_out_without_a_script(visit, cast) -> None:
    page = visit("/", **WITHOUT_SCRIPT)
    page.get_by_label("Token").fill(cast.vip.token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("#general")
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_label("Token")).to_be_visible()
