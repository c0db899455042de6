"""Keyboard shortcuts, and the short way to the message field."""

import re

from playwright.sync_api import expect

from tests.browser.browsing import accessibility_violations, address, composer, message


def test_the_message_field_is_three_keys_from_the_top(visit, cast):
    page = visit(address(cast, cast.general), cast.vip)
    for key in ("Tab", "Tab", "Enter"):
        page.keyboard.press(key)
    expect(composer(page)).to_be_focused()


def test_the_shortcuts_are_listed_and_work(visit, cast):
    page = visit(address(cast, cast.general), cast.vip)
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard")
    expect(dialog).to_be_visible()
    assert accessibility_violations(page) == []
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.keyboard.press("m")
    expect(composer(page)).to_be_focused()
    page.keyboard.type("i/?")
    expect(composer(page)).to_have_value("i/?")
    page.locator("#main").focus()
    page.keyboard.press("i")
    page.wait_for_url("**/inbox")
    page.keyboard.press("/")
    page.wait_for_url(re.compile(r"/search"))
    expect(page.get_by_role("searchbox")).to_be_focused()


def test_the_inbox_is_used_by_keyboard(visit, cast, post, run_jobs):
    first, second = post("one"), post("two")
    run_jobs()
    page = visit("/inbox", cast.vip)
    rows = page.locator("#notifications li")
    page.keyboard.press("j")
    expect(rows.nth(0).get_by_role("link")).to_be_focused()
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(rows.nth(0).get_by_role("link")).to_be_focused()
    page.keyboard.press("e")
    expect(rows.nth(0)).not_to_have_class(re.compile("unread"))
    page.keyboard.press("Delete")
    expect(rows).to_have_count(1)
    expect(page.locator(f"[data-id='{second}']")).to_have_count(0)
    expect(page.get_by_text("The notification was removed.")).to_be_visible()
    page.keyboard.press("z")
    expect(rows).to_have_count(2)
    expect(page.locator(f"[data-id='{first}']")).to_be_visible()


def test_the_search_finds_a_message_and_opens_it(visit, cast, post):
    found = post("gold breaks **out**")
    for number in range(60):
        post(f"number {number}")
    page = visit(address(cast, cast.general), cast.vip)
    page.get_by_role("link", name="Search").click()
    page.get_by_role("searchbox").fill("gold")
    page.keyboard.press("Enter")
    expect(page.locator("#found li")).to_have_count(1)
    expect(page.locator("#found")).to_contain_text("gold breaks out")
    assert accessibility_violations(page) == []
    page.locator("#found a").click()
    expect(message(page, found)).to_be_in_viewport()
    expect(message(page, found)).to_have_css("box-shadow", re.compile("inset"))


def test_a_lapsed_member_sees_that_notifications_are_off(visit, cast):
    page = visit(address(cast, cast.general), cast.lapsed)
    expect(page.locator("#lapsed")).to_contain_text("Notifications are off")
    expect(page.get_by_role("link", name="Subscribe")).to_have_count(0)
