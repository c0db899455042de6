"""Outages: no message is missed or repeated, and the page says what happened."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from config import settings
from models import Message, Notification
from tests.browser.browsing import (
    address,
    bell,
    composer,
    lose_first_response,
    message,
    shown,
    wait_until_live,
    watch_requests,
)
from tests.people import Person
from tests.processes import RedisProxy, WebProxy, open_redis_proxy, wait_until, web_process, worker_process

STREAM = re.compile(r"/api/notifications/stream(\?|$)")
NETWORK = r"net::ERR_(INTERNET_DISCONNECTED|\w*CONNECT\w+|INCOMPLETE_CHUNKED_ENCODING|EMPTY_RESPONSE|FAILED)"
RECORD_TOASTS = """() => {
    window.toasts = [];
    new MutationObserver((records) => {
        for (const record of records) for (const node of record.addedNodes)
            if (node.localName === "a") window.toasts.push(node.querySelector("span").textContent);
    }).observe(document.getElementById("toast"), { childList: true });
}"""


class Web:
    """A web process behind a proxy. It can be stopped and replaced at the same address."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._stack = ExitStack()
        self.proxy = WebProxy(self._stack.enter_context(web_process(**environment)))
        self.address = self.proxy.address

    def stop(self) -> None:
        self._stack.close()

    def start(self) -> None:
        self.proxy.target = urlsplit(self._stack.enter_context(web_process(**self._environment)))


@pytest.fixture
def redis_proxy() -> Iterator[RedisProxy]:
    with open_redis_proxy(settings.redis_url) as proxy:
        yield proxy


@pytest.fixture
def web(redis_proxy) -> Iterator[Web]:
    """The web process, with Redis behind a proxy as well."""
    web = Web(REDIS_URL=redis_proxy.url)
    yield web
    web.proxy.close()
    web.stop()


@pytest.fixture
def site(web) -> str:
    return web.address


def expect_state(page: Page, state: str) -> None:
    expect(page.locator("#connection")).to_have_text(re.compile(state))


def go_offline(page: Page, web: Web) -> None:
    """Take the browser offline, and cut its connections: Playwright's switch does not cut an open stream."""
    page.context.set_offline(True)
    web.proxy.cut_connections()
    expect_state(page, "Offline")


def go_online(page: Page, web: Web) -> None:
    web.proxy.accept_connections()
    page.context.set_offline(False)


def notified(person: Person) -> int:
    return Notification.select().where(Notification.user_id == person.id).count()


def test_a_page_that_was_offline_shows_what_it_missed(visit, web, worker, faults, cast, post) -> None:
    faults.allow(NETWORK)
    page = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(page)
    before = post("before", cast.announcements, cast.admin)
    expect(message(page, before)).to_be_visible()
    expect(bell(page)).to_be_hidden()
    go_offline(page, web)
    in_general = [post("one"), post("two, @vera")]
    in_announcements = [post(f"three {number}", cast.announcements, cast.admin) for number in range(3)]
    wait_until(lambda: notified(cast.vip) == 6, "vera to be notified")
    page.wait_for_timeout(300)
    assert shown(page) == [before]
    expect(bell(page)).to_be_hidden()
    go_online(page, web)
    expect_state(page, "Live")
    expect(message(page, in_announcements[-1])).to_be_visible()
    expect(bell(page)).to_have_text(str(len(in_general)))  # visible messages are read
    expect(page.locator("#bell")).to_have_class("mentions")
    after = post("after", cast.announcements, cast.admin)
    expect(message(page, after)).to_be_visible()
    assert shown(page) == [before, *in_announcements, after]


def test_edits_and_deletions_during_an_outage_are_shown(visit, web, worker, faults, cast, post, api) -> None:
    faults.allow(NETWORK)
    edited, deleted = post("gold"), post("tin")
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    go_offline(page, web)
    sam = api(cast.subscriber)
    assert sam.patch(f"/api/messages/{edited}", json={"content": "**silver**"}).status_code == 200
    assert sam.delete(f"/api/messages/{deleted}").status_code == 200
    go_online(page, web)
    expect(message(page, edited).locator("strong", has_text="silver")).to_be_visible()
    expect(message(page, edited)).to_contain_text("edited")
    expect(message(page, deleted)).to_have_count(0)


def test_the_web_process_restarts(visit, web, worker, faults, cast, post) -> None:
    faults.allow(NETWORK)
    page = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(page)
    page.evaluate(RECORD_TOASTS)
    texts = [f"number {number}" for number in range(6)]
    post(texts[0])
    expect(bell(page)).to_have_text("1")
    web.stop()
    expect_state(page, "Reconnecting")
    for text in texts[1:4]:
        post(text)
    seen = post("seen", cast.announcements, cast.admin)
    web.start()
    expect_state(page, "Live")
    expect(bell(page)).to_have_text("4")
    expect(message(page, seen)).to_be_visible()
    for text in texts[4:]:
        post(text)
    expect(bell(page)).to_have_text("6")
    assert page.evaluate("window.toasts") == [f"Sam: {text}" for text in texts]  # each once, in order


def test_a_broken_stream_resumes(visit, web, worker, faults, cast, post) -> None:
    faults.expect(NETWORK)
    page = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(page)
    page.evaluate(RECORD_TOASTS)
    texts = [f"number {number}" for number in range(9)]
    for number, text in enumerate(texts, start=1):
        if number % 3 == 0:
            web.proxy.cut_connections()
            post(text)
            wait_until(lambda: notified(cast.vip) == number, "vera to be notified")  # noqa: B023
            web.proxy.accept_connections()
        else:
            post(text)
        expect(bell(page)).to_have_text(str(number))
    assert page.evaluate("window.toasts") == [f"Sam: {text}" for text in texts]


def test_live_updates_continue_after_a_redis_outage(visit, redis_proxy, cast) -> None:
    with worker_process(REDIS_URL=redis_proxy.url):
        writer = visit(address(cast, cast.general), cast.subscriber)
        reader = visit(address(cast, cast.announcements), cast.vip)
        wait_until_live(reader)
        redis_proxy.cut_connections()
        for number in range(2):
            composer(writer).fill(f"while Redis is unavailable {number}")
            composer(writer).press("Enter")
            expect(writer.locator("#messages li")).to_have_count(number + 1)
        expect_state(reader, "Live")
        redis_proxy.accept_connections()
        expect(bell(reader)).to_have_text("2")
        composer(writer).fill("and after it")
        composer(writer).press("Enter")
        expect(bell(reader)).to_have_text("3")


def test_an_ended_session_is_reported(visit, faults, cast, api) -> None:
    faults.expect("status of 401")
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    composer(page).fill("a beginning")
    ada = api(cast.admin)
    (token,) = ada.get(f"/api/users/{cast.vip.id}/tokens").json["items"]
    new_token = ada.post(f"/api/users/{cast.vip.id}/tokens", json={}).json["token"]
    assert ada.delete(f"/api/users/{cast.vip.id}/tokens/{token['id']}").status_code == 204
    expect_state(page, "Signed out")
    expect(page.get_by_text("You are signed out.")).to_be_visible()
    composer(page).press("Enter")
    expect(page.locator("#compose-status")).to_have_class("wrong")
    page.get_by_role("link", name="Sign in again").click()
    page.get_by_label("Token").fill(new_token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("#general")
    expect(composer(page)).to_have_value("a beginning")


def test_a_session_that_ends_while_offline_is_reported(visit, web, faults, cast, api) -> None:
    faults.expect("status of 401")
    faults.allow(NETWORK)
    page = visit("/inbox", cast.vip)
    wait_until_live(page)
    go_offline(page, web)
    ada = api(cast.admin)
    (token,) = ada.get(f"/api/users/{cast.vip.id}/tokens").json["items"]
    assert ada.delete(f"/api/users/{cast.vip.id}/tokens/{token['id']}").status_code == 204
    go_online(page, web)
    expect_state(page, "Signed out")


def test_an_ended_subscription_is_reported(visit, faults, cast, api) -> None:
    faults.expect("status of 403")
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    api(cast.admin).put(f"/api/users/{cast.vip.id}/subscription", json={"status": "canceled"})
    expect_state(page, "Not live")
    expect(page.get_by_text("Live updates need an active subscription")).to_be_visible()


@pytest.mark.parametrize("status", [501, 503])
def test_a_page_without_a_stream_polls(visit, worker, faults, cast, post, status) -> None:
    faults.expect(f"response {status}")
    faults.expect(f"status of {status}")
    page = visit("/login", cast.vip)
    page.route(
        STREAM,
        lambda route: route.fulfill(status=status) if route.request.method == "GET" else route.continue_(),
    )
    page.goto(address(cast, cast.announcements))
    expect_state(page, "Updated every half minute")
    in_general, in_announcements = post("elsewhere"), post("here", cast.announcements, cast.admin)
    expect(message(page, in_announcements)).to_be_visible()
    expect(bell(page)).to_have_text("1")
    page.unroute_all()
    wait_until_live(page)
    assert in_announcements > in_general


SET_VISIBILITY = """(state) => {
    Object.defineProperty(document, "visibilityState", { get: () => state, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_background_page_has_no_stream_and_resumes_it(visit, cast) -> None:
    page = visit("/login", cast.vip)
    page.clock.install()
    streams, fetches, pending = watch_requests(page, "eventsource"), watch_requests(page, "fetch"), []
    page.goto("/inbox")
    wait_until_live(page)
    assert len(streams()) == 1
    page.evaluate(SET_VISIBILITY, "hidden")
    page.clock.fast_forward(11_000)
    page.evaluate("window.dispatchEvent(new Event('online'))")
    page.wait_for_timeout(300)
    assert len(streams()) == 1
    page.route("**/unread-count", lambda route: pending.append(route))
    page.clock.fast_forward(31_000)
    wait_until(lambda: page.wait_for_timeout(50) or pending, "a poll")
    page.evaluate(SET_VISIBILITY, "visible")
    wait_until(lambda: page.wait_for_timeout(50) or len(streams()) == 2, "a stream")
    pending[0].continue_()
    page.wait_for_timeout(500)
    page.clock.fast_forward(31_000)
    page.wait_for_timeout(500)
    assert len([url for url in fetches() if url.endswith("/unread-count")]) == len(pending) == 1


def test_a_message_written_offline_is_kept_and_sent_once(visit, web, faults, cast) -> None:
    faults.allow(NETWORK)
    page = visit(address(cast, cast.general), cast.subscriber)
    wait_until_live(page)
    go_offline(page, web)
    composer(page).fill("gold")
    composer(page).press("Enter")
    expect(page.locator("#compose-status")).to_have_text("Belfry cannot be reached. Check your connection.")
    expect(composer(page)).to_have_value("gold")
    go_online(page, web)
    composer(page).press("Enter")
    expect(page.locator("#messages li")).to_have_count(1)
    expect(composer(page)).to_be_empty()


def test_a_lost_response_does_not_post_twice(visit, faults, cast) -> None:
    faults.expect(NETWORK)
    page = visit(address(cast, cast.general), cast.subscriber)
    lost = lose_first_response(page)
    composer(page).fill("gold")
    composer(page).press("Enter")
    expect(page.locator("#compose-status")).to_have_class("wrong")
    composer(page).press("Enter")
    expect(composer(page)).to_be_empty()
    expect(page.locator("#messages li")).to_have_count(1)
    assert lost == [201]
    wait_until(lambda: Message.select().count() == 1, "one message")
