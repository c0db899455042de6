"""Unread counts, toasts and marking read in two windows of two users."""

import re
from statistics import median

import psycopg
from playwright.sync_api import Page, expect

from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from config import settings
from models import Run
from tests.browser.browsing import address, bell, composer, message, wait_until_live

POSTS = 7
RECORD_BELL = """(number) => {
    const bell = document.querySelector("#bell .number");
    new MutationObserver(() => { window.bellChange = { number: bell.textContent, at: Date.now() }; })
        .observe(bell, { characterData: true, childList: true, subtree: true });
}"""
RECORD_CLICK = """() => document.getElementById("send").addEventListener(
    "click", () => { window.clicked = Date.now(); }, { capture: true })"""
WITHOUT_FOCUS = "document.hasFocus = () => false;"  # Playwright gives the focus to every page


def test_a_post_in_one_window_shows_in_the_bell_of_another(visit, worker, cast, measured) -> None:
    writer = visit(address(cast, cast.general), cast.subscriber)
    reader = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(reader)
    expect(bell(reader)).to_be_hidden()
    reader.evaluate(RECORD_BELL)
    writer.evaluate(RECORD_CLICK)
    durations = []
    for number in range(1, POSTS + 1):
        composer(writer).fill(f"gold breaks out {number}")
        writer.get_by_role("button", name="Send").click()
        expect(bell(reader)).to_have_text(str(number))
        change = reader.evaluate("window.bellChange")
        assert change["number"] == str(number)
        durations.append(change["at"] - writer.evaluate("window.clicked"))
        expect(reader.locator("#toast")).to_contain_text(f"Sam: gold breaks out {number}")
    summary = f"{median(durations):.0f} ms, at most {max(durations)} ms"
    measured(f"from the click in one window to the bell in the other: {summary}")

    expect(reader).to_have_title(f"({POSTS}) #announcements – Belfry")
    expect(reader.get_by_role("link", name=f"Inbox, {POSTS} unread")).to_be_visible()
    expect(reader.get_by_role("link", name=f"#general {POSTS} unread")).to_be_visible()
    expect(bell(writer)).to_be_hidden()


def test_a_mention_is_counted_as_a_mention(visit, worker, cast, post) -> None:
    reader = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(reader)
    post("look, @vera")
    post("nobody in particular")
    expect(reader.get_by_role("link", name="Inbox, 2 unread, 1 mentioning you")).to_be_visible()
    expect(reader.get_by_role("link", name="#general 2 unread, 1 mentioning you")).to_be_visible()
    expect(reader.locator("#bell")).to_have_class("mentions")


def test_a_seen_message_is_read_in_all_windows(visit, worker, cast, post) -> None:
    other_channel = visit(address(cast, cast.announcements), cast.vip)
    wait_until_live(other_channel)
    first = post("one")
    expect(bell(other_channel)).to_have_text("1")
    same_channel = visit(address(cast, cast.general), cast.vip)
    expect(message(same_channel, first)).to_be_visible()
    for page in (same_channel, other_channel):
        expect(bell(page)).to_be_hidden()
    wait_until_live(same_channel)
    second = post("two")
    expect(message(same_channel, second)).to_be_visible()
    expect(same_channel.locator("#toast")).to_be_empty()
    for page in (same_channel, other_channel):
        expect(bell(page)).to_be_hidden()


def test_a_window_without_focus_marks_nothing_read(visit, worker, cast, post) -> None:
    page = visit("/login", cast.vip)
    page.add_init_script(WITHOUT_FOCUS)
    page.goto(address(cast, cast.general))
    wait_until_live(page)
    number = post("look")
    expect(message(page, number)).to_be_visible()
    expect(bell(page)).to_have_text("1")
    page.wait_for_timeout(800)  # longer than the page waits before it marks messages read
    expect(bell(page)).to_have_text("1")
    page.evaluate("() => { document.hasFocus = () => true; window.dispatchEvent(new Event('focus')); }")
    expect(bell(page)).to_be_hidden()


def test_a_message_that_could_not_be_fetched_stays_unread(visit, worker, faults, cast, post) -> None:
    faults.expect("status of 429")
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    page.route(re.compile(r"/messages\?"), lambda route: route.fulfill(status=429))
    number = post("look")
    expect(bell(page)).to_have_text("1")
    page.wait_for_timeout(1_500)  # longer than the page waits before it marks messages read
    expect(bell(page)).to_have_text("1")
    page.unroute_all()
    next_id = post("and look")
    for message_id in (number, next_id):
        expect(message(page, message_id)).to_be_visible()
    expect(bell(page)).to_be_hidden()


def test_messages_scrolled_past_without_focus_stay_unread(visit, cast, post, run_jobs) -> None:
    for number in range(40):
        post(f"number {number}")
    run_jobs()
    page = visit("/login", cast.vip)
    page.add_init_script(WITHOUT_FOCUS)
    page.goto(address(cast, cast.general))
    wait_until_live(page)
    log = page.locator("#log")
    log.evaluate("log => log.scrollTo(0, -log.scrollHeight)")
    page.wait_for_timeout(200)
    log.evaluate("log => log.scrollTo(0, -300)")
    page.wait_for_timeout(200)
    page.evaluate("() => { document.hasFocus = () => true; window.dispatchEvent(new Event('focus')); }")
    expect(bell(page)).not_to_have_text("40")
    page.wait_for_timeout(800)
    assert 20 < int(bell(page).inner_text()) < 40


def test_a_message_that_is_longer_than_the_window_is_read(visit, cast, post, run_jobs, api) -> None:
    _, end = post("line\n" * 1_000), post("end")
    run_jobs()
    page = visit("/login", cast.vip)
    page.add_init_script(WITHOUT_FOCUS)
    page.goto(address(cast, cast.general))
    expect(bell(page)).to_have_text("2")
    page.locator("#log").evaluate("log => log.scrollTo(0, -5_000)")
    page.evaluate("() => { document.hasFocus = () => true; window.dispatchEvent(new Event('focus')); }")
    expect(bell(page)).to_have_text("1")
    unread = api(cast.vip).get("/api/notifications?unread=1").json["items"]
    assert [one["message_id"] for one in unread] == [end]


def test_messages_that_are_not_listed_stay_unread(visit, faults, cast, post, run_jobs, api) -> None:
    """Older messages than the listed ones stay unread, and so does one that was committed after its neighbours."""
    faults.expect("status of 429")
    mention, *_ = [post(f"number {number}, @vera" if number == 0 else f"number {number}") for number in range(60)]
    run_jobs()
    with psycopg.connect(settings.database_url) as session:
        late_id = session.execute(
            "INSERT INTO message (channel_id, author_id, content) VALUES (%s, %s, 'late') RETURNING id",
            [cast.general, cast.subscriber.id],
        ).fetchone()[0]
        post("the last one")
        run_jobs()
        page = visit("/login", cast.vip)
        page.add_init_script(WITHOUT_FOCUS)
        page.goto(address(cast, cast.general, "?newest=1"))
        expect(bell(page)).to_have_text("61")
        session.execute("INSERT INTO run (message_id, kind) VALUES (%s, 'message')", [late_id])
        session.commit()
    queues.enqueue([WorkItem(Run.get(Run.message == late_id).id)])
    page.route(re.compile(r"/messages\?"), lambda route: route.fulfill(status=429))  # not listed
    run_jobs()
    page.evaluate("() => { document.hasFocus = () => true; window.dispatchEvent(new Event('focus')); }")
    expect(bell(page)).to_have_text(re.compile("^[45][0-9]$"))
    unread = [one["message_id"] for one in api(cast.vip).get("/api/notifications?unread=1").json["items"]]
    assert {late_id, mention} <= set(unread)


def test_a_reader_of_a_busy_channel_has_nothing_unread(visit, worker, cast, post) -> None:
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    marked = []
    page.on("request", lambda request: marked.append(request.url) if request.url.endswith("/read") else None)
    for number in range(20):
        post(f"number {number}")
        page.wait_for_timeout(150)  # less than the page waits before it marks messages read
    assert marked
    expect(bell(page)).to_be_hidden()


def test_a_toast_links_to_the_message_and_can_be_closed(visit, worker, cast, post) -> None:
    page = visit("/inbox", cast.vip)
    page.get_by_role("link", name="#announcements").click()
    wait_until_live(page)
    toast = page.locator("#toast")

    def notify(text: str) -> int:
        number = post(text)
        expect(toast).to_contain_text(text)
        return number

    notify("away by the button")
    toast.get_by_role("button", name="Dismiss").click()
    expect(toast).to_be_empty()
    notify("away by the keyboard")
    page.keyboard.press("Escape")
    expect(toast).to_be_empty()
    number = notify("go there, @vera")
    expect(toast).to_contain_text("You were mentioned in Golden Signals #general")
    toast.get_by_role("link").click()
    page.wait_for_url(f"**/channels/{cast.general}#message-{number}")
    expect(message(page, number)).to_be_in_viewport()
    expect(toast).to_be_empty()


def test_signing_out_ends_the_stream(visit, faults, cast) -> None:
    faults.expect("status of 401")
    page = visit(address(cast, cast.general), cast.subscriber)
    wait_until_live(page)
    other: Page = page.context.new_page()
    other.goto(address(cast, cast.general))
    other.get_by_role("button", name="Sign out", exact=True).click()
    expect(other.get_by_role("button", name="Sign in")).to_be_visible()
    expect(page.locator("#connection")).to_contain_text("Signed out")
    page.get_by_role("link", name="Sign in again").click()
    expect(page).to_have_url(re.compile(r"/login\?next="))
