"""`verify`: one thing that is off at a time, and what is said of it."""

import json

import pytest

from belfry import communities, fanout, leases
from belfry.messages import edit_message
from belfry.sql import execute
from belfry.trials import send_test
from belfry.verification import CHECKS, verify
from tests.telling import advance, crowd, parts_of, post, posted_and_told, run_to_end, wants_mentions_only

WHOLE = "UPDATE run SET {} WHERE id = 1"

OFF = {
    "every message has its run": (
        "DELETE FROM notification WHERE message_id = 1; DELETE FROM run WHERE id = 1",
        "message 1 has no run: nobody was told",
    ),
    "no run has failed": (
        WHOLE.format("state = 'failed', error = 'the disk is full'"),
        "run 1 failed: the disk is full",
    ),
    "somebody takes care of what was begun": (
        "UPDATE slice SET due_at = '2026-01-01T00:00:00Z', attempts = 1 WHERE after = 0",
        "run 3 was begun, and nobody has taken care of it since 2026-01-01 00:00:00+00",
    ),
    "every member is counted under one decision": (
        WHOLE.format("decisions = decisions || '{\"author\": 2}'"),
        "run 1 has gone over 5 members, and counts 6 decisions",
    ),
    "what is finished is done": (
        WHOLE.format("total = 6"),
        "run 1 succeeded with 5 of 6 members done, and 0 slices left",
    ),
    "a run has the slices that it counts": (
        "UPDATE run SET slices_left = slices_left + 1 WHERE id = 3",
        "run 3 counts 5 slices left, and has 4",
    ),
    "no two slices share a member": (
        "UPDATE slice SET up_to = up_to + 1 WHERE after = 0",
        "run 3: the slices after 0 and 7 overlap",
    ),
    "nobody is added who was not to be told": (
        WHOLE.format("added = 4"),
        "run 1 added 4 notifications for 3 to be told",
    ),
    "whoever was to be told of a message was told": (
        WHOLE.format("added = 2"),
        "run 1 added 2 notifications for 3 to be told",
    ),
    "there are the notifications that the runs made": (
        "DELETE FROM notification WHERE message_id = 1 AND user_id = 1",
        "message 1 has 2 notifications, and its runs made 3",
    ),
    "a notification is of somebody, and of something that was written": (
        "UPDATE notification SET user_id = 99 WHERE message_id = 1 AND user_id = 1",
        "notification 99-1 is of nobody, or of no message, or older",
    ),
    "nobody is told of their own message, or of one for somebody else": (
        "UPDATE notification SET user_id = 3 WHERE message_id = 1 AND user_id = 1",
        "notification 3-1 is not for them",
    ),
    "who has an unread mention is mentioned": (
        "UPDATE notification SET reason = 'mention_role' WHERE message_id = 1 AND user_id = 1",
        "notification 1-1 is unread for mention_role, which the message has no more",
    ),
}


@pytest.fixture
def world(cast, slices_of):
    """A message that was told, a test message, and a large one that is under way; all as it should be."""
    posted_and_told(cast.subscriber, cast.general, "gold, @vera")
    run_to_end(send_test(cast.admin.user, cast.general, None, "me"))
    crowd(cast.server_id, 15)
    slices_of(5)
    _, run_id = post(cast.subscriber, cast.general)
    advance(run_id)
    assert len(parts_of(run_id)) == 4
    assert verify() == []


@pytest.mark.parametrize("check", list(CHECKS))
def test_what_is_off_is_found_and_said(world, check):
    statement, finding = OFF[check]
    execute(statement)
    assert finding in verify()


@pytest.mark.parametrize("reason", ["mention", "mention_everyone"])
def test_a_mention_that_the_message_has_no_more_is_found_only_while_it_is_unread(world, reason):
    execute(f"UPDATE notification SET reason = '{reason}' WHERE message_id = 1 AND user_id = 1")
    assert verify() == [f"notification 1-1 is unread for {reason}, which the message has no more"]
    execute("UPDATE notification SET read_at = now()")
    assert verify() == []


def test_a_message_for_one_person_is_found_with_another(world, cast):
    execute(f"UPDATE notification SET user_id = {cast.lapsed.id}, read_at = now() WHERE message_id = 2")
    assert verify() == [f"notification {cast.lapsed.id}-2 is not for them"]


def test_a_role_that_was_lost_and_then_removed_from_the_mentions_leaves_nothing_off(cast):
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.moderator, cast.general, "@vip")
    communities.put_member(cast.server_id, cast.vip.id, [])
    run_to_end(edit_message(cast.moderator.user, message_id, "nobody").run_id)
    assert verify() == []


def test_what_is_being_done_is_not_off(world, in_another_session):
    part = parts_of(3)[0]
    attempt = leases.take(part)
    with in_another_session("SELECT FROM slice FOR NO KEY UPDATE"):
        assert verify() == []
    fanout.tell(part, attempt)
    assert verify() == []


def test_what_waits_in_a_long_queue_or_is_in_hand_for_long_is_not_off(world, cast):
    waiting = post(cast.subscriber, cast.general)[1]
    execute("UPDATE run SET due_at = '2026-01-01T00:00:00Z' WHERE state = 'queued'")
    execute("UPDATE slice SET due_at = '2026-01-01T00:00:00Z'")
    assert verify() == []
    execute(f"UPDATE run SET state = 'running', due_at = now() - interval '5 minutes' WHERE id = {waiting}")
    assert verify() == [], "as long as a job may run"
    execute(f"UPDATE run SET due_at = now() - interval '7 minutes' WHERE id = {waiting}")
    assert [finding.split(",")[0] for finding in verify()] == [f"run {waiting} was begun"]


def test_the_command_says_what_is_off_and_exits_1(command, world):
    assert command("verify").stdout == f"all is well: {len(CHECKS)} checks\n"
    assert json.loads(command("verify", "--json").stdout) == {"findings": []}
    statement, finding = OFF["no run has failed"]
    execute(statement)
    assert command("verify", code=1).stdout == f"{finding}\n"
    assert json.loads(command("verify", "--json", code=1).stdout) == {"findings": [finding]}


def test_a_database_without_anything_is_well():
    assert verify() == []
