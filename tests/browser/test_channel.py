"""The page of a channel: the sidebar, older and newer messages, and links to a message."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect

from belfry.core.db import db
from belfry.messages import messages
from belfry.messages.history import PAGE_SIZE
from belfry.queue.queues import enqueue_run
from models import Message
from tests.browser.browsing import address, composer, message, shown, wait_until_live, watch_requests
from tests.people import Person
from tests.processes import wait_until

HALF = PAGE_SIZE // 2


def scroll_to(page: Page, where: str) -> None:
    page.locator("#log").evaluate(f"log => log.scrollTo(0, {where})")


@pytest.fixture
def message_ids(post) -> list[int]:
    """More messages than a page has; their ids, oldest first."""
    return [post(f"number {number}") for number in range(2 * PAGE_SIZE + 20)]


@contextmanager
def late_message(author: Person, channel_id: int) -> Iterator[int]:
    """A message whose transaction commits when the block ends; its run is enqueued then."""
    written, may_commit, posted = threading.Event(), threading.Event(), []

    def write() -> None:
        with db.atomic():
            posted.append(messages.post_message(author.user, channel_id, "late"))
            written.set()
            may_commit.wait()
        enqueue_run(posted[0].run_id)
        db.close()

    writer = threading.Thread(target=write)
    writer.start()
    assert written.wait(30)
    yield posted[0].message["id"]
    may_commit.set()
    writer.join()


def test_the_channels_are_a_list_of_links(visit, worker, cast, post) -> None:
    page = visit("/", cast.vip)
    channels = page.get_by_role("navigation", name="Channels")
    names = channels.get_by_role("list", name="Golden Signals").get_by_role("link")
    expect(names).to_have_text([re.compile("#general"), re.compile("#announcements"), re.compile("#vault private")])
    expect(channels.get_by_role("link", name="#general")).to_have_attribute("aria-current", "page")
    wait_until_live(page)
    post("look", cast.announcements, cast.admin)
    expect(channels.get_by_role("link", name="#announcements 1 unread")).to_be_visible()
    channels.get_by_role("link", name="#announcements").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("#announcements Golden Signals")
    expect(channels.get_by_role("link", name="#announcements")).to_have_attribute("aria-current", "page")
    expect(channels.locator(".count:visible")).to_have_count(0)
    expect(channels.get_by_role("link", name="API")).to_have_attribute("href", "/docs")
    expect(channels.get_by_role("link", name="Queues")).to_have_count(0)
    expect(page.get_by_text("There are no messages")).to_be_hidden()
    channels.get_by_role("link", name="#vault").click()
    expect(page.get_by_text("There are no messages yet.")).to_be_visible()


def test_an_admin_has_a_link_to_the_queues(visit, faults, cast) -> None:
    faults.allow("404.*favicon")  # rq-dashboard's page names an icon that does not exist
    page = visit("/", cast.admin)
    page.get_by_role("link", name="Queues").click()
    expect(page).to_have_url(re.compile("/rq/"))


def test_older_messages_load_while_scrolling_up(visit, cast, message_ids) -> None:
    page = visit(address(cast, cast.general), cast.subscriber)
    expect(message(page, message_ids[-1])).to_be_in_viewport()
    assert shown(page) == message_ids[-PAGE_SIZE:]
    top = message(page, message_ids[-PAGE_SIZE])
    scroll_to(page, "-log.scrollHeight")
    wait_until(lambda: shown(page) == message_ids[-2 * PAGE_SIZE :], "older messages")
    expect(top).to_be_in_viewport()  # the visible messages do not move
    scroll_to(page, "-log.scrollHeight")
    wait_until(lambda: shown(page) == message_ids, "all messages")
    expect(page.get_by_role("link", name="Older messages")).to_have_count(0)


def test_a_permanent_link_shows_an_old_message_with_a_way_to_the_newest(visit, cast, message_ids) -> None:
    page = visit(address(cast, cast.general, f"#message-{message_ids[40]}"), cast.subscriber)
    page.wait_for_url(f"**?around={message_ids[40]}#message-{message_ids[40]}")
    expect(message(page, message_ids[40])).to_be_in_viewport()
    assert shown(page) == message_ids[40 - HALF + 1 : 40 + HALF + 1]

    scroll_to(page, "0")  # newer ones are added below
    wait_until(lambda: shown(page)[-1] > message_ids[40 + HALF], "newer messages")
    expect(message(page, message_ids[40 + HALF])).to_be_in_viewport()  # the reading position is kept
    page.get_by_role("button", name="To the newest").click()
    page.wait_for_url("**?newest=1")
    expect(message(page, message_ids[-1])).to_be_in_viewport()
    page.go_back()
    expect(message(page, message_ids[40])).to_be_in_viewport()


def test_the_page_of_an_author_of_many_messages_sends_few_requests(visit, cast, message_ids) -> None:
    page = visit("/docs", cast.subscriber)
    requests = watch_requests(page, "fetch")
    page.goto(address(cast, cast.general))
    expect(page.locator("#messages progress")).to_have_count(5)
    page.wait_for_timeout(3_000)
    runs = {url for url in requests() if "/api/runs/" in url}
    assert len(runs) == 5
    assert len(requests()) < 40


def test_a_message_links_to_itself(visit, cast, message_ids) -> None:
    page = visit(address(cast, cast.general), cast.subscriber)
    message(page, message_ids[-3]).locator("a.when").click()
    page.wait_for_url(f"**?around={message_ids[-3]}#message-{message_ids[-3]}")
    expect(message(page, message_ids[-3])).to_be_in_viewport()


def test_a_link_to_a_deleted_message_says_so(visit, cast, post) -> None:
    deleted, _ = post("one"), post("two")
    Message.update(deleted_at=Message.created_at).where(Message.id == deleted).execute()
    page = visit(address(cast, cast.general, f"#message-{deleted}"), cast.subscriber)
    expect(page.get_by_text("This message does not exist any more.")).to_be_visible()


def test_new_messages_do_not_scroll_a_reader_of_old_ones(visit, worker, cast, message_ids, post) -> None:
    page = visit(address(cast, cast.general, "?newest=1"), cast.vip)
    wait_until_live(page)
    new = page.get_by_role("button", name="New messages")
    scroll_to(page, "-600")
    reading = page.locator("#messages li").nth(PAGE_SIZE // 2)
    before = reading.bounding_box()
    number = post("look")
    expect(new).to_be_visible()
    assert reading.bounding_box() == before
    new.click()
    expect(message(page, number)).to_be_in_viewport()
    expect(new).to_be_hidden()
    next_id = post("and look")
    expect(message(page, next_id)).to_be_in_viewport()  # a reader at the end stays there
    expect(new).to_be_hidden()


def test_a_late_commit_is_inserted_in_order(visit, worker, cast, post) -> None:
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    with late_message(cast.subscriber, cast.general) as late:
        next_id = post("before it, with a higher id")
        expect(message(page, next_id)).to_be_visible()
    expect(message(page, late)).to_be_visible()
    assert shown(page) == [late, next_id]


def test_a_message_that_arrives_during_a_refresh_stays(visit, worker, cast, post, api) -> None:
    edited = post("gold")
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    pending = []
    page.route(re.compile(r"/messages\?$"), lambda route: pending.append((route, route.fetch())))
    with late_message(cast.subscriber, cast.general) as late:
        next_id = post("before it, with a higher id")
        expect(message(page, next_id)).to_be_visible()
    wait_until(lambda: page.wait_for_timeout(50) or pending, "the refresh of the page")
    newest = post("meanwhile")
    expect(message(page, newest)).to_be_visible()
    route, response = pending[0]
    route.fulfill(response=response)
    expect(message(page, late)).to_be_visible()
    assert shown(page) == [edited, late, next_id, newest]


def test_a_muted_channel_is_live_without_notifications(visit, worker, cast, post, api) -> None:
    api(cast.vip).put(f"/api/channels/{cast.general}/preference", json={"level": "none"})
    page = visit("/login", cast.vip)
    page.clock.install()
    page.goto(address(cast, cast.general))
    wait_until_live(page)
    number = post("look")
    page.clock.fast_forward(30_000)
    expect(message(page, number)).to_be_in_viewport()


def test_an_admin_sees_new_messages_of_a_private_channel(visit, cast, post) -> None:
    page = visit("/login", cast.admin)
    page.clock.install()
    page.goto(address(cast, cast.vault))
    wait_until_live(page)
    number = post("look", cast.vault, cast.vip)
    page.clock.fast_forward(30_000)
    expect(message(page, number)).to_be_in_viewport()


def test_a_page_with_all_notifications_does_not_poll_with_each_ping(visit, cast, post) -> None:
    post("look")
    page = visit("/login", cast.vip)
    begin = 'event: unread\ndata: {"unread": 0, "mentions": 0, "channels": []}\n\n'
    body = f"retry: 100000\n\n{begin}" + "event: ping\ndata: {}\n\n" * 5
    page.route(re.compile(r"/stream(\?|$)"), lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    requests = watch_requests(page, "xhr")
    page.goto(address(cast, cast.general))
    wait_until(lambda: page.wait_for_timeout(50) or requests(), "the poll before the stream")
    page.wait_for_timeout(1_500)
    assert len(requests()) == 1


def test_a_user_without_a_server_is_shown_a_page_that_says_so(visit, cast) -> None:
    page = visit("/", cast.stranger)
    expect(page.get_by_role("heading", name="No channels yet")).to_be_visible()
    expect(page.get_by_text("not a member of any server")).to_be_visible()
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()


@pytest.mark.parametrize("who", ["subscriber", "lapsed"])
def test_the_page_says_why_the_reader_may_not_post(visit, cast, who) -> None:
    page = visit(address(cast, cast.announcements), cast.everybody[who])
    expect(page.locator("#may-not-post")).to_have_text(
        "Only admins can post in #announcements. You can read this channel."
    )
    expect(page.locator("#lapsed")).to_have_count(1 if who == "lapsed" else 0)
    expect(composer(page)).to_have_count(0)


def test_the_page_says_that_live_updates_need_a_subscription(visit, cast) -> None:
    page = visit(address(cast, cast.general), cast.lapsed)
    expect(page.get_by_text("Live updates need an active subscription")).to_be_visible()
    expect(page.locator("#connection")).to_have_text(re.compile("Not live"))
