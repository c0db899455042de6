"""Faults of an earlier implementation, with a test for each.

One more is in tests/fanout/test_fanout.py, `test_a_slice_takes_the_same_statements_for_any_number_of_members`: the
earlier implementation executed up to three statements for each recipient.
"""

import time
from datetime import UTC, datetime, timedelta

import pytest

import jobs
from belfry.core.db import execute, fetch_all
from belfry.identity.subscriptions import set_subscription
from belfry.identity.tokens import create_token, hash_token
from belfry.messages import messages
from belfry.queue import queues
from belfry.servers.preferences import set_preference
from belfry.servers.servers import put_member
from belfry.worker import maintenance
from models import Notification, Preference
from tests.fanout_helpers import fault_on_insert, process_next, remaining_work_items
from tests.people import Person, make_person


def post(api, author: Person, channel_id: int, content: str = "gold breaks out") -> dict:
    response = api(author).post("/api/messages", json={"channel_id": channel_id, "content": content})
    assert response.status_code == 201
    return response.get_json()


def notified(message: dict) -> dict[int, str]:
    found = Notification.select().where(Notification.message_id == message["id"])
    return {notification.user_id: notification.reason for notification in found}


def inbox_of(api, person: Person) -> list[dict]:
    return api(person).get("/api/notifications").get_json()["items"]


def add_user(cast, username: str, **kind) -> Person:
    """Add another user to the cast's server."""
    person = make_person(username, **kind)
    put_member(cast.server_id, person.id, [])
    return person


# Retries and losses ---------------------------------------------------------------------------------------


def test_a_failing_job_is_not_reported_as_successful(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    with fault_on_insert():
        run_jobs()
    run = api(cast.admin).get(message["run"]["url"]).get_json()
    assert run["state"] == "queued"
    assert "division by zero" in run["error"]
    assert notified(message) == {}
    queue = queues.queue()
    assert len(queue.scheduled_job_registry) == 1, "a retry is scheduled"
    assert len(queue.finished_job_registry) == 0


def test_a_job_that_keeps_failing_ends_failed_with_its_error(api, cast):
    message = post(api, cast.subscriber, cast.general)
    for _ in range(queues.MAX_ATTEMPTS):
        with fault_on_insert(), pytest.raises(Exception, match="division by zero"):
            jobs.notify(message["run"]["id"])
    run = api(cast.admin).get(message["run"]["url"]).get_json()
    assert (run["state"], run["attempts"]) == ("failed", queues.MAX_ATTEMPTS)
    assert "division by zero" in run["error"]


def test_notifications_are_not_lost_when_the_queue_cannot_be_reached(api, cast, run_jobs, redis_unavailable, caplog):
    with redis_unavailable():
        message = post(api, cast.subscriber, cast.general)
    assert api(cast.subscriber).get(message["run"]["url"]).get_json()["state"] == message["run"]["state"] == "pending"
    assert "Redis is unavailable" in caplog.text, "a warning is logged"
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    assert maintenance.sweep() == 1
    assert run_jobs() == 0
    assert notified(message).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id}


def test_notifications_survive_the_loss_of_the_queues_data(api, cast, run_jobs, redis):
    message = post(api, cast.subscriber, cast.general)
    redis.flushdb()
    assert run_jobs() == 0
    assert notified(message) == {}
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    assert maintenance.sweep() == 1
    assert run_jobs() == 0
    assert len(notified(message)) == 3


def test_repeating_a_run_inserts_no_duplicates(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    before = inbox_of(api, cast.vip)
    # as if no worker had claimed it
    execute(
        "UPDATE run SET state = 'pending', members_processed = 0, notifications_inserted = 0, decisions = '{}',"
        " finished_at = NULL, sweep_after = now()"
    )
    jobs.notify(message["run"]["id"])
    assert api(cast.subscriber).get(message["run"]["url"]).get_json()["stats"]["inserted"] == 0
    assert len(notified(message)) == Notification.select().count() == 3
    assert inbox_of(api, cast.vip) == before


def test_the_database_refuses_a_second_notification(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    inserted = execute(
        "INSERT INTO notification (user_id, message_id, reason) VALUES (%(user_id)s, %(message_id)s, 'message')"
        " ON CONFLICT DO NOTHING",
        {"user_id": cast.vip.id, "message_id": message["id"]},
    )
    assert inserted == 0


def test_a_fan_out_notifies_all_recipients_without_pauses(cast, monkeypatch):
    for number in range(30):
        put_member(cast.server_id, make_person(f"reader-{number}").id, [])
    posted = messages.post_message(cast.subscriber.user, cast.general, "gold")

    def fail(_: float) -> None:
        raise AssertionError("the fan-out pauses")

    monkeypatch.setattr(time, "sleep", fail)
    process_next(posted.run_id)
    assert remaining_work_items(posted.run_id) == [], "all recipients are in one work item"
    assert Notification.select().count() == 33


# Who is notified ----------------------------------------------------------------------------------------------


def test_the_author_is_not_notified(api, cast, run_jobs):
    message = post(api, cast.moderator, cast.general, "@moira notifies @everyone and herself")
    run_jobs()
    assert cast.moderator.id not in notified(message)
    assert inbox_of(api, cast.moderator) == []


def test_admins_are_notified_without_a_subscription(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    assert notified(message)[cast.admin.id] == "message"


def test_a_user_without_a_device_has_the_notification_in_the_inbox(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    for person in (cast.admin, cast.moderator, cast.vip):
        assert [one["message_id"] for one in inbox_of(api, person)] == [message["id"]]


def test_a_missing_preference_means_all_messages(api, cast, run_jobs):
    default = api(cast.vip).get(f"/api/channels/{cast.general}/preference").get_json()
    assert default == {"level": "all", "muted_until": None}
    assert Preference.select().count() == 0, "reading the preference creates no row"
    set_preference(cast.moderator.user, cast.general, default["level"], default["muted_until"])
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    assert notified(message)[cast.vip.id] == notified(message)[cast.moderator.id] == "message"


@pytest.mark.parametrize("status", ["active", "trialing", "past_due"])
def test_an_ended_period_is_not_an_active_subscription(api, cast, run_jobs, status):
    set_subscription(cast.vip.id, status, datetime.now(UTC) - timedelta(days=400))
    message = post(api, cast.subscriber, cast.general, "@vera")
    run_jobs()
    assert cast.vip.id not in notified(message)
    refused = api(cast.vip).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    assert (refused.status_code, refused.get_json()["code"]) == (403, "subscription_required")


@pytest.mark.parametrize(
    "content",
    ["@a", "@gmail", "@gm", "write to sam@gmail.com", "ada@vera.example", "@verandah", "@sammy", "a/@vera@x.org"],
)
def test_parts_of_names_and_addresses_mention_nobody(api, cast, run_jobs, content):
    readers = [cast.admin, cast.subscriber, cast.vip, add_user(cast, "gmail.fan"), add_user(cast, "alfred")]
    message = post(api, cast.moderator, cast.general, content)
    assert message["mentions"] == {"users": [], "roles": [], "everyone": False}
    run_jobs()
    assert {notified(message)[reader.id] for reader in readers} == {"message"}


def test_a_private_channel_notifies_only_its_members(api, cast, run_jobs):
    vip = add_user(cast, "victor")
    put_member(cast.server_id, vip.id, [cast.vip_role])
    message = post(api, cast.vip, cast.vault, "@moira @ada, look")
    run_jobs()
    assert notified(message) == {vip.id: "message"}


# Reading --------------------------------------------------------------------------------------------------


def test_a_deleted_message_notifies_nobody(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    assert api(cast.subscriber).delete(f"/api/messages/{message['id']}").status_code == 200
    run_jobs()
    assert notified(message) == {}


def test_a_message_that_is_deleted_later_is_no_longer_shown(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    assert len(inbox_of(api, cast.vip)) == 1
    api(cast.subscriber).delete(f"/api/messages/{message['id']}")
    assert inbox_of(api, cast.vip) == []
    assert api(cast.vip).get("/api/notifications/unread-count").get_json()["unread"] == 0


def test_an_edited_message_is_shown_as_it_is_now(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general, "gold at 1900")
    run_jobs()
    assert inbox_of(api, cast.vip)[0]["body"] == "Sam: gold at 1900"
    api(cast.subscriber).patch(f"/api/messages/{message['id']}", json={"content": "gold at 2900"})
    assert inbox_of(api, cast.vip)[0]["body"] == "Sam: gold at 2900"


def test_the_unread_count_is_not_capped_by_the_page(api, cast):
    unread = 250
    fetch_all(
        "WITH written AS ("
        " INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel_id)s, %(author_id)s, 'gold' FROM generate_series(1, %(unread)s) RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason)"
        " SELECT %(reader_id)s, id, 'message' FROM written RETURNING 1",
        {"channel_id": cast.general, "author_id": cast.subscriber.id, "reader_id": cast.vip.id, "unread": unread},
    )
    assert len(api(cast.vip).get("/api/notifications?limit=100").get_json()["items"]) == 100
    counted = api(cast.vip).get("/api/notifications/unread-count").get_json()
    assert counted == {
        "unread": unread,
        "mentions": 0,
        "channels": [{"channel_id": cast.general, "unread": unread, "mentions": 0}],
    }


# Access ---------------------------------------------------------------------------------------------------


def test_a_user_cannot_mark_another_users_notification_read(api, cast, run_jobs):
    post(api, cast.subscriber, cast.general)
    run_jobs()
    (notification,) = inbox_of(api, cast.vip)
    for other in (cast.moderator, cast.stranger, cast.admin):
        own = len(inbox_of(api, other))
        marked = api(other).post("/api/notifications/read", json={"ids": [notification["id"]]})
        assert marked.get_json() == {"marked": 0, "unread": own}
        assert api(other).post("/api/notifications/read", json={"up_to": notification["id"]}).status_code == 422
        assert api(other).delete(f"/api/notifications/{notification['id']}").status_code == 404
        api(other).post("/api/notifications/read", json={"all": True})
        api(other).post("/api/notifications/read", json={"channel_id": cast.general})
    assert inbox_of(api, cast.vip) == [notification]
    assert notification["read_at"] is None


def test_a_user_cannot_read_the_run_of_another_users_message(api, cast, run_jobs):
    message = post(api, cast.subscriber, cast.general)
    run_jobs()
    for other in (cast.vip, cast.moderator, cast.lapsed, cast.stranger):
        refused, unknown = api(other).get(message["run"]["url"]), api(other).get("/api/runs/4711")
        assert refused.status_code == unknown.status_code == 404, "the existence of the run is not revealed"
        assert api(other).get("/api/runs").status_code == 403
        assert api(other).post(f"{message['run']['url']}/replay", json={}).status_code == 403
    assert api().get(message["run"]["url"]).status_code == 401
    for reader in (cast.subscriber, cast.admin):
        assert api(reader).get(message["run"]["url"]).get_json()["id"] == message["run"]["id"]


def test_tokens_with_a_common_prefix_do_not_share_a_rate_limit(api, cast):
    def with_token(username: str, token: str) -> Person:
        person = add_user(cast, username)
        execute(
            "INSERT INTO api_token (user_id, token_hash) VALUES (%(user_id)s, %(hash)s)",
            {"user_id": person.id, "hash": hash_token(token)},
        )
        return Person(person.user, token)

    prefix = "belfry_" + "x" * 30
    one, other = with_token("castor", prefix + "1"), with_token("pollux", prefix + "2")

    def remaining(person: Person) -> int:
        response = api(person).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
        assert response.status_code == 201
        return int(response.headers["RateLimit-Remaining"])

    full = remaining(one)
    assert [remaining(one) for _ in range(3)] == [full - 1, full - 2, full - 3]
    assert remaining(other) == full


def test_another_token_of_a_user_has_the_same_rate_limit(api, cast):
    again = Person(cast.subscriber.user, create_token(cast.subscriber.user)[1])
    content = {"channel_id": cast.general, "content": "gold"}
    first = api(cast.subscriber).post("/api/messages", json=content).headers["RateLimit-Remaining"]
    assert api(again).post("/api/messages", json=content).headers["RateLimit-Remaining"] == str(int(first) - 1)
