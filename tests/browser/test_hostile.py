"""Every XSS vector of the published lists is shown as text, as a message and as a name.

At the end of each browser test, the fixture `faults` asserts that no dialog opened, no other host was requested, no
policy was violated and no error occurred.
"""

import pytest
from playwright.sync_api import Page, expect

from belfry.core.plain_text import SOURCE_CHARACTERS, excerpt
from models import Message
from tests.browser.browsing import address, composer, message, shown, wait_until_live
from tests.messages.test_rendering import ALLOWED, VECTORS

PAGE_TAGS = {
    *("html", "head", "meta", "title", "link", "script", "body", "noscript", "main", "nav", "header", "div", "h1"),
    *("h2", "small", "svg", "path", "circle", "rect", "button", "form", "input", "label", "textarea", "kbd", "time"),
    *("dialog", "fieldset", "legend", "progress", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    "optgroup", "option", "section", "select",
}
ATTRIBUTES = {"href", "rel", "class", "start"}
KINDS = {group: next(vector for vector in vectors if len(vector) <= 90) for group, vectors in VECTORS.items()}

COLLECT_ELEMENTS = """() => {
    const all = [...document.querySelectorAll("*")];
    const contents = [...document.querySelectorAll(".content *")];
    for (const element of document.querySelectorAll("main *, #toast *, dialog *"))
        for (const kind of ["mouseover", "pointerenter", "error", "load", "toggle", "animationstart", "begin"])
            element.dispatchEvent(new Event(kind));
    const unique = (found) => [...new Set(found)];
    return {
        tags: unique(all.map((one) => one.localName)),
        inside: unique(contents.map((one) => one.localName)),
        attributes: unique(contents.flatMap((one) => one.getAttributeNames())),
        handlers: unique(all.flatMap((one) => one.getAttributeNames()).filter((name) => /^on|^style$/.test(name))),
        scripts: unique(all.filter((one) => one.localName === "script").map((one) => one.getAttribute("src"))),
        schemes: unique([...document.links].map((one) => one.protocol)),
        texts: [...document.querySelectorAll(".notification .body")].map((one) => one.textContent),
    };
}"""


def check_page(page: Page) -> list[str]:
    """Check all elements of the page; the bodies of its notifications."""
    found = page.evaluate(COLLECT_ELEMENTS)
    assert set(found["tags"]) <= PAGE_TAGS | ALLOWED.keys()
    assert set(found["inside"]) <= ALLOWED.keys()
    assert set(found["attributes"]) <= ATTRIBUTES
    assert found["handlers"] == []
    assert all(source.startswith("/static/page/") for source in found["scripts"])
    assert set(found["schemes"]) - {":"} <= {"http:", "https:", "mailto:"}
    return found["texts"]


@pytest.fixture(autouse=True)
def _pages_with_all_vectors(override) -> None:
    """Raise the rate limit and the page size for these tests."""
    override(rate_limit_messages="1000000 per minute", rate_limit_default="1000000 per minute")


def inbox_text(vector: str) -> str:
    """The vector as the inbox shows it."""
    return f"Sam: {excerpt(vector[:SOURCE_CHARACTERS], 100)}"


def test_every_vector_is_text_in_the_channel_and_the_inbox(visit, cast, post, run_jobs) -> None:
    vectors = [vector for vectors in VECTORS.values() for vector in vectors if vector.strip() and "\0" not in vector]
    ids = [post(vector) for vector in vectors]
    run_jobs()
    assert len(ids) > 500
    page = visit(address(cast, cast.general, "?newest=1"), cast.vip)
    seen = shown(page)
    check_page(page)
    while page.locator("#older").count():
        page.goto(address(cast, cast.general, f"?before={seen[0]}"))
        seen = sorted({*shown(page), *seen})  # the page may load older ones by itself
        check_page(page)
    assert seen == ids

    page.goto("/inbox")
    texts = check_page(page)
    older = page.get_by_role("link", name="Older notifications")
    while older.count():
        page.goto(older.get_attribute("href"))
        texts += check_page(page)
    assert len(texts) == len(ids)
    for text, vector in zip(texts[::-1], vectors, strict=True):
        assert text.split() == inbox_text(vector).split()


def test_live_vectors_of_each_kind_are_text(visit, worker, cast) -> None:
    writer = visit(address(cast, cast.general), cast.subscriber)
    same_channel = visit(address(cast, cast.general), cast.vip)
    other_channel = visit(address(cast, cast.announcements), cast.moderator)
    inbox = visit("/inbox", cast.admin)
    for page in (same_channel, other_channel, inbox):
        wait_until_live(page)
    for number, vector in enumerate(KINDS.values(), start=1):
        composer(writer).fill(vector)
        writer.get_by_role("button", name="Send").click()
        for page in (writer, same_channel):
            expect(page.locator("#messages li")).to_have_count(number)
        expect(other_channel.locator("#toast span")).to_have_text(inbox_text(vector))
        expect(inbox.locator("#notifications li")).to_have_count(number)
        for page in (writer, same_channel, other_channel, inbox):
            check_page(page)
    last = Message.select().order_by(Message.id.desc()).first()
    for page, button in ((same_channel, "Why?"), (writer, "Recipients")):
        message(page, last.id).get_by_role("button", name=button).click()
        expect(page.locator("dialog[open] .excerpt")).to_be_visible()
        check_page(page)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_in_names_are_text(visit, worker, cast, post, api, kind) -> None:
    hostile = KINDS[kind].strip()
    ada = api(cast.admin)
    assert ada.patch(f"/api/channels/{cast.general}", json={"name": hostile}).status_code == 200
    for person in (cast.subscriber, cast.vip):
        assert ada.patch(f"/api/users/{person.id}", json={"name": hostile}).status_code == 200
    number = post(f"{hostile} @vera")
    page = visit(address(cast, cast.general), cast.vip)
    expect(page.locator("h1")).to_contain_text(hostile)
    expect(page.locator(".person strong")).to_have_text(hostile)
    expect(message(page, number).locator(".by strong")).to_have_text(hostile)
    expect(page).to_have_title(f"#{hostile} – Belfry")
    composer(page).press_sequentially("@sa")
    expect(page.get_by_role("option").locator("span")).to_have_text([hostile])  # a list, so that it is retried
    check_page(page)
    composer(page).fill("")
    page.locator("#setting-button").click()
    expect(page.locator("#setting-title")).to_have_text(f"Notifications from #{hostile}")
    check_page(page)
    page.goto("/inbox")
    expect(page.locator(".notification .title")).to_have_text(f"You were mentioned in Golden Signals #{hostile}")
    wait_until_live(page)
    page.goto(address(cast, cast.announcements))
    wait_until_live(page)
    post("@vera")
    expect(page.locator("#toast small")).to_have_text(f"You were mentioned in Golden Signals #{hostile}")
    expect(page.locator("#toast span")).to_have_text(f"{hostile}: @vera")
    check_page(page)
