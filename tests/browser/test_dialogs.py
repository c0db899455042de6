"""The dialogs of a channel: the notification preference, recipients, and "Why?"."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from models import Preference, Run
from tests.browser.browsing import address, bell, message, wait_until_live
from tests.processes import wait_until, worker_process


def dialog_of(page: Page, title: str) -> Locator:
    return page.get_by_role("dialog", name=title)


def stored_preference(person) -> tuple[str, bool] | None:
    """The stored level, and whether the channel is muted."""
    found = Preference.get_or_none(Preference.user_id == person.id)
    return found and (found.level, found.muted_until is not None)


# Preference -------------------------------------------------------------------------------------------------


def test_each_preference_shows_its_effect(visit, cast) -> None:
    page = visit(address(cast, cast.general), cast.vip)
    button = page.get_by_role("button", name="Notifications from #general:")
    expect(button).to_contain_text("All messages")
    button.click()
    dialog = dialog_of(page, "Notifications from #general")
    effect = dialog.get_by_role("status")
    expect(effect).to_have_text("You are notified of every message here.")
    expect(dialog.get_by_label("every message")).to_be_checked()
    assert stored_preference(cast.vip) is None

    def choose(level: str, effect_text: str, button_text: str, stored_level: str) -> None:
        dialog.get_by_label(level, exact=True).check()
        expect(effect).to_contain_text(effect_text)
        expect(button).to_contain_text(button_text)
        assert stored_preference(cast.vip) == (stored_level, False)

    choose("mentions only", "only of messages that mention you", "Mentions only", "mentions")
    choose("nothing", "not even for mentions", "Nothing", "none")
    choose("every message", "You are notified of every message here.", "All messages", "all")

    unmute = dialog.get_by_role("button", name="Unmute")
    expect(unmute).to_be_hidden()
    for name in ("For an hour", "For a day", "Until morning"):
        dialog.get_by_role("button", name=name).click()
        expect(effect).to_contain_text(re.compile("Until .+ you are notified only if you are mentioned by name"))
        expect(button).to_contain_text(re.compile("Muted until .*[0-9]:[0-9]{2}"))
        assert stored_preference(cast.vip) == ("all", True)
        unmute.click()
        expect(effect).to_have_text("You are notified of every message here.")
        expect(dialog.get_by_role("button", name="For an hour")).to_be_focused()
        assert stored_preference(cast.vip) == ("all", False)
    dialog.get_by_role("button", name="For a day").click()
    dialog.get_by_label("mentions only").check()
    expect(effect).to_contain_text("after that, of all mentions")
    assert stored_preference(cast.vip) == ("mentions", True)

    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()
    page.reload()
    expect(button).to_contain_text("Muted until")


def test_a_mute_ends_by_itself(visit, cast) -> None:
    page = visit("/login", cast.vip)
    page.clock.install()
    page.goto(address(cast, cast.general))
    button = page.get_by_role("button", name="Notifications from #general:")
    button.click()
    page.get_by_role("button", name="For an hour").click()
    expect(button).to_contain_text("Muted until")
    page.clock.run_for(3_602_000)
    expect(button).to_contain_text("All messages")


def test_until_morning_is_the_next_morning(visit, cast) -> None:
    page = visit("/login", cast.vip, timezone_id="Pacific/Auckland")
    page.goto(address(cast, cast.general))
    page.get_by_role("button", name="Notifications from #general:").click()
    with page.expect_response("**/preference") as saved:
        page.get_by_role("button", name="Until morning").click()
    until = saved.value.json()["muted_until"]
    hour, hours_ahead = page.evaluate(
        "until => [new Date(until).getHours(), (new Date(until) - Date.now()) / 3_600_000]", until
    )
    assert hour == 8
    assert 0 < hours_ahead <= 25


def test_the_preference_decides_the_notifications(visit, worker, cast, post) -> None:
    page = visit(address(cast, cast.general), cast.vip)
    page.get_by_role("button", name="Notifications from #general:").click()
    page.get_by_label("mentions only").check()
    expect(page.locator("#effect")).to_contain_text("only of messages that mention you")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="#announcements").click()
    wait_until_live(page)
    post("not for vera")
    post("for @vera")
    expect(page.locator("#toast")).to_contain_text("for @vera")
    expect(bell(page)).to_have_text("1")


def test_a_preference_that_is_not_saved_is_reported(visit, faults, cast) -> None:
    page = visit(address(cast, cast.general), cast.vip)
    page.get_by_role("button", name="Notifications from #general:").click()
    page.context.set_offline(True)
    faults.allow("ERR_INTERNET_DISCONNECTED")
    page.get_by_label("nothing", exact=True).click()
    expect(page.locator("#effect")).to_have_text("Belfry cannot be reached. Check your connection.")
    expect(page.get_by_label("every message")).to_be_checked()


@pytest.mark.parametrize(
    ("who", "channel", "text"),
    [
        ("lapsed", "general", "without an active subscription"),
        ("admin", "vault", "none of your roles opens this channel"),
    ],
)
def test_a_user_without_notifications_is_shown_the_reason(visit, cast, who, channel, text) -> None:
    page = visit(address(cast, getattr(cast, channel)), cast.everybody[who])
    page.get_by_role("button", name=re.compile("^Notifications from #")).click()
    expect(page.locator("#effect")).to_contain_text(text)


# Recipients -----------------------------------------------------------------------------------------------


def test_the_progress_of_a_run_is_shown_and_then_its_counts(visit, cast, post) -> None:
    number = post("gold breaks out, @vera")
    page = visit(address(cast, cast.general), cast.subscriber)
    expect(message(page, number).get_by_role("progressbar")).to_be_visible()
    message(page, number).get_by_role("button", name="Recipients").click()
    dialog = dialog_of(page, "Recipients")
    expect(dialog.locator(".excerpt")).to_have_text("gold breaks out, @vera")
    expect(dialog.get_by_role("status")).to_have_text("Waiting …")
    Run.update(state="running", members_processed=2, members_total=5).execute()
    expect(dialog.get_by_role("status")).to_have_text("Sending …")
    expect(dialog.get_by_role("progressbar")).to_have_js_property("value", 2)
    expect(message(page, number).get_by_role("progressbar")).to_have_js_property("max", 5)
    Run.update(state="queued", members_processed=0, members_total=None).execute()
    with worker_process():
        expect(dialog.get_by_role("status")).to_have_text("3 of 5 members were notified.")
    expect(dialog.get_by_role("progressbar")).to_be_hidden()
    rows = dialog.locator("tr:has([scope=row])")
    expect(rows).to_have_text(
        [
            re.compile("want every message *2"),
            re.compile("were mentioned by name *1"),
            re.compile("wrote it *1"),
            re.compile("have no active subscription *1"),
        ],
    )
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(message(page, number)).to_contain_text("3 notified")


def test_only_the_author_and_admins_see_recipients(visit, cast, post, run_jobs) -> None:
    number = post("hello")
    run_jobs()
    for name, offered in (("subscriber", 1), ("admin", 1), ("vip", 0), ("moderator", 0)):
        page = visit(address(cast, cast.general), cast.everybody[name])
        expect(message(page, number).get_by_role("button", name="Recipients")).to_have_count(offered)


def test_a_click_on_the_backdrop_closes_a_dialog(visit, cast, post, run_jobs) -> None:
    number = post("hello")
    run_jobs()
    page = visit(address(cast, cast.general), cast.subscriber)
    message(page, number).get_by_role("button", name="Recipients").click()
    dialog = dialog_of(page, "Recipients")
    dialog.get_by_role("status").click()
    expect(dialog).to_be_visible()
    page.mouse.click(5, 5)
    expect(dialog).to_be_hidden()


# Why --------------------------------------------------------------------------------------------------------


def test_why_addresses_the_reader(visit, cast, post, run_jobs) -> None:
    number = post("gold breaks out, @vera")
    run_jobs()
    for name, text in (
        ("vip", r"^You were notified at .*: you were mentioned by name"),
        ("subscriber", r"^You were not notified: you wrote"),
        ("lapsed", r"^You were not notified: you are not an admin and have no active subscription"),
    ):
        page = visit(address(cast, cast.general), cast.everybody[name])
        message(page, number).get_by_role("button", name="Why?").click()
        dialog = dialog_of(page, "Why?")
        expect(dialog.locator("#why-answer")).to_have_text(re.compile(text))
        expect(dialog.locator(".excerpt")).to_have_text("gold breaks out, @vera")
        expect(dialog.get_by_role("combobox")).to_have_count(0)


def test_an_admin_asks_why_for_any_user(visit, cast, post, run_jobs) -> None:
    number = post("gold breaks out, @vera")
    run_jobs()
    page = visit(address(cast, cast.general), cast.admin)
    message(page, number).get_by_role("button", name="Why?").click()
    dialog = dialog_of(page, "Why?")
    explanation, field = dialog.locator("#why-answer"), dialog.get_by_role("combobox", name="Another user")
    expect(explanation).to_have_text(re.compile("^You were notified at "))
    field.press_sequentially("ve")
    options = dialog.get_by_role("option")
    expect(options).to_have_text(["@vera Vera"])
    expect(field).to_have_attribute("aria-expanded", "true")
    field.press("Enter")
    expect(explanation).to_have_text(re.compile("^@vera was notified at .*: they were mentioned by name"))
    field.fill("lars")
    expect(options).to_have_count(1)
    options.click()
    expect(explanation).to_have_text(re.compile("^@lars was not notified: "))
    field.fill("nobody")
    dialog.get_by_role("button", name="Ask").click()
    expect(explanation).to_have_text("There is no user @nobody.")


def test_a_user_outside_the_server_was_not_notified(visit, faults, cast, post) -> None:
    faults.expect("status of 404")
    number = post("hello")
    page = visit(address(cast, cast.general), cast.admin)
    message(page, number).get_by_role("button", name="Why?").click()
    page.get_by_role("combobox").fill("@stan")
    page.get_by_role("button", name="Ask").click()
    wait_until(lambda: "stan" not in page.locator("#why-answer").inner_text(), "an explanation")
    expect(page.locator("#why-answer")).to_contain_text("There is no member 6 in the message's server.")
