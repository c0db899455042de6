"""The inbox in a browser: unread notifications, marking them read, and opening a message."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.browsing import bell, message, shown, wait_until_live, watch_requests
from tests.processes import wait_until


def item(page: Page, message_id: int) -> Locator:
    return page.locator(f"#notifications li[data-id='{message_id}']")


@pytest.fixture
def notified(post, cast, run_jobs) -> list[int]:
    """Three messages of which vera was notified, the last one mentioning her; their ids."""
    ids = [post("gold breaks out"), post("silver follows", cast.announcements, cast.admin), post("look, @vera")]
    run_jobs()
    return ids


def test_one_notification_is_marked_read_and_then_all(visit, cast, notified) -> None:
    page = visit("/inbox", cast.vip)
    assert shown(page) == [notified[2], notified[0], notified[1]]  # by channel
    expect(bell(page)).to_have_text("3")
    expect(item(page, notified[2]).locator(".tag")).to_have_text("you")
    item(page, notified[1]).get_by_role("button", name="Mark read").click()
    expect(bell(page)).to_have_text("2")
    expect(item(page, notified[1]).get_by_role("button", name="Mark read")).to_have_count(0)
    expect(item(page, notified[1]).get_by_role("link")).to_be_focused()  # the focus stays in the row

    page.get_by_role("link", name="Unread", exact=True).click()
    page.wait_for_url("**/inbox?unread=1")
    expect(page.get_by_role("link", name="Unread", exact=True)).to_have_attribute("aria-current", "page")
    assert shown(page) == [notified[2], notified[0]]
    item(page, notified[2]).get_by_role("button", name="Mark read").click()
    wait_until(lambda: shown(page) == [notified[0]], "one unread notification")
    expect(item(page, notified[0]).get_by_role("link")).to_be_focused()
    page.get_by_role("button", name="Mark all read").click()
    expect(page.get_by_text("Nothing unread.")).to_be_visible()
    expect(page.get_by_role("button", name="Mark all read")).to_be_disabled()
    expect(bell(page)).to_be_hidden()
    expect(page).to_have_title("Inbox – Belfry")
    page.get_by_role("link", name="All", exact=True).click()
    wait_until(lambda: set(shown(page)) == set(notified), "all of them")
    expect(page.get_by_role("button", name=re.compile("Mark read"))).to_have_count(0)


@pytest.mark.parametrize("status", [429, 503])
def test_the_form_is_used_where_the_script_fails(visit, faults, cast, notified, status) -> None:
    faults.expect(f"status of {status}")
    faults.allow(f"response {status}")
    page = visit("/inbox", cast.vip)
    page.route("**/api/notifications/read", lambda route: route.fulfill(status=status, json={"detail": "Not now."}))
    item(page, notified[1]).get_by_role("button", name="Mark read").click()
    expect(item(page, notified[1]).get_by_role("button", name="Mark read")).to_have_count(0)
    expect(bell(page)).to_have_text("2")  # and not 0


def test_a_failing_count_marks_only_the_chosen_notification(visit, faults, cast, notified) -> None:
    faults.expect("status of 429")
    page = visit("/inbox", cast.vip)
    page.route("**/api/notifications/unread-count", lambda route: route.fulfill(status=429, json={}))
    page.route("**/api/notifications/stream", lambda route: route.abort())
    faults.allow("net::ERR_FAILED")
    page.reload()
    marked = []
    page.on("request", lambda request: marked.append(request.url) if request.method == "POST" else None)
    item(page, notified[1]).get_by_role("button", name="Mark read").click()
    expect(item(page, notified[1]).get_by_role("button", name="Mark read")).to_have_count(0)
    assert [url.rsplit("/", 2)[-2:] for url in marked] == [["notifications", "read"]]


def test_a_new_notification_appears(visit, worker, cast, notified, post) -> None:
    page = visit("/inbox", cast.vip)
    wait_until_live(page)
    page.get_by_role("button", name="Mark all read").click()
    expect(page.get_by_role("button", name="Mark all read")).to_be_disabled()
    number = post("and now?")
    expect(item(page, number)).to_contain_text("Sam: and now?")
    expect(page.get_by_role("button", name="Mark all read")).to_be_enabled()
    expect(page.locator("#toast")).to_be_empty()  # it is in view


def test_many_new_notifications_cause_few_requests(visit, worker, cast, post) -> None:
    page = visit("/inbox", cast.vip)
    wait_until_live(page)
    requests = watch_requests(page, "xhr")
    for number in range(60):
        last = post(f"number {number}")
        page.wait_for_timeout(30)  # a run for each
    expect(item(page, last)).to_be_visible()
    expect(bell(page)).to_have_text("60")
    assert len(requests()) < 12


def test_a_notification_opens_an_old_message(visit, cast, notified, post, run_jobs) -> None:
    for number in range(60):
        post(f"number {number}")
    run_jobs()
    page = visit(f"/inbox?before={notified[2] + 1}", cast.vip)
    item(page, notified[2]).get_by_role("link").click()
    page.wait_for_url(f"**?around={notified[2]}#message-{notified[2]}")
    expect(message(page, notified[2])).to_be_in_viewport()
    expect(message(page, notified[2]).locator(".tag")).to_have_text("mentions you")
    expect(message(page, notified[2]).locator(".mention.me")).to_have_text("@vera")


def test_a_seen_message_is_read_in_the_inbox(visit, cast, notified) -> None:
    page = visit("/inbox", cast.vip)
    item(page, notified[1]).get_by_role("link").click()
    expect(bell(page)).to_have_text("2")
    page.get_by_role("link", name="#general").click()
    expect(bell(page)).to_be_hidden()


def test_older_notifications_are_on_another_page(visit, cast, post, run_jobs) -> None:
    ids = [post(f"number {number}") for number in range(60)]
    run_jobs()
    page = visit("/inbox", cast.vip)
    assert shown(page) == ids[:-51:-1]
    page.get_by_role("link", name="Older notifications").click()
    page.wait_for_url("**/inbox?before=*")
    assert shown(page) == ids[9::-1]


def test_a_retracted_notification_disappears(visit, worker, cast, post, api) -> None:
    page = visit("/inbox", cast.vip)
    wait_until_live(page)
    kept, deleted = post("kept"), post("deleted")
    expect(item(page, deleted)).to_be_visible()
    api(cast.subscriber).delete(f"/api/messages/{deleted}")
    expect(item(page, deleted)).to_have_count(0)
    expect(item(page, kept)).to_be_visible()
    expect(bell(page)).to_have_text("1")


def test_an_empty_inbox_says_so(visit, cast) -> None:
    page = visit("/inbox", cast.vip)
    expect(page.get_by_text("No notifications yet.")).to_be_visible()
    expect(page.get_by_role("button", name="Mark all read")).to_be_disabled()
