"""On a phone the channels are a menu, and nothing is wider than the screen."""

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsing import address, composer, message, wait_until_live

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
NARROW = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}


def too_wide(page: Page) -> list[str]:
    """Elements that extend beyond the screen, without those that scroll inside a container."""
    return page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter((one) => one.checkVisibility() && !one.closest(".visually-hidden, .skip, pre, svg, h1, #channels"))
            .filter((one) => getComputedStyle(one).clipPath === "none")
            .map((one) => [one, one.getBoundingClientRect()])
            .filter(([, box]) => box.width && (box.right > innerWidth + 1 || box.left < -1))
            .map(([one, box]) => `${one.localName}#${one.id}.${one.className} ${box.left} ${box.right}`)"""
    )


def test_the_menu_opens_and_closes(visit, worker, cast, post) -> None:
    page = visit(address(cast, cast.general), cast.vip, **PHONE)
    channels = page.get_by_role("navigation", name="Channels")
    expect(channels).to_be_hidden()
    page.get_by_role("button", name="Channels").tap()
    expect(channels).to_be_visible()
    page.touchscreen.tap(380, 400)  # outside of it
    expect(channels).to_be_hidden()
    page.get_by_role("button", name="Channels").tap()
    channels.get_by_role("link", name="#vault").tap()
    expect(page.get_by_role("heading", level=1)).to_contain_text("#vault")
    expect(channels).to_be_hidden()
    page.get_by_role("button", name="Channels").focus()
    page.keyboard.press("Enter")
    expect(channels).to_be_visible()
    page.keyboard.press("Escape")
    expect(channels).to_be_hidden()
    expect(page.get_by_role("button", name="Channels")).to_be_focused()


def test_enter_inserts_a_line_break_and_the_button_sends(visit, cast) -> None:
    page = visit(address(cast, cast.general), cast.vip, **PHONE)
    composer(page).press_sequentially("one")
    composer(page).press("Enter")
    composer(page).press_sequentially("two")
    expect(composer(page)).to_have_value("one\ntwo")
    page.get_by_role("button", name="Send").tap()
    expect(page.locator("#messages li")).to_have_count(1)


@pytest.mark.parametrize("screen", [PHONE, NARROW], ids=["phone", "narrow"])
def test_nothing_is_wider_than_the_screen(visit, worker, cast, post, screen) -> None:
    long = post(f"{'gold' * 100} https://example.com/{'x' * 300}\n\n```\n{'wide ' * 100}\n```\n\n@vera")
    page = visit(address(cast, cast.general), cast.admin, **screen)
    expect(message(page, long)).to_be_visible()
    assert too_wide(page) == []
    page.get_by_role("button", name="Notifications from").tap()
    assert too_wide(page) == []
    page.keyboard.press("Escape")
    message(page, long).get_by_role("button", name="Why?").tap()
    expect(page.locator("#why-answer")).to_contain_text("You were")
    assert too_wide(page) == []
    page.keyboard.press("Escape")
    message(page, long).get_by_role("button", name="Recipients").tap()
    expect(page.locator("#run-state")).to_contain_text("were notified")
    assert too_wide(page) == []
    page.goto("/inbox")
    expect(page.locator("#notifications li")).to_have_count(1)
    wait_until_live(page)
    assert too_wide(page) == []
    page.goto(address(cast, cast.announcements))
    wait_until_live(page)
    post("x" * 300)
    expect(page.locator("#toast")).to_contain_text("xxx")
    assert too_wide(page) == []


@pytest.mark.parametrize("screen", [PHONE, NARROW], ids=["phone", "narrow"])
def test_the_api_document_fits_the_screen(visit, screen) -> None:
    page = visit("/docs", **screen)
    assert page.evaluate("document.documentElement.scrollWidth") == screen["viewport"]["width"]
    assert too_wide(page) == []
