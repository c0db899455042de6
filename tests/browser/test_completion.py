"""Mention suggestions open while a name is typed, and close when it is chosen, sent or left."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsing import address, composer

PAUSE = 400  # milliseconds: longer than the page waits before it requests suggestions


@pytest.fixture
def page(visit, cast) -> Page:
    return visit(address(cast, cast.general), cast.subscriber)


def test_sending_closes_the_list_and_cancels_its_request(page):
    for _ in range(2):
        composer(page).press_sequentially("thanks @vera")
        page.get_by_role("button", name="Send").click()
        expect(composer(page)).to_have_value("")
        page.wait_for_timeout(PAUSE)
        expect(page.locator("#suggestions")).to_be_hidden()
    composer(page).press("Enter")  # in an empty field
    composer(page).fill("the next one")
    composer(page).press("Enter")
    expect(page.locator("#messages > li").last).to_contain_text("the next one")


def test_a_late_answer_does_not_open_the_list_after_sending(page):
    page.route(re.compile("mention-suggestions"), lambda route: (page.wait_for_timeout(300), route.continue_()))
    composer(page).press_sequentially("@ve")
    page.wait_for_timeout(200)  # the request is on its way
    page.get_by_role("button", name="Send").click()
    expect(composer(page)).to_have_value("")
    page.wait_for_timeout(2 * PAUSE)
    expect(page.locator("#suggestions")).to_be_hidden()


def test_escape_closes_the_list_until_more_is_typed(page):
    composer(page).press_sequentially("@v")
    expect(page.locator("#suggestions")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#suggestions")).to_be_hidden()
    page.wait_for_timeout(PAUSE)
    expect(page.locator("#suggestions")).to_be_hidden()
    expect(composer(page)).to_have_value("@v")
    composer(page).press_sequentially("e")
    expect(page.get_by_role("option", name="@vera")).to_be_visible()


def test_arrows_choose_and_leave_the_caret_where_it_is(page):
    composer(page).press_sequentially("@")
    options = page.get_by_role("option")
    expect(options.first).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowUp")
    expect(options.last).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowDown")
    expect(options.first).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Tab")
    expect(composer(page)).to_have_value(re.compile(r"^@\S+ $"))
    expect(composer(page)).to_be_focused()


def test_the_list_follows_the_caret(page):
    composer(page).press_sequentially("@vera and")
    expect(page.locator("#suggestions")).to_be_hidden()
    for _ in range(len(" and")):
        page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("option", name="@vera")).to_be_visible()
    page.keyboard.press("End")
    expect(page.locator("#suggestions")).to_be_hidden()


def test_shift_tab_leaves_the_field_and_closes_the_list(page):
    composer(page).press_sequentially("@ve")
    expect(page.locator("#suggestions")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    expect(composer(page)).not_to_be_focused()
    expect(page.locator("#suggestions")).to_be_hidden()


def test_a_touch_chooses_and_the_keyboard_stays_open(visit, cast):
    page = visit(
        address(cast, cast.general),
        cast.subscriber,
        viewport={"width": 390, "height": 844},
        has_touch=True,
        is_mobile=True,
    )
    composer(page).tap()
    composer(page).press_sequentially("@ve")
    page.get_by_role("option", name="@vera").tap()
    expect(composer(page)).to_have_value("@vera ")
    expect(composer(page)).to_be_focused()
    expect(page.locator("#suggestions")).to_be_hidden()
