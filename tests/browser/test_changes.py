"""Edits and deletions show on every open page, and are made on the page by those who may."""

import re
from statistics import quantiles

import pytest
from playwright.sync_api import expect

from belfry.servers import preferences
from tests.browser.browsing import address, composer, message, wait_until_live


@pytest.fixture
def patch(api, cast):
    """`patch(message_id, "text")`: sam edits a message over the API."""

    def edit(message_id: int, content: str) -> None:
        assert api(cast.subscriber).patch(f"/api/messages/{message_id}", json={"content": content}).status_code == 200

    return edit


def test_edits_and_deletions_show_on_all_open_pages(visit, worker, cast, post, patch, api):
    number = post("gold is quiet")
    preferences.set_preference(cast.admin.user, cast.general, "none", None)
    author, other, off = (visit(address(cast, cast.general), one) for one in (cast.subscriber, cast.vip, cast.admin))
    for page in (author, other, off):
        wait_until_live(page)
        expect(message(page, number)).to_contain_text("gold is quiet")
    patch(number, "gold is **loud**")
    for page in (author, other, off):
        expect(message(page, number)).to_contain_text("gold is loud")
        expect(message(page, number)).to_contain_text("(edited)")
    assert api(cast.moderator).delete(f"/api/messages/{number}").status_code == 200
    for page in (author, other, off):
        expect(message(page, number)).to_have_count(0)


def test_a_message_is_shown_within_a_second_of_its_post_to_subscribed_muted_and_the_author(
    visit, worker, cast, post, measured
):
    preferences.set_preference(cast.moderator.user, cast.general, "none", None)
    pages = {
        name: visit(address(cast, cast.general), person)
        for name, person in {"subscribed": cast.vip, "switched off": cast.moderator, "author": cast.subscriber}.items()
    }
    for page in pages.values():
        wait_until_live(page)
        page.evaluate(
            """() => { window.times = {}; new MutationObserver(changes => changes.forEach(change =>
                change.addedNodes.forEach(node => { window.times[node.dataset?.id] ??= Date.now(); })
            )).observe(document.getElementById('messages'), { childList: true }); }"""
        )
    delays: dict[str, list[int]] = {name: [] for name in pages}
    for turn in range(20):
        begun = pages["author"].evaluate("Date.now()")
        number = post(f"signal {turn}")
        for name, page in pages.items():
            expect(message(page, number)).to_be_visible()
            delays[name].append(page.evaluate(f"window.times[{number}]") - begun)
    for name, found in delays.items():
        measured(f"from a post to the page, {name}: p95 {quantiles(found, n=20)[-1]:.0f} ms of {len(found)}")


def test_an_author_edits_on_the_page(visit, worker, cast, post):
    number = post("gold is quiet")
    page = visit(address(cast, cast.general), cast.subscriber)
    wait_until_live(page)
    message(page, number).get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edited message")
    expect(field).to_have_value("gold is quiet")
    expect(field).to_be_focused()
    field.press("Escape")
    expect(field).to_have_count(0)
    expect(message(page, number)).to_contain_text("gold is quiet")
    message(page, number).get_by_role("button", name="Edit").click()
    field.fill("gold is loud")
    field.press("Enter")
    expect(message(page, number).locator(".content")).to_have_text("gold is loud")
    expect(message(page, number)).to_contain_text("(edited)")
    expect(field).to_have_count(0)


def test_an_edit_that_is_refused_keeps_the_text(visit, cast, post, faults):
    faults.expect("status of 422")
    number = post("gold is quiet")
    page = visit(address(cast, cast.general), cast.subscriber)
    message(page, number).get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edited message")
    field.fill("a" * 10_001)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".edit-form [role=status]")).to_contain_text("10")
    expect(field).to_have_value("a" * 10_001)


def test_arrow_up_in_an_empty_field_edits_the_last_own_message(visit, cast, post):
    post("the first")
    number = post("the second")
    post("of another", author=cast.vip)
    page = visit(address(cast, cast.general), cast.subscriber)
    composer(page).press("ArrowUp")
    expect(message(page, number).get_by_label("Edited message")).to_be_focused()


def test_delete_asks_and_says_what_it_did(visit, cast, post, run_jobs, api):
    number = post("gold breaks out")
    run_jobs()
    assert api(cast.vip).post("/api/notifications/read", json={"all": True}).json["marked"] == 1
    page = visit(address(cast, cast.general), cast.subscriber)
    message(page, number).get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Delete this message?")
    expect(dialog).to_contain_text("gold breaks out")
    dialog.get_by_role("button", name="Cancel").click()
    expect(message(page, number)).to_be_visible()
    message(page, number).get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(dialog).to_contain_text(re.compile(r"\d+ unread notifications? (was|were) retracted; 1 had been read\."))
    expect(message(page, number)).to_have_count(0)
    dialog.get_by_role("button", name="Close").last.click()
    expect(dialog).to_be_hidden()


def test_only_those_who_may_see_the_buttons(visit, cast, post):
    number = post("gold breaks out")
    for person, edits, deletes in (
        (cast.subscriber, 1, 1),
        (cast.vip, 0, 0),
        (cast.moderator, 0, 1),
        (cast.admin, 0, 1),
    ):
        page = visit(address(cast, cast.general), person)
        expect(message(page, number)).to_be_visible()
        expect(message(page, number).locator("button.edit")).to_have_count(edits)
        expect(message(page, number).locator("button.delete")).to_have_count(deletes)
