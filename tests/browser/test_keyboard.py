"""A whole visit by keyboard, with visible focus at each stop."""

import re

from playwright.sync_api import Locator, Page, expect

from tests.browser.browsing import address, bell, composer, message, wait_until_live

MAX_STOPS = 60  # Tab presses to reach any element


def has_visible_focus(page: Page) -> bool:
    """Whether the focus is visible: an outline of two pixels or more in an opaque colour."""
    return page.evaluate(
        """() => {
            const style = getComputedStyle(document.activeElement);
            return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2
                && !/^rgba\\(.*, 0\\)$/.test(style.outlineColor);
        }"""
    )


def tab_to(page: Page, target: Locator, key: str = "Tab") -> None:
    """Press Tab until the target has the focus. Each stop must be visible, with a visible focus."""
    stops = []
    for _ in range(MAX_STOPS):
        page.keyboard.press(key)
        stop = page.evaluate(
            "() => document.activeElement.outerHTML.slice(0, 120).replace(/\\s+/g, ' ')",
        )
        stops.append(stop)
        if stop.startswith("<body"):
            continue  # the browser's own stop after the last element
        assert has_visible_focus(page), f"the focus is not visible at {stop}"
        if target.evaluate("target => target === document.activeElement"):
            expect(target).to_be_in_viewport()
            return
    raise AssertionError(f"{key} does not reach the target; stops: {stops}")


def test_a_whole_visit_by_keyboard(visit, worker, cast, post) -> None:
    first, second = post("gold breaks out, @vera", cast.announcements, cast.admin), post("silver follows")
    page = visit("/")
    keyboard = page.keyboard

    # Sign in: the field has the focus.
    expect(page.get_by_label("Token")).to_be_focused()
    keyboard.insert_text(cast.vip.token)
    keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("#general")
    expect(bell(page)).to_have_text("1")  # the visible message is read; the other one is in #announcements

    # Skip the channels, or choose one.
    keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip the channels")).to_be_focused()
    expect(page.get_by_role("link", name="Skip the channels")).to_be_in_viewport()
    keyboard.press("Enter")
    tab_to(page, page.get_by_role("button", name=re.compile("^Notifications from")))
    tab_to(page, page.get_by_role("link", name="#announcements"), "Shift+Tab")
    keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("#announcements")
    expect(message(page, first)).to_be_visible()
    expect(bell(page)).to_be_hidden()
    tab_to(page, page.get_by_role("link", name="#general"))
    keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("#general")

    # Write a message with a mention.
    tab_to(page, page.get_by_role("log"))
    keyboard.press("PageUp")
    tab_to(page, composer(page))
    keyboard.type("look, @m")
    expect(page.get_by_role("option")).to_have_text(["@moira Moira"])
    keyboard.press("Enter")
    expect(composer(page)).to_have_value("look, @moira ")
    keyboard.press("Enter")
    expect(page.locator("#messages .mention")).to_have_text("@moira")
    expect(composer(page)).to_be_focused()
    assert has_visible_focus(page)

    # Open "Why?"; Escape returns the focus.
    why = message(page, second).get_by_role("button", name="Why?")
    tab_to(page, why, "Shift+Tab")
    keyboard.press("Enter")
    expect(page.locator("#why-answer")).to_contain_text("You were notified at")
    expect(page.get_by_role("dialog", name="Why?").get_by_role("button", name="Close")).to_be_focused()
    keyboard.press("Escape")
    expect(why).to_be_focused()
    assert has_visible_focus(page)
    run = page.get_by_role("button", name="Recipients")
    tab_to(page, run)
    keyboard.press("Space")
    expect(page.locator("#run-state")).to_contain_text("were notified")
    keyboard.press("Escape")
    expect(run).to_be_focused()

    # Change the preference.
    setting = page.get_by_role("button", name=re.compile("^Notifications from"))
    tab_to(page, setting, "Shift+Tab")
    keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name=re.compile("^Notifications from"))
    tab_to(page, dialog.get_by_label("every message"))
    keyboard.press("ArrowDown")
    expect(dialog.get_by_label("mentions only")).to_be_focused()
    expect(page.locator("#effect")).to_contain_text("only of messages that mention you")
    tab_to(page, dialog.get_by_role("button", name="For an hour"))
    keyboard.press("Enter")
    expect(page.locator("#effect")).to_contain_text("Until ")
    tab_to(page, dialog.get_by_role("button", name="Unmute"))
    keyboard.press("Enter")
    expect(dialog.get_by_role("button", name="For an hour")).to_be_focused()
    tab_to(page, dialog.get_by_role("button", name="Close"))
    keyboard.press("Enter")
    expect(setting).to_be_focused()

    # The inbox: open a message, go back, mark all read.
    tab_to(page, page.locator("#bell"))
    keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Inbox")
    wait_until_live(page)
    third, fourth = post("bronze, @vera"), post("and @vera iron")
    expect(bell(page)).to_have_text("2")
    tab_to(page, page.locator(f"#notifications [data-id='{fourth}']").get_by_role("button", name="Mark read"))
    keyboard.press("Enter")
    expect(bell(page)).to_have_text("1")
    link = page.locator(f"#notifications [data-id='{fourth}']").get_by_role("link")
    expect(link).to_be_focused()
    assert has_visible_focus(page)
    tab_to(page, page.get_by_role("button", name="Mark all read"), "Shift+Tab")
    keyboard.press("Enter")
    expect(bell(page)).to_be_hidden()
    expect(page.get_by_role("link", name="All", exact=True)).to_be_focused()
    assert has_visible_focus(page)
    tab_to(page, page.locator(f"#notifications [data-id='{third}']").get_by_role("link"))
    keyboard.press("Enter")
    page.wait_for_url(f"**#message-{third}")
    expect(message(page, third)).to_be_in_viewport()

    # Sign out.
    tab_to(page, page.get_by_role("button", name="Sign out", exact=True))
    keyboard.press("Enter")
    expect(page.get_by_label("Token")).to_be_focused()


def test_a_toast_is_reached_and_left_by_keyboard(visit, worker, cast, post) -> None:
    page = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(page)
    post("look")
    expect(page.locator("#toast")).to_contain_text("look")
    tab_to(page, page.locator("#toast").get_by_role("button", name="Dismiss"))
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_be_empty()
