"""Edits: which users are notified and which notifications are retracted, in any order of the jobs."""

import threading
import time

import pytest

from belfry.core.db import db, execute, fetch_one
from belfry.core.errors import Forbidden, NotFound
from belfry.fanout import claims, runs
from belfry.identity.subscriptions import set_subscription
from belfry.inbox import inbox
from belfry.inbox.inbox import dismiss, unread_count
from belfry.integrity.verification import verify
from belfry.messages import messages
from belfry.servers import servers
from belfry.servers.preferences import set_preference
from tests.fanout_helpers import (
    add_members,
    all_rows,
    claim_and_process,
    edit,
    fault_on_insert,
    mark_everything_read,
    notified,
    post,
    post_and_notify,
    process_next,
    remaining_work_items,
    run_of,
    run_to_end,
    set_mentions_only,
    stats,
    unread,
)


def test_an_edit_that_adds_a_mention_notifies_only_newly_mentioned_users(cast):
    set_mentions_only(cast.vip, cast.general)
    set_mentions_only(cast.moderator, cast.general)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold, @lars")
    assert notified(message_id) == {cast.admin.id: "message"}
    set_subscription(cast.lapsed.id, "active", None)  # would be notified now, but the edit does not change this mention
    edited = edit(cast.subscriber, message_id, "gold, @lars and @vera")
    assert notified(message_id) == {cast.admin.id: "message", cast.vip.id: "mention"}
    assert (edited["inserted"], edited["retracted"]) == (1, 0)


@pytest.mark.parametrize("mention", ["@vip", "@everyone"])
def test_an_edit_that_adds_a_group_notifies_its_members(cast, mention):
    set_mentions_only(cast.vip, cast.general)
    message_id = post_and_notify(cast.moderator, cast.general, "gold")
    assert cast.vip.id not in notified(message_id)
    edit(cast.moderator, message_id, f"gold, {mention}")
    assert notified(message_id)[cast.vip.id] == {"@vip": "mention_role", "@everyone": "mention_everyone"}[mention]


def test_an_added_mention_follows_the_notification_rules(cast):
    set_preference(cast.vip.user, cast.general, "none", None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    before = notified(message_id)
    assert edit(cast.subscriber, message_id, "@vera @lars @sam")["inserted"] == 0
    assert notified(message_id) == before


def test_a_plain_notification_becomes_an_unread_mention(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    mark_everything_read(cast.moderator)
    mark_everything_read(cast.vip)
    edited = edit(cast.subscriber, message_id, "gold, @moira")
    assert (edited["inserted"], edited["retracted"]) == (0, 0)
    assert notified(message_id)[cast.moderator.id] == "mention"
    assert unread_count(cast.moderator.user)["mentions"] == unread(cast.moderator) == 1
    assert unread(cast.vip) == 0, "other users are not notified again"
    (shown,) = inbox.list_notifications(cast.moderator.user, before=None, limit=10)
    assert shown["title"] == "You were mentioned in Golden Signals #general"


def test_an_edit_that_removes_a_mention_retracts_unread_notifications_of_that_mention_only(cast):
    set_mentions_only(cast.vip, cast.general)
    message_id = post_and_notify(cast.subscriber, cast.general, "@vera @moira")
    edited = edit(cast.subscriber, message_id, "nobody")
    assert notified(message_id) == {cast.admin.id: "message", cast.moderator.id: "message"}
    assert (edited["inserted"], edited["retracted"]) == (0, 1)
    assert unread(cast.vip) == 0
    assert unread_count(cast.moderator.user)["mentions"] == 0


def test_a_user_who_is_still_mentioned_in_another_way_keeps_the_notification(cast):
    set_mentions_only(cast.vip, cast.general)
    message_id = post_and_notify(cast.moderator, cast.general, "@vera @vip @everyone")
    for content, reason in (
        ("@vip @everyone", "mention_role"),
        ("@everyone", "mention_everyone"),
        ("@vera", "mention"),
    ):
        assert edit(cast.moderator, message_id, content)["retracted"] == 0
        assert notified(message_id)[cast.vip.id] == reason
    assert edit(cast.moderator, message_id, "nobody")["retracted"] == 1
    assert cast.vip.id not in notified(message_id)


@pytest.mark.parametrize(("members", "mention"), [(100, "@vera"), (2, "@vera"), (100, "@vip"), (2, "@everyone")])
def test_an_edit_retracts_an_unread_mention_of_a_former_member(cast, set_slice_size, members, mention):
    set_slice_size(members)
    message_id = post_and_notify(cast.moderator, cast.general, mention)
    servers.remove_member(cast.server_id, cast.vip.id)
    edited = edit(cast.moderator, message_id, "nobody")
    assert edited["retracted"] == 1
    servers.put_member(cast.server_id, cast.vip.id, [cast.vip_role])
    assert unread(cast.vip) == 0
    assert verify() == []


def test_a_former_member_keeps_read_mentions_and_plain_notifications(cast):
    plain = post_and_notify(cast.subscriber, cast.general, "@moira")
    read = post_and_notify(cast.subscriber, cast.general, "@vera")
    inbox.mark_read(cast.vip.user, ids=[(cast.vip.id, read)])
    servers.remove_member(cast.server_id, cast.vip.id)
    for message_id in (plain, read):
        edit(cast.subscriber, message_id, "nobody")
    assert (notified(plain)[cast.vip.id], notified(read)[cast.vip.id]) == ("message", "mention")


def test_a_read_notification_is_not_retracted(cast):
    set_mentions_only(cast.vip, cast.general)
    message_id = post_and_notify(cast.subscriber, cast.general, "@vera")
    mark_everything_read(cast.vip)
    assert edit(cast.subscriber, message_id, "nobody")["retracted"] == 0
    assert notified(message_id)[cast.vip.id] == "mention"
    assert unread(cast.vip) == 0


def test_a_read_notification_stays_read_when_its_mention_is_removed(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "@moira")
    mark_everything_read(cast.moderator)
    edit(cast.subscriber, message_id, "nobody")
    assert unread(cast.moderator) == 0


def test_a_repeated_edit_run_changes_nothing(cast):
    set_mentions_only(cast.vip, cast.general)
    message_id = post_and_notify(cast.subscriber, cast.general, "@ada")
    posted = messages.edit_message(cast.subscriber.user, message_id, "@moira @vera")
    run_to_end(posted.run_id)
    mark_everything_read(cast.moderator)
    before = all_rows()["notification"]
    changes = fetch_one("SELECT mention_diff FROM run WHERE id = %(run_id)s", {"run_id": posted.run_id})
    again = runs.create_run(message_id, "edit", changes["mention_diff"])
    assert run_to_end(again) == "succeeded"
    assert all_rows()["notification"] == before
    assert (stats(again)["inserted"], stats(again)["retracted"]) == (0, 0)


def test_an_edit_without_changed_mentions_creates_no_run(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "@moira is right")
    before = all_rows()
    assert messages.edit_message(cast.subscriber.user, message_id, "@moira is wrong, `@vera`").run_id == 0
    after = all_rows()
    assert after.pop("message") != before.pop("message")
    assert after == before


@pytest.mark.parametrize("edit_first", [False, True], ids=["in order", "edit run first"])
def test_an_edit_before_the_first_run_gives_the_result_of_the_edited_text(cast, edit_first):
    set_mentions_only(cast.vip, cast.general)
    set_mentions_only(cast.moderator, cast.general)
    message_id, first = post(cast.subscriber, cast.general, "@vera")
    second = messages.edit_message(cast.subscriber.user, message_id, "@moira").run_id
    for run_id in (second, first) if edit_first else (first, second):
        assert run_to_end(run_id) == "succeeded"
    assert notified(message_id) == {cast.admin.id: "message", cast.moderator.id: "mention"}
    assert unread(cast.moderator) == 1


def test_an_edit_during_the_first_run_gives_the_result_of_the_edited_text(cast, set_slice_size):
    many = add_members(cast.server_id, 8)
    set_slice_size(6)
    for person in (cast.vip, cast.moderator):
        set_mentions_only(person, cast.general)
    message_id, first = post(cast.moderator, cast.general, "@vera @crowd-8")
    process_next(first)
    second = messages.edit_message(cast.moderator.user, message_id, "@crowd-1").run_id
    process_next(second)
    for run_id in (first, second):
        assert run_to_end(run_id) == "succeeded"
        assert stats(run_id)["audience"] == 13
    expected = dict.fromkeys([cast.admin.id, cast.subscriber.id, *many], "message") | {many[0]: "mention"}
    assert notified(message_id) == expected


def test_an_edit_changes_nothing_for_other_members(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "@ada and @moira")
    set_preference(cast.vip.user, cast.general, "none", None)
    set_preference(cast.moderator.user, cast.general, "none", None)
    before = notified(message_id)
    edited = edit(cast.subscriber, message_id, "@ada, @moira and @lars")
    assert (edited["inserted"], edited["retracted"], notified(message_id)) == (0, 0, before)
    assert unread(cast.vip) == unread(cast.moderator) == 1


def test_an_edit_that_only_adds_a_mention_retracts_nothing(cast):
    message_id = post_and_notify(cast.moderator, cast.general, "gold")
    set_preference(cast.vip.user, cast.general, "mentions", None)
    set_preference(cast.subscriber.user, cast.general, "none", None)
    assert unread(cast.subscriber) == 1
    assert edit(cast.moderator, message_id, "gold, @everyone")["retracted"] == 0
    assert unread(cast.subscriber) == 1


def test_edits_do_not_restore_a_dismissed_notification(cast):
    set_mentions_only(cast.vip, cast.general)
    message_id = post_and_notify(cast.subscriber, cast.general, "@vera")
    dismiss(cast.vip.user, cast.vip.id, message_id)
    edit(cast.subscriber, message_id, "nobody")
    edit(cast.subscriber, message_id, "@vera")
    assert inbox.list_notifications(cast.vip.user, before=None, limit=10) == []


def test_a_dismissed_notification_that_becomes_a_mention_stays_dismissed(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    dismiss(cast.vip.user, cast.vip.id, message_id)
    edit(cast.subscriber, message_id, "@vera")
    assert inbox.list_notifications(cast.vip.user, before=None, limit=10) == []
    assert unread(cast.vip) == 0


@pytest.mark.parametrize("members", [100, 2], ids=["unsliced", "slices"])
def test_an_edit_waits_for_the_fan_out_and_then_retracts(cast, set_slice_size, members):
    set_mentions_only(cast.vip, cast.general)
    set_slice_size(members)
    message_id, run_id = post(cast.subscriber, cast.general, "gold")
    if members == 2:
        process_next(run_id)  # so that a slice notifies vera, and not the run's first work item
    execute(f"UPDATE message SET mentioned_users = '{{{cast.vip.id}}}'")
    items = remaining_work_items(run_id)

    def notify() -> None:
        with db.connection_context():
            for item in items:
                claim_and_process(item)

    fan_out = threading.Thread(target=notify)
    with fault_on_insert("PERFORM pg_sleep(0.5);"):
        fan_out.start()
        time.sleep(0.2)
        edited = messages.edit_message(cast.subscriber.user, message_id, "@moira").run_id
        run_to_end(edited)
        fan_out.join()
    run_to_end(run_id)
    assert notified(message_id) == {cast.admin.id: "message", cast.moderator.id: "mention"}


def test_an_edit_does_not_wait_for_later_slices(cast, set_slice_size):
    """Two workers process a large fan-out, so that at least one of them holds the message lock at any time."""
    add_members(cast.server_id, 60)
    set_slice_size(1)
    message_id, run_id = post(cast.subscriber, cast.general)
    process_next(run_id)
    left = remaining_work_items(run_id)

    def notify() -> None:
        with db.connection_context():
            while left:
                claim_and_process(left.pop())

    workers = [threading.Thread(target=notify) for _ in range(2)]
    with fault_on_insert("PERFORM pg_sleep(0.1);"):
        for worker in workers:
            worker.start()
            time.sleep(0.05)
        messages.edit_message(cast.subscriber.user, message_id, "silver")
        waiting = len(left)
        for worker in workers:
            worker.join()
    assert waiting > 40
    assert run_of(run_id)["state"] == "succeeded"


def test_an_unauthorized_edit_or_deletion_is_refused_without_waiting_for_the_lock(cast, in_another_session):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    execute("SET lock_timeout = '2s'")
    with in_another_session(f"SELECT pg_advisory_xact_lock_shared({claims.MESSAGE_LOCK}, {message_id})"):
        for person in (cast.vip, cast.stranger):
            with pytest.raises((Forbidden, NotFound)):
                messages.edit_message(person.user, message_id, "mine")
            with pytest.raises((Forbidden, NotFound)):
                messages.delete_message(person.user, message_id)
    execute("RESET lock_timeout")


def test_permission_to_edit_is_checked_again_under_the_lock(cast, at_failpoint):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    at_failpoint("message.locked", lambda: execute("UPDATE message SET deleted_at = now()"))
    with pytest.raises(NotFound):
        messages.edit_message(cast.subscriber.user, message_id, "silver")
