"""The form for a new message: sending, suggestions, drafts and errors."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from models import Message
from tests.browser.browsing import address, composer, lose_first_response, shown, sign_in

ONE_PER_HOUR = {"RATE_LIMIT_MESSAGES": "1 per hour"}


def suggestions(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Who can be mentioned").get_by_role("option")


def status_of(page: Page) -> Locator:
    return page.locator("#compose-status")


def stored_contents() -> list[str]:
    """The contents of all messages, in order."""
    return [message.content for message in Message.select().order_by(Message.id)]


@pytest.fixture
def page(visit, cast) -> Page:
    return visit(address(cast, cast.general), cast.subscriber)


def test_the_button_and_enter_send_and_shift_enter_does_not(page) -> None:
    field = composer(page)
    field.fill("by the button")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#messages li .content").last).to_have_text("by the button")
    expect(field).to_be_empty()
    field.press_sequentially("first line")
    field.press("Shift+Enter")
    field.press_sequentially("second line")
    expect(field).to_have_value("first line\nsecond line")
    expect(field).to_have_attribute("rows", "2")
    field.press("Enter")
    expect(page.locator("#messages li .content").last).to_have_text(re.compile("first line\\s*second line"))
    expect(field).to_be_empty()
    expect(field).to_be_focused()
    expect(field).to_have_attribute("rows", "1")
    assert stored_contents() == ["by the button", "first line\nsecond line"]


def test_an_empty_message_is_not_sent(page) -> None:
    for empty in ("", "  ", "\n\n"):
        composer(page).fill(empty)
        composer(page).press("Enter")
    page.get_by_role("button", name="Send").click()
    composer(page).fill("something")
    composer(page).press("Enter")
    expect(page.locator("#messages li")).to_have_count(1)
    assert stored_contents() == ["something"]


def test_enter_twice_sends_once(page) -> None:
    composer(page).fill("once")
    composer(page).press("Enter")
    composer(page).press("Enter")
    expect(page.locator("#messages li")).to_have_count(1)
    expect(composer(page)).to_be_empty()
    assert stored_contents() == ["once"]


def test_a_name_is_completed_by_keyboard(page) -> None:
    field, options = composer(page), suggestions(page)
    field.press_sequentially("look, @")
    expect(options).to_have_count(5)  # the members who can see the channel
    field.press_sequentially("v")
    expect(options).to_have_text(["@vera Vera"])
    expect(page.locator("#suggestions-status")).to_have_text("One suggestion.")
    expect(field).to_have_attribute("aria-activedescendant", "suggestions-0")
    field.press("Enter")
    expect(field).to_have_value("look, @vera ")
    expect(options).to_have_count(0)

    field.press_sequentially("and @")
    expect(options.first).to_have_attribute("aria-selected", "true")
    field.press("ArrowUp")
    expect(options.last).to_have_attribute("aria-selected", "true")
    field.press("ArrowDown")
    field.press("ArrowDown")
    expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    chosen = options.nth(1).locator("strong").inner_text()
    field.press("Tab")
    expect(field).to_have_value(f"look, @vera and {chosen} ")
    expect(field).to_be_focused()

    field.press_sequentially("or @m")
    expect(options).to_have_count(1)
    field.press("Escape")
    expect(options).to_have_count(0)
    expect(field).to_have_value(f"look, @vera and {chosen} or @m")
    field.press("Enter")
    expect(page.locator("#messages .mention")).to_have_text(["@vera", chosen])


def test_a_name_is_completed_by_mouse_within_a_text(page) -> None:
    field = composer(page)
    field.press_sequentially("look, : gold")
    for _ in range(len(": gold")):
        field.press("ArrowLeft")
    field.press_sequentially("@mo")
    suggestions(page).filter(has_text="@moira").click()
    expect(field).to_have_value("look, @moira : gold")
    expect(field).to_be_focused()
    field.press_sequentially("please")
    expect(field).to_have_value("look, @moira please: gold")


def test_an_email_address_opens_no_suggestions(page) -> None:
    with page.expect_request("**/mention-suggestions?*") as request:
        composer(page).press_sequentially("me@v @v")
    assert "q=v" in request.value.url or request.value.url.endswith("q=")
    expect(suggestions(page)).to_have_count(1)
    composer(page).fill("me@v")
    expect(suggestions(page)).to_have_count(0)


def test_a_moderator_is_offered_groups(visit, cast) -> None:
    page = visit(address(cast, cast.general), cast.moderator)
    composer(page).press_sequentially("@")
    expect(suggestions(page).filter(has_text="@everyone")).to_be_visible()
    expect(suggestions(page).filter(has_text="@vip")).to_be_visible()


def test_a_mention_without_recipients_is_reported(page) -> None:
    composer(page).fill("hello @bobby")
    composer(page).press("Enter")
    expect(status_of(page)).to_have_text("@bobby is not a member of this server")
    expect(status_of(page)).not_to_have_class("wrong")
    composer(page).press_sequentially("x")
    expect(status_of(page)).to_be_empty()


@pytest.mark.parametrize("site", [ONE_PER_HOUR], indirect=True)
def test_the_text_stays_where_the_rate_limit_refuses_it(page, faults) -> None:
    faults.expect("status of 429")
    for text in ("one", "one too many"):
        composer(page).fill(text)
        composer(page).press("Enter")
        expect(page.locator("#messages li")).to_have_count(1)
    expect(status_of(page)).to_contain_text("Too many requests: 1 per 1 hour")
    expect(status_of(page)).to_have_class("wrong")
    expect(composer(page)).to_have_value("one too many")


def test_an_overlong_message_is_refused_and_stays(page, faults) -> None:
    faults.expect("status of 422")
    composer(page).fill("x" * 10_001)
    composer(page).press("Enter")
    expect(status_of(page)).to_have_text("Must have 1 to 10,000 characters after trimming.")
    assert len(composer(page).input_value()) == 10_001  # the text is not shortened silently
    composer(page).fill("🪙" * 10_000)
    composer(page).press("Enter")
    expect(page.locator("#messages li")).to_have_count(1)
    assert [len(content) for content in stored_contents()] == [10_000]


def test_a_draft_is_restored(page, cast) -> None:
    composer(page).fill("a beginning")
    page.get_by_role("link", name="Inbox").click()
    page.get_by_role("link", name="#general").click()
    expect(composer(page)).to_have_value("a beginning")
    page.reload()
    expect(composer(page)).to_have_value("a beginning")
    composer(page).press("Enter")
    expect(composer(page)).to_be_empty()
    page.reload()
    expect(composer(page)).to_be_empty()


def test_a_draft_is_not_shown_to_another_user(page, cast) -> None:
    composer(page).fill("a beginning")
    page.get_by_role("button", name="Sign out", exact=True).click()
    sign_in(page, cast.vip.token)
    page.goto(address(cast, cast.general))
    expect(composer(page)).to_be_empty()
    page.get_by_role("button", name="Sign out", exact=True).click()
    sign_in(page, cast.subscriber.token)
    page.goto(address(cast, cast.general))
    expect(composer(page)).to_have_value("a beginning")


@pytest.mark.parametrize("status", [409, 500, 503])
def test_a_message_that_may_have_been_posted_is_not_posted_twice(page, faults, status) -> None:
    faults.expect(f"status of {status}")
    faults.allow(f"response {status}")
    lose_first_response(page, lambda route: route.fulfill(status=status, json={"detail": "Not now."}))
    composer(page).fill("gold")
    composer(page).press("Enter")
    expect(status_of(page)).to_have_text("Not now.")
    composer(page).press("Enter")
    expect(composer(page)).to_be_empty()
    expect(page.locator("#messages li")).to_have_count(1)
    assert stored_contents() == ["gold"]


def test_another_text_after_a_lost_response_is_another_message(page, faults) -> None:
    faults.expect("net::ERR_FAILED")
    lose_first_response(page)
    composer(page).fill("gold")
    composer(page).press("Enter")
    expect(status_of(page)).to_have_class("wrong")
    composer(page).fill("silver")
    composer(page).press("Enter")
    expect(composer(page)).to_be_empty()
    assert stored_contents() == ["gold", "silver"]


def test_an_author_who_reads_old_messages_sees_the_posted_one(visit, cast, post) -> None:
    ids = [post(f"number {number}") for number in range(60)]
    page = visit(address(cast, cast.general, f"?around={ids[5]}#message-{ids[5]}"), cast.subscriber)
    composer(page).fill("new")
    composer(page).press("Enter")
    expect(page.locator("#messages li .content").last).to_have_text("new")
    expect(page.locator("#messages li").last).to_be_in_viewport()
    assert len(shown(page)) > 1


def test_posting_to_a_channel_closed_meanwhile_is_reported(page, faults, cast, api) -> None:
    faults.expect("status of 403")
    assert api(cast.admin).patch(f"/api/channels/{cast.general}", json={"posting": "admins"}).status_code == 200
    composer(page).fill("hello")
    composer(page).press("Enter")
    expect(status_of(page)).to_contain_text("Only admins can post in #general")
    expect(composer(page)).to_have_value("hello")
