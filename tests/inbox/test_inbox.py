"""The inbox: a user's notifications in their current form, and the preferences of a user for a channel."""

import json
import re
from datetime import UTC, datetime, timedelta, timezone

import psycopg
import pytest

from belfry.fanout import claims, fanout
from belfry.identity.subscriptions import set_subscription
from belfry.inbox.inbox import mark_read
from belfry.servers import servers
from config import settings
from models import Message, Notification, Preference
from tests.fanout_helpers import edit, post, post_and_notify, run_to_end, statements
from tests.people import make_person
from tests.web.test_errors import assert_problem

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
NOTHING = {"unread": 0, "mentions": 0, "channels": []}


@pytest.fixture
def notify(api, cast, run_jobs):
    """`notify("text", channel_id, author)`: post, by default as sam in #general, and run the job; return its id."""

    def post(content, channel_id=None, author=None):
        message = {"channel_id": channel_id or cast.general, "content": content}
        response = api(author or cast.subscriber).post("/api/messages", json=message)
        assert response.status_code == 201
        assert run_jobs() == 0
        return response.get_json()["id"]

    return post


@pytest.fixture
def inbox(api):
    """`inbox(person, "unread=1")`: the items of that user's inbox."""
    return lambda person, query="": api(person).get(f"/api/notifications?{query}").get_json()["items"]


@pytest.fixture
def unread(api):
    return lambda person: api(person).get("/api/notifications/unread-count").get_json()


def bodies(items):
    return [item["body"].removeprefix("Sam: ") for item in items]


# Contents -------------------------------------------------------------------------------------------------


def test_a_notification_has_exactly_the_documented_fields(cast, notify, inbox):
    message = notify("gold breaks out")
    (item,) = inbox(cast.vip)
    expected = {
        "id": f"{cast.vip.id}-{message}", "type": "message", "reason": "message",
        "title": "New message in Golden Signals #general", "body": "Sam: gold breaks out",
        "url": f"/servers/{cast.server_id}/channels/{cast.general}#message-{message}", "message_id": message,
        "channel": {"id": cast.general, "name": "general"}, "server": {"id": cast.server_id, "name": "Golden Signals"},
        "created_at": item["created_at"], "read_at": None,
    }  # fmt: skip
    assert json.dumps(item) == json.dumps(expected)
    assert TIME.fullmatch(item["created_at"])


def test_a_mention_has_its_own_type_title_and_reason(cast, notify, inbox):
    notify("@vera @vip @everyone", author=cast.admin)
    reasons = {"vip": "mention", "moderator": "mention_everyone"}
    for name, reason in reasons.items():
        (item,) = inbox(cast.everybody[name])
        assert (item["type"], item["reason"]) == ("mention", reason)
        assert item["title"] == "You were mentioned in Golden Signals #general"
    notify("@vip", author=cast.admin)
    assert [item["reason"] for item in inbox(cast.vip)] == ["mention_role", "mention"]


def test_a_long_body_is_truncated_to_a_hundred_characters(cast, notify, inbox):
    for letter in ("x", "語", "😀"):
        notify(letter * 100)
        notify(letter * 101)
        assert bodies(inbox(cast.vip, "limit=2")) == [letter * 100 + "…", letter * 100]


def test_the_inbox_shows_current_names(api, cast, notify, inbox):
    notify("hello")
    api(cast.admin).patch(f"/api/channels/{cast.general}", json={"name": "<b>lobby</b>"})
    api(cast.admin).patch(f"/api/users/{cast.subscriber.id}", json={"name": "{{ Sammy }}"})
    (item,) = inbox(cast.vip)
    assert item["title"] == "New message in Golden Signals #<b>lobby</b>"
    assert item["body"] == "{{ Sammy }}: hello"


def test_the_inbox_shows_edited_messages_and_hides_deleted_ones(api, cast, notify, inbox, unread):
    first, second = notify("first"), notify("second @vera")
    api(cast.subscriber).patch(f"/api/messages/{first}", json={"content": "first, corrected"})
    assert bodies(inbox(cast.vip)) == ["second @vera", "first, corrected"]
    api(cast.subscriber).delete(f"/api/messages/{second}")  # before any job has run
    assert bodies(inbox(cast.vip)) == ["first, corrected"]
    assert unread(cast.vip)["mentions"] == 0
    assert unread(cast.vip)["unread"] == 1


def test_pages_are_newest_first_and_do_not_shift_when_messages_arrive(api, cast, notify):
    for number in range(5):
        notify(f"{number}")
    seen, query = [], "limit=2"
    while query:
        page = api(cast.vip).get(f"/api/notifications?{query}").get_json()
        seen += bodies(page["items"])
        query = page["next"] and f"limit=2&cursor={page['next']}"
        notify("posted between two pages")
    assert seen == ["4", "3", "2", "1", "0"]


def test_filters(api, cast, notify, inbox):
    notify("one")
    notify("two", cast.announcements, cast.admin)
    notify("three", cast.vault, cast.vip)
    api(cast.admin).put(f"/api/channels/{cast.vault}/roles", json={"role_ids": [cast.moderators_role]})
    notify("four")
    api(cast.moderator).post("/api/notifications/read", json={"ids": [f"{cast.moderator.id}-1"]})
    everything = ["four", "Ada: two", "one"]
    assert bodies(inbox(cast.moderator)) == everything  # the message in the vault notified only its viewers
    assert bodies(inbox(cast.moderator, "unread=0")) == everything
    assert bodies(inbox(cast.moderator, "unread=1")) == ["four", "Ada: two"]
    assert bodies(inbox(cast.moderator, f"channel_id={cast.general}")) == ["four", "one"]
    assert bodies(inbox(cast.moderator, f"channel_id={cast.general}&unread=1")) == ["four"]
    assert_problem(api(cast.moderator).get("/api/notifications?channel_id=999"), 404, "not_found")


# Unread counts --------------------------------------------------------------------------------------------


def test_unread_notifications_are_counted_by_channel(api, cast, notify, unread):
    assert unread(cast.vip) == NOTHING
    notify("one")
    notify("two @vera")
    notify("three", cast.announcements, cast.admin)
    assert unread(cast.vip) == {
        "unread": 3,
        "mentions": 1,
        "channels": [
            {"channel_id": cast.general, "unread": 2, "mentions": 1},
            {"channel_id": cast.announcements, "unread": 1, "mentions": 0},
        ],
    }
    api(cast.vip).post("/api/notifications/read", json={"channel_id": cast.general})
    assert unread(cast.vip)["channels"] == [{"channel_id": cast.announcements, "unread": 1, "mentions": 0}]


def test_a_large_unread_count_is_exact(api, cast, unread):
    numbers = range(1, 1_235)
    Message.insert_many(
        {"id": n, "channel": cast.general, "author": cast.subscriber.id, "content": f"{n}"} for n in numbers
    ).execute()
    Notification.insert_many(
        {"user_id": cast.vip.id, "message_id": n, "reason": "mention" if n % 2 else "message"} for n in numbers
    ).execute()
    assert (unread(cast.vip)["unread"], unread(cast.vip)["mentions"]) == (1_234, 617)
    ids = [f"{cast.vip.id}-{n}" for n in range(1, 1_001)]
    assert_problem(api(cast.vip).post("/api/notifications/read", json={"ids": [*ids, "1-1"]}), 422, "invalid")
    response = api(cast.vip).post("/api/notifications/read", json={"ids": ids}).get_json()
    assert response == {"marked": 1_000, "unread": 234}


# Reading and dismissing -----------------------------------------------------------------------------------


@pytest.fixture
def read(api):
    """`read(person, all=True)`: mark as read; return the response."""
    return lambda person, **selector: api(person).post("/api/notifications/read", json=selector)


def test_mark_as_read_by_ids(cast, notify, inbox, read):
    one, two = notify("one"), notify("two")
    assert read(cast.vip, ids=[f"{cast.vip.id}-{one}"] * 3).get_json() == {"marked": 1, "unread": 1}
    read_at = inbox(cast.vip)[1]["read_at"]
    assert TIME.fullmatch(read_at)
    assert read(cast.vip, ids=[f"{cast.vip.id}-{one}", f"{cast.vip.id}-999"]).get_json() == {"marked": 0, "unread": 1}
    assert inbox(cast.vip)[1]["read_at"] == read_at
    assert read(cast.vip, ids=[f"{cast.vip.id}-{two}"]).get_json() == {"marked": 1, "unread": 0}


def test_mark_as_read_up_to_a_notification(cast, notify, inbox, read):
    ids = [notify(f"{number}") for number in range(3)]
    assert read(cast.vip, up_to=f"{cast.vip.id}-{ids[1]}").get_json() == {"marked": 2, "unread": 1}
    assert bodies(inbox(cast.vip, "unread=1")) == ["2"]


def test_mark_up_to_skips_a_lower_message_id_that_was_committed_later(cast, read, inbox):
    """A user whose list shows `up_to` cannot have seen a notification whose transaction was still open at that time."""
    late_id, _ = post(cast.subscriber, cast.general, "late")
    with psycopg.connect(settings.database_url) as late:
        late.execute("INSERT INTO notification VALUES (%s, %s, now(), NULL, NULL, 'message')", [cast.vip.id, late_id])
        late.execute("INSERT INTO notification_log (message_ids) VALUES (%s)", [[late_id]])
        early_id = post_and_notify(cast.subscriber, cast.general, "early")
        [shown] = inbox(cast.vip)
        late.commit()
    assert read(cast.vip, up_to=shown["id"]).get_json() == {"marked": 1, "unread": 1}
    assert bodies(inbox(cast.vip, "unread=1")) == ["late"]
    last_id = post_and_notify(cast.subscriber, cast.general, "last")
    assert early_id < last_id
    assert read(cast.vip, up_to=f"{cast.vip.id}-{last_id}").get_json() == {"marked": 2, "unread": 0}


@pytest.mark.parametrize("members", [2, 100])
def test_mark_up_to_compares_with_the_transaction_that_inserted_the_notification(cast, read, set_slice_size, members):
    """With slices as well as without."""
    set_slice_size(members)
    (_, first_run), (second, second_run) = [post(cast.subscriber, cast.general, "gold") for _ in range(2)]
    run_to_end(second_run)
    run_to_end(first_run)
    assert read(cast.vip, up_to=f"{cast.vip.id}-{second}").get_json() == {"marked": 1, "unread": 1}
    (_, third_run), (fourth, fourth_run) = [post(cast.subscriber, cast.general, "gold") for _ in range(2)]
    run_to_end(third_run)
    run_to_end(fourth_run)
    assert read(cast.vip, up_to=f"{cast.vip.id}-{fourth}").get_json() == {"marked": 3, "unread": 0}


def test_mark_up_to_includes_lower_message_ids_of_the_same_batch(cast, read):
    posted = [post(cast.subscriber, cast.general, "gold") for _ in range(3)]
    first, *others = [run_id for _, run_id in posted]
    fanout.process_batch(claims.claim_batch(first, others, 1_000))
    assert read(cast.vip, up_to=f"{cast.vip.id}-{posted[1][0]}").get_json() == {"marked": 2, "unread": 1}


def test_mark_up_to_skips_an_older_notification_that_a_later_edit_made_a_mention(cast, read):
    """It was read and is unread again; the list that showed `up_to` did not show it as a mention."""
    first, second = [post_and_notify(cast.subscriber, cast.general, "gold") for _ in range(2)]
    assert read(cast.vip, ids=[f"{cast.vip.id}-{first}"]).get_json() == {"marked": 1, "unread": 1}
    edit(cast.subscriber, first, "gold for @vera")
    assert read(cast.vip, up_to=f"{cast.vip.id}-{second}").get_json() == {"marked": 1, "unread": 1}
    third = post_and_notify(cast.subscriber, cast.general, "gold")
    assert read(cast.vip, up_to=f"{cast.vip.id}-{third}").get_json() == {"marked": 2, "unread": 0}


def test_mark_up_to_takes_a_fixed_number_of_statements(cast, read):
    executed = []
    for number in (1, 5):
        last = [post_and_notify(cast.subscriber, cast.general, "gold") for _ in range(number)][-1]
        with statements() as seen:
            assert read(cast.vip, up_to=f"{cast.vip.id}-{last}").get_json()["marked"] == number
        executed.append(len(seen))
    assert executed[0] == executed[1]


def test_mark_as_read_by_channel_and_all(cast, notify, read):
    notify("one")
    notify("two", cast.announcements, cast.admin)
    notify("three", cast.announcements, cast.admin)
    assert read(cast.vip, channel_id=cast.announcements).get_json() == {"marked": 2, "unread": 1}
    assert read(cast.vip, all=True).get_json() == {"marked": 1, "unread": 0}
    assert read(cast.vip, all=True).get_json() == {"marked": 0, "unread": 0}


def test_mark_as_read_requires_exactly_one_selector(cast, notify, read, unread, subtests):
    notify("one")
    own = f"{cast.vip.id}-1"
    for selector in (
        {}, {"ids": [own], "all": True}, {"up_to": own, "channel_id": cast.general}, {"all": True, "up_to": own},
        {"ids": [own], "up_to": own, "channel_id": cast.general, "all": True}, {"ids": None}, {"ids": []},
        {"ids": ["x"]}, {"ids": [own, "x"]}, {"ids": [1]}, {"ids": own}, {"ids": [f"{own}'--"]}, {"ids": [f"-{own}"]},
        {"ids": [f"{10**400}-1"]}, {"up_to": 1}, {"up_to": "1"}, {"up_to": None}, {"channel_id": None}, {"all": False},
        {"all": None}, {"all": True, "why": "x"},
    ):  # fmt: skip
        with subtests.test(str(selector)[:60]):
            assert_problem(read(cast.vip, **selector), 422, "invalid")
    assert unread(cast.vip)["unread"] == 1


def test_notifications_of_another_user_are_treated_as_missing(api, cast, notify, inbox, read, unread):
    notify("one")
    theirs = inbox(cast.vip)[0]["id"]
    mo = cast.moderator
    assert read(mo, ids=[theirs]).get_json() == {"marked": 0, "unread": 1}
    assert read(mo, ids=[theirs, f"{mo.id}-1"]).get_json() == {"marked": 1, "unread": 0}
    responses = [api(mo).delete(f"/api/notifications/{own}-1") for own in (cast.vip.id, 987_654)]
    details = {assert_problem(response, 404, "not_found")["detail"].replace("987654", "4") for response in responses}
    assert len({re.sub(r"\d+-", "", detail) for detail in details}) == 1
    replies = [read(mo, up_to=f"{own}-1").get_json() for own in (cast.vip.id, 987_654)]
    assert replies[0] == replies[1]
    assert unread(cast.vip)["unread"] == 1


def test_a_dismissed_notification_does_not_come_back(api, cast, notify, inbox, read, unread, run_jobs):
    notify("one")
    notify("two @vera")
    address = f"/api/notifications/{cast.vip.id}-2"
    response = api(cast.vip).delete(address)
    assert (response.status_code, response.data) == (204, b"")
    assert_problem(api(cast.vip).delete(address), 404, "not_found")
    assert bodies(inbox(cast.vip)) == ["one"]
    assert unread(cast.vip) == {
        "unread": 1,
        "mentions": 0,
        "channels": [{"channel_id": cast.general, "unread": 1, "mentions": 0}],
    }
    assert read(cast.vip, ids=[f"{cast.vip.id}-2"]).get_json()["marked"] == 0
    set_subscription(cast.lapsed.id, "active", None)  # a member to be notified, so that a run is created
    assert api(cast.admin).post("/api/runs/2/replay").status_code == 202
    assert run_jobs() == 0
    assert bodies(inbox(cast.vip)) == ["one"]
    assert len(inbox(cast.moderator)) == 2


# Lost access ----------------------------------------------------------------------------------------------


def test_losing_access_to_a_channel_hides_its_notifications(api, cast, notify, inbox, read, unread):
    vic = make_person("vic")
    servers.put_member(cast.server_id, vic.id, [cast.vip_role])
    notify("in the open")
    notify("in the vault @vic", cast.vault, cast.vip)
    assert unread(vic)["unread"] == 2
    servers.put_member(cast.server_id, vic.id, [])
    assert bodies(inbox(vic)) == ["in the open"]
    assert unread(vic)["channels"] == [{"channel_id": cast.general, "unread": 1, "mentions": 0}]
    assert_problem(read(vic, channel_id=cast.vault), 404, "not_found")
    assert_problem(api(vic).get(f"/api/notifications?channel_id={cast.vault}"), 404, "not_found")
    assert read(vic, all=True).get_json() == {"marked": 1, "unread": 0}
    servers.put_member(cast.server_id, vic.id, [cast.vip_role])
    assert bodies(inbox(vic, "unread=1")) == ["Vera: in the vault @vic"]


def test_leaving_a_server_hides_its_notifications(api, cast, notify, inbox, unread):
    notify("hello @vera")
    api(cast.admin).delete(f"/api/servers/{cast.server_id}/members/{cast.vip.id}")
    assert inbox(cast.vip) == []
    assert unread(cast.vip) == NOTHING


def test_making_a_channel_private_hides_its_notifications(api, cast, notify, inbox, unread):
    notify("hello")
    api(cast.admin).patch(f"/api/channels/{cast.general}", json={"private": True})
    assert inbox(cast.vip) == []
    assert unread(cast.vip) == NOTHING


LOST = {
    "membership": ("DELETE", "/api/servers/{cast.server_id}/members/{cast.subscriber.id}", None, {"role_ids": []}),
    "role": ("PUT", "/api/servers/{cast.server_id}/members/{cast.vip.id}", {"role_ids": []}, {"role_ids": [1]}),
    "posting": ("PATCH", "/api/channels/{cast.general}", {"posting": "admins"}, {"posting": "members"}),
    "admin": ("PATCH", "/api/users/{cast.admin.id}", {"is_admin": False}, {"is_admin": True}),
}
"""How an author loses a right: method, path, body; and the body that restores it."""


@pytest.mark.parametrize("lost", list(LOST))
def test_messages_are_hidden_while_their_author_may_not_post(api, cast, notify, inbox, unread, read, lost):
    admin, vic = make_person("alma", admin=True), make_person("vic")
    servers.put_member(cast.server_id, vic.id, [cast.vip_role])
    channel, author = {"role": (cast.vault, cast.vip), "admin": (cast.announcements, cast.admin)}.get(
        lost, (cast.general, cast.subscriber)
    )
    notify("by another author", cast.vault, admin)
    message = notify("@vic and all", channel, author)
    before = bodies(inbox(vic)), unread(vic)
    assert len(before[0]) == 2

    method, path, revoke, restore = LOST[lost]
    path = path.format(cast=cast)
    assert api(admin).open(method, path, **({"json": revoke} if revoke else {})).status_code in (200, 204)
    assert len(inbox(vic)) == unread(vic)["unread"] == 1
    assert_problem(api(vic).delete(f"/api/notifications/{vic.id}-{message}"), 404, "not_found")
    assert read(vic, ids=[f"{vic.id}-{message}"]).get_json()["marked"] == 0
    assert "may no longer post" in api(vic).get(f"/api/messages/{message}/explain").get_json()["detail"]

    method = "PUT" if method == "DELETE" else method
    assert api(admin).open(method, path, json=restore).status_code == 200
    assert (bodies(inbox(vic)), unread(vic)) == before


def test_messages_of_a_lapsed_author_stay_in_the_inbox(api, cast, notify, inbox):
    notify("while it lasted")
    api(cast.admin).put(f"/api/users/{cast.subscriber.id}/subscription", json={"status": "canceled"})
    assert bodies(inbox(cast.vip)) == ["while it lasted"]


def test_a_lapsed_subscriber_keeps_their_notifications(api, cast, notify, inbox):
    notify("while it lasted")
    api(cast.admin).put(f"/api/users/{cast.vip.id}/subscription", json={"status": "canceled"})
    notify("and afterwards")
    assert bodies(inbox(cast.vip)) == ["while it lasted"]


# Preferences ----------------------------------------------------------------------------------------------


def test_reading_a_preference_creates_no_row(api, cast):
    path = f"/api/channels/{cast.general}/preference"
    assert api(cast.vip).get(path).get_json() == {"level": "all", "muted_until": None}
    assert Preference.select().count() == 0


def test_a_preference_is_replaced_as_a_whole_and_takes_effect(api, cast, notify, inbox):
    vera, path = api(cast.vip), f"/api/channels/{cast.general}/preference"
    until = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    muted = {"level": "mentions", "muted_until": until.isoformat().replace("+00:00", "Z")}
    for _ in range(2):
        assert vera.put(path, json=muted).get_json() == muted
        assert vera.get(path).get_json() == muted
    assert Preference.select().count() == 1
    elsewhere = until.astimezone(timezone(timedelta(hours=5, minutes=45))).isoformat()
    assert vera.put(path, json={"level": "mentions", "muted_until": elsewhere}).get_json() == muted
    notify("@everyone", author=cast.admin)
    notify("@vera")
    assert bodies(inbox(cast.vip)) == ["@vera"]
    assert vera.put(path, json={"level": "none"}).get_json() == {"level": "none", "muted_until": None}
    notify("@vera again")
    assert bodies(inbox(cast.vip)) == ["@vera"]
    assert vera.put(path, json={}).get_json() == {"level": "all", "muted_until": None}
    assert api(cast.moderator).get(path).get_json()["level"] == "all"


def test_mark_read_raises_unless_called_with_one_selector(cast):
    for selectors in ({}, {"ids": [], "channel_id": cast.general}):
        with pytest.raises(ValueError, match="Exactly one"):
            mark_read(cast.vip.user, **selectors)
