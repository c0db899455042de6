"""A message is marked read when it was seen, and only then."""

import pytest
from playwright.sync_api import Page, expect

from belfry.core.db import fetch_all
from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from tests.browser.browsing import address, bell, message, wait_until_live
from tests.fanout_helpers import post as write_message

MOMENT = 1_500  # milliseconds: longer than a message must be in view until it is marked read
PHONE = {"width": 390, "height": 844}
HIDDEN = """() => {
    Object.defineProperty(document, 'visibilityState', { get: () => 'hidden', configurable: true });
    document.dispatchEvent(new Event('visibilitychange'));
}"""
VISIBLE = """() => {
    delete document.visibilityState;
    document.dispatchEvent(new Event('visibilitychange'));
}"""


@pytest.fixture
def unread(run_jobs, cast):
    """`unread(61, mention=5)`: notify vera of this many messages, one of which mentions her; their ids."""

    def write(number: int, mention: int | None = None) -> list[int]:
        texts = [f"number {at}" + (", @vera" if at == mention else "") + "\n\nand more" * 2 for at in range(number)]
        posted = [write_message(cast.subscriber, cast.general, text) for text in texts]
        queues.enqueue([WorkItem(run_id) for _, run_id in posted])
        run_jobs()
        return [message_id for message_id, _ in posted]

    return write


def unread_messages(cast) -> set[int]:
    """The ids of the messages whose notification vera has not read, from the database."""
    return {
        row["message_id"]
        for row in fetch_all(
            "SELECT message_id FROM notification WHERE user_id = %(id)s AND read_at IS NULL", {"id": cast.vip.id}
        )
    }


def in_view(page: Page) -> set[int]:
    """The ids of the messages of which any part is in view."""
    found = page.locator("#messages > li").evaluate_all(
        """items => items.filter(item => {
            const log = document.getElementById('log').getBoundingClientRect(), box = item.getBoundingClientRect();
            return box.bottom > log.top && box.top < log.bottom;
        }).map(item => Number(item.dataset.id))"""
    )
    return set(found)


@pytest.mark.parametrize("viewport", [None, PHONE], ids=["desktop", "phone"])
def test_of_61_unread_messages_only_those_in_view_are_read_and_the_unseen_mention_stays(visit, cast, unread, viewport):
    messages = unread(61, mention=58)
    page = visit(address(cast, cast.general), cast.vip, **({"viewport": viewport} if viewport else {}))
    expect(page.locator("#new")).to_be_in_viewport()
    expect(message(page, messages[0])).to_be_in_viewport()
    page.wait_for_timeout(MOMENT)
    shown = in_view(page)
    left = unread_messages(cast)
    assert left, "some messages are not in view"
    assert set(messages) - left <= shown
    assert messages[58] in left
    expect(bell(page)).to_have_text(str(len(left)))
    expect(page.locator("#bell")).to_have_class("mentions")
    expect(page.locator("#unread-bar")).to_contain_text(f"{len(left)} unread")
    page.get_by_role("button", name="To the mention").click()
    expect(message(page, messages[58])).to_be_in_viewport()
    expect(page.locator("#bell")).not_to_have_class("mentions")


def test_500_unread_messages_are_read_by_scrolling_to_the_newest(visit, cast, unread):
    messages = unread(500)
    page = visit(address(cast, cast.general), cast.vip)
    expect(message(page, messages[0])).to_be_in_viewport()
    page.wait_for_timeout(MOMENT)
    assert len(unread_messages(cast)) > 450
    for _ in range(200):
        page.locator("#log").evaluate("log => log.scrollBy(0, log.clientHeight * .8)")
        page.wait_for_timeout(700)
        if messages[-1] in in_view(page):
            break
    expect(message(page, messages[-1])).to_be_in_viewport()
    expect(bell(page)).to_be_hidden()
    assert unread_messages(cast) == set()


def test_the_newest_messages_are_one_click_away_and_leave_the_others_unread(visit, cast, unread):
    messages = unread(120)
    page = visit(address(cast, cast.general), cast.vip)
    page.get_by_role("button", name="To the newest").click()
    expect(message(page, messages[-1])).to_be_in_viewport()
    page.wait_for_timeout(MOMENT)
    left = unread_messages(cast)
    assert messages[-1] not in left
    assert messages[60] in left
    expect(page.locator("#unread-bar")).to_contain_text(f"{len(left)} unread")
    page.get_by_role("button", name="Mark all read").click()
    expect(bell(page)).to_be_hidden()
    expect(page.locator("#unread-bar")).to_be_hidden()
    assert unread_messages(cast) == set()


def test_what_one_tab_reads_is_read_in_the_other(visit, cast, unread):
    messages = unread(61)
    page = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(page)
    other = page.context.new_page()
    other.goto(address(cast, cast.general))
    expect(message(other, messages[0])).to_be_in_viewport()
    other.wait_for_timeout(MOMENT)
    left = len(unread_messages(cast))
    assert 0 < left < 61
    for one in (page, other):
        expect(bell(one)).to_have_text(str(left))


def test_a_hidden_tab_reads_nothing(visit, cast, unread, post, run_jobs):
    messages = unread(3)
    page = visit("/login", cast.vip)
    page.add_init_script(f"({HIDDEN})()")
    page.goto(address(cast, cast.general))
    page.wait_for_timeout(MOMENT)
    assert unread_messages(cast) == set(messages)
    page.evaluate(VISIBLE)
    expect(bell(page)).to_be_hidden()
    assert unread_messages(cast) == set()


def test_a_message_that_passes_by_is_not_read(visit, cast, unread):
    messages = unread(25)
    page = visit(address(cast, cast.general), cast.vip)
    expect(message(page, messages[0])).to_be_in_viewport()
    page.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    page.wait_for_timeout(MOMENT)
    assert messages[-1] not in unread_messages(cast)
    assert messages[14] in unread_messages(cast)


def test_messages_that_arrive_below_the_view_stay_unread_until_they_are_seen(visit, worker, cast, post, unread):
    unread(40)
    page = visit(address(cast, cast.general, "?newest=1"), cast.vip)
    wait_until_live(page)
    expect(bell(page)).to_be_visible()
    page.get_by_role("button", name="Mark all read").click()
    expect(bell(page)).to_be_hidden()
    page.locator("#log").evaluate("log => { log.scrollTop = -log.scrollHeight; }")
    arrived = post("a signal")
    expect(bell(page)).to_have_text("1")
    page.wait_for_timeout(MOMENT)
    assert unread_messages(cast) == {arrived}
    page.get_by_role("button", name="New messages").click()
    expect(bell(page)).to_be_hidden()


def test_a_reader_at_the_end_reads_what_arrives(visit, worker, cast, post):
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    for number in range(5):
        arrived = post(f"signal {number}")
        expect(message(page, arrived)).to_be_in_viewport()
    expect(bell(page)).to_be_hidden()
    expect(page.locator("#unread-bar")).to_be_hidden()
    assert unread_messages(cast) == set()


def test_without_a_script_the_page_starts_at_the_first_unread_message_and_marks_what_it_contains(visit, cast, unread):
    messages = unread(61)
    page = visit("/login", cast.vip, java_script_enabled=False)
    page.goto(address(cast, cast.announcements))
    page.get_by_role("link", name="#general 61 unread").click()
    expect(page.locator("#new")).to_be_in_viewport()
    listed = set(page.locator("#messages > li").evaluate_all("items => items.map(item => Number(item.dataset.id))"))
    assert unread_messages(cast) == set(messages)
    page.get_by_role("button", name="Mark these read").click()
    assert unread_messages(cast) == set(messages) - listed
    assert len(listed) >= 25
    expect(page.locator("#new")).to_be_in_viewport()
