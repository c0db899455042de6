"""Replays: dry runs, the notifications that a replay inserts, and that it retracts nothing."""

from typing import Any

from belfry.fanout import runs
from belfry.identity.subscriptions import set_subscription
from belfry.inbox import inbox
from belfry.inbox.inbox import dismiss
from belfry.messages.send_test import send_test
from belfry.servers.preferences import set_preference
from tests.fanout_helpers import (
    add_members,
    all_rows,
    mark_everything_read,
    notified,
    post,
    run_of,
    run_to_end,
    stats,
    unread,
)


def replayed(run_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replay a run; return the result of the request and the statistics of the new run."""
    announced = runs.replay(run_id, dry_run=False)
    assert run_to_end(announced["run_id"]) == "succeeded"
    assert announced["inserted"] == stats(announced["run_id"])["inserted"]
    return announced, stats(announced["run_id"])


def test_a_replay_without_changes_writes_nothing(cast, set_slice_size):
    add_members(cast.server_id, 20)
    set_slice_size(4)
    _, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    before = all_rows()
    announced = runs.replay(run_id, dry_run=False)
    assert (announced["inserted"], announced["unchanged"], announced["run_id"]) == (0, 23, None)
    assert announced["decisions_after"] == announced["decisions_before"]
    assert all_rows() == before


def test_a_replay_notifies_a_member_who_subscribed_since(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    before = notified(message_id)
    set_subscription(cast.lapsed.id, "active", None)
    announced, counted = replayed(run_id)
    assert (announced["inserted"], announced["unchanged"], counted["inserted"]) == (1, 3, 1)
    assert announced["decisions_before"]["no_subscription"] == 1
    assert announced["decisions_after"]["no_subscription"] == 0
    assert notified(message_id) == before | {cast.lapsed.id: "message"}


def test_a_replay_retracts_nothing(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    set_preference(cast.vip.user, cast.general, "none", None)
    set_subscription(cast.lapsed.id, "active", None)  # one member to notify, so that a run is created
    announced, counted = replayed(run_id)
    assert (announced["inserted"], announced["unchanged"], counted["notified"]) == (1, 3, 3)
    assert notified(message_id).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id, cast.lapsed.id}


def test_a_replay_does_not_change_read_and_dismissed_notifications(cast):
    _, run_id = post(cast.subscriber, cast.general, "@moira")
    run_to_end(run_id)
    mark_everything_read(cast.moderator)
    dismiss(cast.vip.user, cast.vip.id, run_of(run_id)["message_id"])
    set_subscription(cast.lapsed.id, "active", None)
    replayed(run_id)
    assert unread(cast.moderator) == unread(cast.vip) == 0
    assert inbox.list_notifications(cast.vip.user, before=None, limit=10) == []


def test_a_dry_run_counts_the_insertions_and_writes_nothing(cast, set_slice_size):
    set_slice_size(2)
    _, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    set_subscription(cast.lapsed.id, "active", None)
    before = all_rows()
    announced = runs.replay(run_id, dry_run=True)
    assert all_rows() == before
    assert (announced["dry_run"], announced["inserted"], announced["unchanged"]) == (True, 1, 3)
    assert announced["run_id"] is None


def test_a_replay_of_a_test_message_notifies_nobody_else(cast):
    run_id = send_test(cast.admin.user, cast.general, None, "me")
    run_to_end(run_id)
    announced = runs.replay(run_id, dry_run=False)
    assert (announced["inserted"], announced["unchanged"], announced["run_id"]) == (0, 1, None)
    assert notified(run_of(run_id)["message_id"]) == {cast.admin.id: "mention"}


def test_a_replay_of_a_run_that_has_not_started_notifies_no_user_twice(cast, set_slice_size):
    set_slice_size(2)
    message_id, run_id = post(cast.subscriber, cast.general)
    again = runs.replay(run_id, dry_run=False)["run_id"]
    for one in (again, run_id):
        assert run_to_end(one) == "succeeded"
    assert (stats(again)["inserted"], stats(run_id)["inserted"], len(notified(message_id))) == (3, 0, 3)
