"""The fan-out: slices, concurrent workers, test messages, and costs that must not grow with the audience."""

import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from belfry.cli.seeding import seed
from belfry.core.db import db
from belfry.fanout import claims, fanout
from belfry.integrity.verification import verify
from belfry.messages import messages
from belfry.servers import servers
from belfry.servers.preferences import set_preference
from config import settings
from models import Notification
from tests.fanout_helpers import (
    PLAIN_MESSAGE_STATS,
    Killed,
    add_members,
    claim_and_process,
    fail_at_work_item,
    inserts_notifications,
    notified,
    post,
    process_next,
    remaining_work_items,
    run_of,
    run_to_end,
    set_mentions_only,
    statements,
    stats,
    unread,
)
from tests.people import Person, make_person

# Slices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 5, 7, 24, 25, 26, 1000])
def test_each_member_is_counted_once_over_many_slices(cast, set_slice_size, members):
    many = add_members(cast.server_id, 20)
    set_slice_size(members)
    message_id, run_id = post(cast.subscriber, cast.general)
    with statements() as seen:
        assert run_to_end(run_id) == "succeeded"
    assert sum(map(inserts_notifications, seen)) == -(-25 // members)
    assert stats(run_id) == PLAIN_MESSAGE_STATS | {"audience": 25, "notified": 23, "message": 23, "inserted": 23}
    assert notified(message_id).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id, *many}
    run = run_of(run_id)
    assert (run["state"], run["attempts"], run["members_processed"], run["members_total"]) == ("succeeded", 1, 25, 25)
    assert run["started_at"] <= run["finished_at"]
    assert verify() == []


def test_a_large_audience_is_sliced_and_the_progress_is_visible(cast, set_slice_size):
    add_members(cast.server_id, 20)
    set_slice_size(10)
    _, run_id = post(cast.subscriber, cast.general)
    assert run_of(run_id)["members_total"] is None
    process_next(run_id)
    assert len(remaining_work_items(run_id)) == 3
    for done in (0, 10, 20):
        run = run_of(run_id)
        assert (run["state"], run["finished_at"]) == ("running", None)
        assert (run["members_processed"], run["members_total"]) == (done, 25)
        assert verify() == []
        process_next(run_id)
    assert (run_of(run_id)["state"], run_of(run_id)["members_processed"]) == ("succeeded", 25)


@pytest.mark.parametrize("mention", ["@crowd-17", "@crowd-17 @crowd-3 @vera @lars @sam", "@vip", "@vip @crowd-4"])
def test_mentioned_members_are_notified_first_and_counted_once(cast, set_slice_size, mention):
    many = add_members(cast.server_id, 20)
    servers.put_member(cast.server_id, many[9], [cast.vip_role])
    set_mentions_only(cast.vip, cast.general)
    set_preference(cast.admin.user, cast.general, "none", None)
    set_slice_size(6)
    message_id, run_id = post(cast.moderator, cast.general, mention)
    process_next(run_id)
    first = notified(message_id)
    assert first
    assert set(first.values()) <= {"mention", "mention_role"}
    run_to_end(run_id)
    in_the_end = notified(message_id)
    assert first == {user: reason for user, reason in in_the_end.items() if reason != "message"}
    assert len(in_the_end) == stats(run_id)["notified"] == stats(run_id)["inserted"]
    assert (stats(run_id)["audience"], run_of(run_id)["members_total"]) == (25, 25)
    assert verify() == []


def test_members_of_a_mentioned_role_are_notified_first_up_to_one_slice(cast, set_slice_size):
    many = add_members(cast.server_id, 20)
    for user_id in many[:9]:
        servers.put_member(cast.server_id, user_id, [cast.vip_role])
    set_slice_size(4)
    message_id, run_id = post(cast.moderator, cast.general, "@vip and @crowd-20")
    process_next(run_id)
    first = notified(message_id)
    assert len(first) == 4
    assert first[many[19]] == "mention", "named users come before members of a role"
    assert run_to_end(run_id) == "succeeded"
    assert stats(run_id)["mention_role"] == 10
    assert (stats(run_id)["audience"], stats(run_id)["inserted"]) == (25, len(notified(message_id)))


def test_a_member_notified_first_is_not_decided_again_after_a_preference_change(cast, set_slice_size):
    add_members(cast.server_id, 20)
    set_slice_size(4)
    message_id, run_id = post(cast.subscriber, cast.general, "@vera")
    process_next(run_id)
    set_preference(cast.vip.user, cast.general, "none", None)
    assert run_to_end(run_id) == "succeeded"
    assert (stats(run_id)["mention"], stats(run_id).get("channel_off"), notified(message_id)[cast.vip.id]) == (
        1, None, "mention",
    )  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), Killed()], ids=["an error", "a kill"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupted_work_item_changes_nothing_and_the_next_attempt_continues(
    cast, set_slice_size, at_failpoint, error, number
):
    many = add_members(cast.server_id, 20)
    set_slice_size(10)
    message_id, run_id = post(cast.subscriber, cast.general, "@vera")
    fail_at_work_item(at_failpoint, number, error)
    with pytest.raises(type(error)):
        run_to_end(run_id)

    run = run_of(run_id)
    assert (run["state"], run["members_processed"]) == ("running", {1: 0, 2: 1, 3: 10}[number])
    assert len(notified(message_id)) == stats(run_id)["notified"] == stats(run_id)["inserted"]
    assert verify() == []

    with statements() as seen:
        assert run_to_end(run_id) == "succeeded"
    assert sum(map(inserts_notifications, seen)) == 5 - number, "the next attempt continues with that work item"
    changed = {"audience": 25, "notified": 23, "message": 22, "mention": 1, "inserted": 23}
    assert stats(run_id) == PLAIN_MESSAGE_STATS | changed
    assert notified(message_id).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id, *many}
    assert run_of(run_id)["attempts"] == 2
    assert verify() == []


def test_processing_a_finished_run_again_changes_nothing(cast):
    _, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    assert claims.claim(claims.WorkItem(run_id)) is None
    assert claims.claim(claims.WorkItem(run_id, 0)) is None


def test_a_run_that_does_not_exist_cannot_be_claimed(cast):
    assert claims.claim(claims.WorkItem(4711)) is None
    assert claims.claim(claims.WorkItem(4711, 0)) is None


def test_many_workers_on_one_run_notify_and_count_each_member_once(cast, set_slice_size):
    add_members(cast.server_id, 95)
    set_slice_size(7)
    message_id, run_id = post(cast.subscriber, cast.general, "@vera")
    process_next(run_id)
    slices = remaining_work_items(run_id)
    assert len(slices) == 15

    def process_all() -> int:
        done = 0
        for item in slices:  # each thread claims all slices
            attempt = claims.claim(item)
            if attempt is not None:
                fanout.process_work_item(item, attempt)
                done += 1
        return done

    assert sum(in_threads(process_all, 4)) >= 15
    changed = {"audience": 100, "notified": 98, "message": 97, "mention": 1, "inserted": 98}
    assert stats(run_id) == PLAIN_MESSAGE_STATS | changed
    assert len(notified(message_id)) == Notification.select().count() == 98
    run = run_of(run_id)
    assert (run["state"], run["members_processed"], run["members_total"]) == ("succeeded", 100, 100)
    assert verify() == []


def test_two_slices_that_end_at_the_same_time_are_both_counted_and_finish_the_run(cast, set_slice_size, at_failpoint):
    add_members(cast.server_id, 5)
    set_slice_size(5)
    _, run_id = post(cast.subscriber, cast.general)
    process_next(run_id)
    both_have_inserted = threading.Barrier(2, timeout=30)
    at_failpoint("slice.notified", lambda: both_have_inserted.wait() and None)
    first, second = remaining_work_items(run_id)
    tokens = [(item, claims.claim(item)) for item in (first, second)]
    in_threads(lambda: fanout.process_work_item(*tokens.pop()), 2)
    assert (run_of(run_id)["state"], run_of(run_id)["members_processed"]) == ("succeeded", 10)
    assert verify() == []


def in_threads(work: Callable[[], Any], number: int) -> list[Any]:
    """The results of `work` in `number` threads, each with its own connection. Errors are raised here."""
    results: list[Any] = []

    def run() -> None:
        try:
            with db.connection_context():
                results.append(work())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_deleting_a_message_ends_its_run_and_notifies_nobody_else(cast, set_slice_size):
    add_members(cast.server_id, 20)
    set_slice_size(10)
    message_id, run_id = post(cast.subscriber, cast.general)
    process_next(run_id)
    process_next(run_id)
    so_far = stats(run_id)
    messages.delete_message(cast.subscriber.user, message_id)
    assert run_to_end(run_id) == "succeeded"
    assert stats(run_id) == so_far
    assert (run_of(run_id)["members_processed"], run_of(run_id)["members_total"]) == (10, 10)
    assert len(notified(message_id)) == so_far["inserted"]
    assert unread(cast.admin) == 0


def test_a_message_deleted_before_its_run_notifies_nobody(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    messages.delete_message(cast.subscriber.user, message_id)
    assert run_to_end(run_id) == "succeeded"
    assert stats(run_id) == {"audience": 0, "notified": 0, "inserted": 0, "retracted": 0}
    assert notified(message_id) == {}


# Test messages --------------------------------------------------------------------------------------------


def test_a_test_message_notifies_and_is_visible_to_its_sender_only(api, cast, run_jobs):
    caller = make_person("alma", status=None, admin=True)  # has the highest user id
    servers.put_member(cast.server_id, caller.id, [])
    response = api(caller).post("/api/test-notifications", json={"channel_id": cast.general})
    assert response.status_code == 202
    assert run_jobs() == 0
    run = api(caller).get(response.headers["Location"]).get_json()
    assert (run["state"], run["kind"], run["progress"]) == ("succeeded", "test", {"done": 1, "total": 1})
    message_id = run["message_id"]
    assert notified(message_id) == {caller.id: "mention"}

    for person in (caller, cast.admin, cast.moderator, cast.subscriber):
        listed = api(person).get(f"/api/channels/{cast.general}/messages").get_json()["items"]
        found = api(person).get(f"/api/messages/{message_id}").status_code
        in_inbox = api(person).get("/api/notifications").get_json()["items"]
        if person is caller:
            assert [message["id"] for message in listed] == [message_id]
            assert [notification["message_id"] for notification in in_inbox] == [message_id]
            assert found == 200
        else:
            assert (listed, in_inbox, found) == ([], [], 404)


# Costs that must not grow with the audience ---------------------------------------------------------------


@dataclass
class Measured:
    """The costs of a message to this number of members."""

    members: int
    of_post: int  # SQL statements of the request that posted it
    of_run: int  # SQL statements of the run's first work item
    of_slices: list[int]  # SQL statements of each slice
    peak: int  # peak memory of Python for the run, in bytes
    stats: dict[str, Any]
    notifications: int


SMALL, MEDIUM, LARGE = 10, 1_000, 100_000


@pytest.fixture(scope="module")
def measured(app, _schema) -> dict[int, Measured]:
    db.connect(reuse_if_open=True)
    author = make_person("author-of-all", status=None, admin=True)
    client = app.test_client()
    measure(client, author, SMALL)  # load what stays in memory first
    return {members: measure(client, author, members) for members in (SMALL, MEDIUM, LARGE)}


def measure(client, author: Person, members: int) -> Measured:
    server = seed(members, 3)
    with statements() as seen:
        response = client.post(
            "/api/messages",
            json={"channel_id": server["channel_ids"][0], "content": f"@{server['usernames'][0]} and @vip"},
            headers={"Authorization": f"Bearer {author.token}"},
        )
    assert response.status_code == 201
    of_post, run_id = len(seen), response.get_json()["run"]["id"]

    of_items = []
    tracemalloc.start()
    try:
        with statements() as seen:
            process_next(run_id)
        of_items.append(len(seen))
        for item in remaining_work_items(run_id):
            with statements() as seen:
                claim_and_process(item)
            of_items.append(len(seen))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert run_of(run_id)["state"] == "succeeded"
    notifications = Notification.select().where(Notification.message_id == response.get_json()["id"]).count()
    return Measured(members, of_post, of_items[0], of_items[1:], peak, stats(run_id), notifications)


def test_a_slice_takes_the_same_statements_for_any_number_of_members(measured):
    assert [len(one.of_slices) for one in measured.values()] == [0, 0, LARGE // settings.fanout_slice_size + 1]
    assert measured[SMALL].of_run == measured[MEDIUM].of_run <= 9
    assert measured[LARGE].of_run - measured[SMALL].of_run == 2, "one for mentioned members and one for the slices"
    assert len(set(measured[LARGE].of_slices)) == 1
    assert measured[LARGE].of_slices[0] <= measured[SMALL].of_run


def test_posting_takes_the_same_statements_for_any_number_of_members(measured):
    assert measured[SMALL].of_post == measured[MEDIUM].of_post == measured[LARGE].of_post == 5


def test_a_run_takes_the_same_memory_for_any_number_of_members(measured):
    assert abs(measured[LARGE].peak - measured[MEDIUM].peak) < 1_000_000


def test_a_hundred_thousand_members_are_counted_exactly(measured):
    large = measured[LARGE]
    assert large.stats["audience"] >= LARGE
    assert large.stats["inserted"] == large.stats["notified"] == large.notifications
