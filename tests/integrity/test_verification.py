"""`verify` finds damaged data by the check that covers it and reports no finding for valid data."""

import json
from datetime import UTC, datetime, timedelta
from importlib import import_module

import pytest
from peewee import IntegrityError

from belfry.core.db import db, execute, fetch_all, fetch_one
from belfry.fanout import claims, fanout, recovery, runs
from belfry.identity import subscriptions, users
from belfry.inbox.inbox import dismiss, mark_all_read
from belfry.integrity.findings import SHOWN
from belfry.integrity.verification import CHECKS, DECISIONS_CHECK, check, verify
from belfry.messages.messages import delete_message, edit_message
from belfry.messages.send_test import send_test
from belfry.servers import servers
from belfry.servers.preferences import set_preference
from models import Message
from tests.fanout_helpers import (
    add_members,
    post,
    post_and_notify,
    process_next,
    remaining_work_items,
    run_to_end,
    set_mentions_only,
)
from tools.dev import ROOT

UPDATE_RUN = "UPDATE run SET {} WHERE id = 1"
SWEEPER = "the sweeper can find an unfinished run"
REASON = "a notification has the reason that the mentions give"
TIMES = "the times of a notification are in order"
BY_REASON = "there are the notifications that the run decided, by reason"
MEMBER = "a notification is for a member of the server"

DAMAGE = {
    "a run without its notifications": (
        "DELETE FROM notification WHERE message_id = 1; DELETE FROM run WHERE id = 1",
        "every message has its run",
    ),
    "a test message's run of another kind": (
        "UPDATE run SET kind = 'message' WHERE id = 2",
        "every message has its run",
    ),
    "a failed run": (UPDATE_RUN.format("state = 'failed', error = 'the disk is full'"), "no run has failed"),
    "a slice that was started and abandoned": (
        "UPDATE slice SET sweep_after = '2026-01-01T00:00:00Z', attempts = 1 WHERE after_user_id = 0",
        "somebody works on what was begun",
    ),
    "a run that was started and abandoned": (
        "UPDATE run SET state = 'running', attempts = 1, attempts_left = 5, started_at = now(),"
        " sweep_after = '2026-01-01Z' WHERE id = 4",
        "somebody works on what was begun",
    ),
    "one decision too many": (
        UPDATE_RUN.format("decisions = decisions || '{\"author\": 2}'"),
        "a run counts each member under one decision",
    ),
    "a negative decision": (
        UPDATE_RUN.format("decisions = decisions || '{\"author\": -1, \"muted\": 2}'"),
        "a run counts each member under one decision",
    ),
    "a decision that is not a number": (
        UPDATE_RUN.format("decisions = decisions || '{\"author\": \"one\"}'"),
        "a run counts each member under one decision",
    ),
    "an unknown decision": (
        UPDATE_RUN.format("decisions = decisions - 'author' || '{\"writer\": 1}'"),
        "a run counts each member under one decision",
    ),
    "a total that is too large": (UPDATE_RUN.format("members_total = 6"), "a run that succeeded is complete"),
    "an error on a run that succeeded": (UPDATE_RUN.format("error = 'no'"), "a run that succeeded is complete"),
    "a due run that succeeded": (UPDATE_RUN.format("sweep_after = now()"), "a run that succeeded is complete"),
    "more members processed than the total": (
        "UPDATE run SET members_total = 1, members_processed = 2 WHERE id = 3",
        "a run processes no more members than there are",
    ),
    "one slice too many counted": (
        "UPDATE run SET slices_left = slices_left + 1 WHERE id = 3",
        "a run has the slices that it counts",
    ),
    "a running run without its slices": ("DELETE FROM slice", "a run has the slices that it counts"),
    "a slice of a run that was not sliced": (
        "INSERT INTO slice (run_id, after_user_id, to_user_id) VALUES (1, 0, 9)",
        "a run has the slices that it counts",
    ),
    "slices that overlap": (
        "UPDATE slice SET to_user_id = to_user_id + 1 WHERE after_user_id = 0",
        "no two slices share a member",
    ),
    "a slice missing and not counted": (
        "DELETE FROM slice WHERE after_user_id = 0; UPDATE run SET slices_left = slices_left - 1 WHERE id = 3",
        "the slices cover the members who are not processed",
    ),
    "a slice that lacks a member": (
        "UPDATE slice SET to_user_id = to_user_id - 1 WHERE after_user_id = 7",
        "the slices cover the members who are not processed",
    ),
    "a member excluded from a slice": (
        "UPDATE slice SET excluded_user_ids = ARRAY[to_user_id] WHERE after_user_id = 7",
        "the slices cover the members who are not processed",
    ),
    "a run that ended without one member": (
        UPDATE_RUN.format(
            "members_processed = 4, members_total = 4, decisions = decisions || '{\"no_subscription\": 0}'"
        ),
        "a run that succeeded processed every member",
    ),
    "a slice due in a year": (
        "UPDATE slice SET sweep_after = now() + interval '1 year' WHERE after_user_id = 0",
        "the sweeper can find a slice",
    ),
    "a failed slice of an unfinished run": (
        "UPDATE slice SET sweep_after = NULL, attempts_left = 0 WHERE after_user_id = 0",
        "the sweeper can find a slice",
    ),
    "a queued run due in a year": (
        "UPDATE run SET sweep_after = now() + interval '1 year' WHERE id = 4",
        SWEEPER,
    ),
    "a started run without an attempt": (
        UPDATE_RUN.format("attempts = 0, attempts_left = 6"),
        "a run that was begun has an attempt",
    ),
    "a run without a start time": (UPDATE_RUN.format("started_at = NULL"), "a run that was begun has an attempt"),
    "an attempt that was not counted": (UPDATE_RUN.format("attempts_left = 2"), "attempts are counted"),
    "more attempts than the maximum": (UPDATE_RUN.format("attempts_left = 7"), "attempts are counted"),
    "a message that retracts": (
        UPDATE_RUN.format("notifications_retracted = 1, notifications_inserted = 4"),
        "only an edit changes mentions",
    ),
    "an edit without changes": (
        "INSERT INTO run (message_id, kind) VALUES (1, 'edit')",
        "only an edit changes mentions",
    ),
    "more inserted than decided": (
        UPDATE_RUN.format("notifications_inserted = 4"),
        "a run inserts only the notifications that it decided",
    ),
    "fewer inserted than decided": (
        UPDATE_RUN.format("notifications_inserted = 2"),
        "a run inserts all notifications that it decided",
    ),
    "a run from the future": (
        UPDATE_RUN.format("finished_at = now() + interval '1 year'"),
        "the times of a run are in order",
    ),
    "a run finished before it started": (
        UPDATE_RUN.format("finished_at = created_at - interval '1 hour'"),
        "the times of a run are in order",
    ),
    "a message from the future": (
        "UPDATE message SET created_at = now() + interval '1 year' WHERE id = 3",
        "the times of a message are in order",
    ),
    "a message edited before it was written": (
        "UPDATE message SET edited_at = created_at - interval '1 hour' WHERE id = 1",
        "the times of a message are in order",
    ),
    "a mention of a user who does not exist": (
        "UPDATE message SET mentioned_users = mentioned_users || 99::bigint WHERE id = 1",
        "a message mentions users who exist",
    ),
    "a log row of a message that does not exist": (
        "UPDATE notification_log SET message_ids = ARRAY[99]",
        "the stream is sent messages that exist",
    ),
    "the sequence of message ids behind": ("ALTER SEQUENCE message_id_seq RESTART WITH 2", "the next id is free"),
    "the sequence of run ids behind": ("ALTER SEQUENCE run_id_seq RESTART WITH 2", "the next id is free"),
    "the message ids beyond the partitions": (
        "ALTER SEQUENCE message_id_seq RESTART WITH 3000000",
        "there are partitions ahead",
    ),
    "the last partition missing": ("DROP TABLE notification_before_3000000", "there are partitions ahead"),
    "the partition in use detached": (
        "ALTER TABLE notification DETACH PARTITION notification_before_1000000",
        "no partition is detached",
    ),
    "a partition in the middle missing": ("DROP TABLE notification_before_2000000", "the partitions have no gap"),
    "a partition with another name": (
        "ALTER TABLE notification_before_3000000 RENAME TO notification_foreign",
        "every partition was made by Belfry",
    ),
    "a default partition": (
        "CREATE TABLE notification_foreign PARTITION OF notification DEFAULT",
        "every partition was made by Belfry",
    ),
    "a notification deleted": (
        "DELETE FROM notification WHERE message_id = 1 AND user_id = 1",
        "there are the notifications that the runs inserted",
    ),
    "a notification invented": (
        "INSERT INTO notification (user_id, message_id, reason) VALUES (5, 1, 'message')",
        "there are the notifications that the runs inserted",
    ),
    "a run whose statistics show no notification": (
        UPDATE_RUN.format("notifications_inserted = 0, decisions = '{\"no_subscription\": 5}'"),
        "there are the notifications that the runs inserted",
    ),
    "a run whose statistics show other reasons": (
        UPDATE_RUN.format("decisions = decisions || '{\"mention\": 2, \"message\": 1}'"),
        BY_REASON,
    ),
    "a mention stored as a message": ("UPDATE notification SET reason = 'message' WHERE reason = 'mention'", BY_REASON),
    "a mention stored as a message, and vice versa": (
        "UPDATE notification SET reason = (CASE reason WHEN 'mention' THEN 'message' ELSE 'mention' END)::reason"
        " WHERE message_id = 1 AND user_id IN (1, 4)",
        REASON,
    ),
    "a read mention of a user who is not mentioned": (
        "UPDATE notification SET reason = 'mention', read_at = now() WHERE message_id = 1 AND user_id = 1",
        REASON,
    ),
    "a recipient swapped for a stranger": (
        "UPDATE notification SET user_id = 6 WHERE message_id = 1 AND user_id = 1",
        MEMBER,
    ),
    "one notification deleted and another invented": (
        "DELETE FROM notification WHERE message_id = 1 AND user_id = 1;"
        "INSERT INTO notification (user_id, message_id, reason) VALUES (6, 1, 'message')",
        MEMBER,
    ),
    "a recipient who joined afterwards": (
        "INSERT INTO member (server_id, user_id, joined_at) VALUES (1, 6, now() + interval '1 hour');"
        "UPDATE notification SET user_id = 6 WHERE message_id = 1 AND user_id = 1",
        MEMBER,
    ),
    "a recipient who does not exist": (
        "UPDATE notification SET user_id = 999 WHERE message_id = 1 AND user_id = 1",
        "a notification is for a user who exists",
    ),
    "a notification of a message that does not exist": (
        "UPDATE notification SET message_id = 99 WHERE message_id = 1 AND user_id = 1",
        "a notification is of a message that exists",
    ),
    "an author notified": (
        "UPDATE notification SET user_id = 3 WHERE message_id = 1 AND user_id = 1",
        "nobody is notified of their own message",
    ),
    "a test message for another user": (
        "UPDATE notification SET user_id = 2 WHERE message_id = 2",
        "a test message notifies one user only",
    ),
    "a notification from the future": (
        "UPDATE notification SET created_at = now() + interval '1 hour' WHERE message_id = 1 AND user_id = 1",
        TIMES,
    ),
    "a notification older than its message": (
        "UPDATE notification SET created_at = '2020-01-01Z' WHERE message_id = 1 AND user_id = 1",
        TIMES,
    ),
    "a notification read in the future": (
        "UPDATE notification SET read_at = now() + interval '1 hour' WHERE message_id = 1 AND user_id = 1",
        TIMES,
    ),
    "a notification dismissed before its creation": (
        "UPDATE notification SET dismissed_at = '2020-01-01Z' WHERE message_id = 1 AND user_id = 1",
        TIMES,
    ),
}
"""{description of the damage: (the statement, the check that finds it)}."""

REFUSED = {
    "a queued run without a due time": "UPDATE run SET sweep_after = NULL WHERE id = 4",
    "a queued run without attempts left": "UPDATE run SET attempts_left = 0 WHERE id = 4",
    "a running run without slices or a due time": (
        "UPDATE run SET state = 'running', attempts = 1, started_at = now(), sweep_after = NULL WHERE id = 4"
    ),
    "a run that succeeded with slices": UPDATE_RUN.format("slices_left = 1"),
    "decisions that are a list": UPDATE_RUN.format("decisions = '[]'"),
    "a slice without a due time": "UPDATE slice SET sweep_after = NULL WHERE after_user_id = 0",
    "a slice without members": "UPDATE slice SET to_user_id = after_user_id WHERE after_user_id = 0",
    "a second notification": "INSERT INTO notification (user_id, message_id, reason) VALUES (1, 1, 'message')",
}
"""{description of damage that the database refuses: the statement}."""


def age_by_a_day() -> None:
    """Move all stored times back by one day."""
    columns = {
        "member": ["joined_at"],
        "member_role": ["added_at"],
        "channel_role": ["added_at"],
        "subscription": ["updated_at"],
        "preference": ["updated_at"],
        "message": ["created_at", "edited_at", "deleted_at"],
        "run": ["created_at", "started_at", "finished_at", "sweep_after"],
        "notification": ["created_at", "read_at", "dismissed_at"],
    }
    for table, names in columns.items():
        earlier = ", ".join(f"{name} = {name} - interval '1 day'" for name in names)
        execute(f"UPDATE {table} SET {earlier}")


@pytest.fixture
def world(cast, set_slice_size):
    """Runs 1 to 4: a message with all members notified, a test message, a message to more members that is in
    progress, and one that is queued; all of it valid, the first two a day old."""
    age_by_a_day()
    post_and_notify(cast.subscriber, cast.general, "gold, @vera")
    run_to_end(send_test(cast.admin.user, cast.general, None, "me"))
    add_members(cast.server_id, 15)
    age_by_a_day()
    set_slice_size(5)
    _, run_id = post(cast.subscriber, cast.general)
    process_next(run_id)
    assert len(remaining_work_items(run_id)) == 4
    post(cast.subscriber, cast.general)
    assert verify() == []
    return cast


def stored_partitions() -> list[dict]:
    return fetch_all(
        "SELECT relname, relispartition FROM pg_class"
        " WHERE relkind = 'r' AND relname ~ '^notification_' AND relname <> 'notification_log' ORDER BY 1"
    )


@pytest.fixture
def _partitions():
    """Restore the partitions after each test."""
    before = stored_partitions()
    yield
    db.connect(reuse_if_open=True)
    if stored_partitions() != before:
        execute("TRUNCATE message, notification RESTART IDENTITY CASCADE")
        for one in stored_partitions():
            if not one["relispartition"]:
                execute(f"DROP TABLE {one['relname']}")
        migration = import_module("migrations.0003_partitions")
        migration.down(None, db)
        migration.up(None, db)
        names = import_module("migrations.0010_names")
        names._rename_partitions(db, *names.PARTITIONS)


@pytest.mark.usefixtures("_partitions")
@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_damage_by_its_check(world, damage):
    statement, name = DAMAGE[damage]
    execute(statement)
    assert name in {finding.check for finding in check().findings}, check().findings


def test_the_damage_cases_cover_every_check():
    refused = {SWEEPER, "only a run that is not finished has slices"}
    assert {name for _, name in DAMAGE.values()} | refused == set(CHECKS)


@pytest.mark.parametrize("damage", REFUSED)
def test_the_database_refuses_an_invalid_state(world, damage):
    with pytest.raises(IntegrityError), db.atomic():
        execute(REFUSED[damage])
    assert verify() == []


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        (REFUSED["a queued run without a due time"], SWEEPER),
        (REFUSED["a queued run without attempts left"], SWEEPER),
        (REFUSED["a running run without slices or a due time"], SWEEPER),
        (REFUSED["a run that succeeded with slices"], "only a run that is not finished has slices"),
        (REFUSED["a slice without a due time"], "the sweeper can find a slice"),
    ],
)
def test_verify_finds_an_invalid_state_that_is_older_than_the_constraints(world, statement, name, caplog):
    """The migration adds the constraints for new rows only and logs that."""
    migration, names = import_module("migrations.0007_stored_states"), import_module("migrations.0010_names")

    def constrain() -> None:
        """Run the migration with the column names of its version."""
        reverse = {table: names._reverse(columns) for table, columns in names.COLUMNS.items()}
        names._rename_columns(db, reverse, {})
        migration.up(None, db)
        names._rename_columns(db, names.COLUMNS, {})

    for constraint, (table, _) in migration.CONSTRAINTS.items():
        execute(f"ALTER TABLE {table} DROP CONSTRAINT {constraint}")
    try:
        execute(statement)
        constrain()
        assert "holds for new rows only" in caplog.text
        assert name in {finding.check for finding in check().findings}
        with pytest.raises(IntegrityError):
            execute("INSERT INTO run (message_id, kind, sweep_after) VALUES (1, 'replay', NULL)")
    finally:
        execute("DELETE FROM slice; DELETE FROM run")
        constrain()
    assert fetch_one("SELECT count(*) AS n FROM pg_constraint WHERE NOT convalidated") == {"n": 0}


def test_a_notification_of_a_removed_mention_is_a_finding_only_while_unread(world):
    message_id = post_and_notify(world.subscriber, world.general, "@vera")
    run_to_end(edit_message(world.subscriber.user, message_id, "nobody").run_id)
    execute(f"UPDATE notification SET reason = 'mention' WHERE message_id = {message_id}")
    assert [finding.check for finding in check().findings] == [REASON]
    execute("UPDATE notification SET read_at = now()")
    assert verify() == []


def test_findings_beyond_the_first_hundred_of_a_check_are_counted(cast):
    execute(
        "INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 150)",
        {"channel": cast.general, "author": cast.subscriber.id},
    )
    report = check()
    assert len(report.findings) == SHOWN
    assert "not shown: 50 more findings of the check 'every message has its run'" in report.notes


def test_a_slice_in_progress_has_no_finding(world, in_another_session):
    item = remaining_work_items(3)[0]
    attempt = claims.claim(item)
    with in_another_session("SELECT FROM slice FOR NO KEY UPDATE"):
        assert verify() == []
    fanout.process_work_item(item, attempt)
    assert verify() == []


def test_work_that_waits_in_a_queue_or_takes_long_has_no_finding(world):
    execute("UPDATE run SET sweep_after = '2026-01-01T00:00:00Z' WHERE state = 'queued'")
    execute("UPDATE slice SET sweep_after = '2026-01-01T00:00:00Z'")
    assert verify() == []
    set_running = (
        "UPDATE run SET state = 'running', attempts = 1, attempts_left = 5, started_at = now(),"
        " sweep_after = now() - {}"
    )
    execute(set_running.format("interval '5 minutes'") + " WHERE id = 4")
    assert verify() == [], "a job may run for that long"
    execute(set_running.format("interval '7 minutes'") + " WHERE id = 4")
    assert [finding.split(",")[0] for finding in verify()] == ["run 4 was begun"]


def test_former_members_hide_the_same_number_of_recipients_who_are_not_members(world):
    servers.remove_member(world.server_id, world.admin.id)
    assert verify() == []
    execute(f"UPDATE notification SET user_id = {world.stranger.id} WHERE message_id = 1 AND user_id = {world.vip.id}")
    assert MEMBER in {finding.check for finding in check().findings}, "two are not members, and one member has left"
    servers.remove_member(world.server_id, world.lapsed.id)
    assert MEMBER not in {finding.check for finding in check().findings}, "the recipients may be the members who left"


@pytest.mark.usefixtures("_partitions")
def test_since_excludes_the_partitions_of_older_messages(world):
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 1000000; DELETE FROM notification WHERE message_id = 1")
    later = post_and_notify(world.subscriber, world.general, "silver")
    assert len(check().findings) == 1
    report = check(since=later)
    assert report.findings == []
    assert f"not checked: the notifications of messages below {later} (--since)" in report.notes
    execute(f"DELETE FROM notification WHERE message_id = {later}")
    assert len(check(since=later).findings) == 1


def test_the_command_prints_findings_and_unchecked_parts_and_exits_with_1(command, world):
    not_checked = "not checked: who should have been notified by the rules (--decisions)"
    assert command("verify").stdout == f"nothing is wrong: {len(CHECKS)} checks\n{not_checked}\n"
    assert json.loads(command("verify", "--json").stdout) == {"findings": [], "notes": [not_checked]}
    execute(DAMAGE["a failed run"][0])
    text = "run 1 failed: the disk is full"
    assert command("verify", code=1).stdout == f"{text}\n{not_checked}\n"
    found = json.loads(command("verify", "--json", code=1).stdout)["findings"]
    assert found == [{"check": "no run has failed", "text": text}]


def test_an_empty_database_has_no_finding():
    assert check(decisions=10).findings == []


def test_the_documentation_lists_every_check():
    reliability = (ROOT / "docs" / "reliability.md").read_text()
    for name in (*CHECKS, DECISIONS_CHECK):
        assert f"| {name} |" in reliability, name


def findings_of_decisions() -> list[str]:
    return [finding.text for finding in check(decisions=10).findings]


@pytest.fixture
def decided(cast):
    """Post a message that leads to several decisions; return the cast and the message's id."""
    set_mentions_only(cast.moderator, cast.general)
    age_by_a_day()
    message_id = post_and_notify(cast.subscriber, cast.general, "gold, @vera")
    assert findings_of_decisions() == []
    return cast, message_id


@pytest.mark.parametrize(
    ("statement", "stored", "decision"),
    [
        ("UPDATE notification SET user_id = {moderator} WHERE user_id = {admin}", "a notification", "mentions_only"),
        ("UPDATE notification SET user_id = {lapsed} WHERE user_id = {vip}", "a notification", "no_subscription"),
        ("DELETE FROM notification WHERE user_id = {admin}", "no notification", "message"),
    ],
)
def test_notifications_that_contradict_the_decisions_are_found(decided, statement, stored, decision):
    cast, message_id = decided
    execute(statement.format(**{name: person.id for name, person in cast.everybody.items()}))
    found = findings_of_decisions()
    decision = {"mentions_only": "mentions_only"}.get(decision, decision)
    assert any(f"message {message_id}: 1 members have {stored}" in one and decision in one for one in found), found


CHANGES = {
    "a preference": lambda cast: set_preference(cast.vip.user, cast.general, "none", None),
    "a mute": lambda cast: set_preference(cast.admin.user, cast.general, "all", datetime.now(UTC) + timedelta(hours=1)),
    "a preference restored": lambda cast: set_preference(cast.moderator.user, cast.general, "all", None),
    "a subscription that ended": lambda cast: subscriptions.set_subscription(cast.vip.id, "canceled", None),
    "a subscription that started": lambda cast: subscriptions.set_subscription(cast.lapsed.id, "active", None),
    "a new admin": lambda cast: users.update_user(cast.lapsed.id, {"is_admin": True}),
    "a removed admin": lambda cast: users.update_user(cast.admin.id, {"is_admin": False}),
    "a new member": lambda cast: servers.put_member(cast.server_id, cast.stranger.id, []),
    "a removed member": lambda cast: servers.remove_member(cast.server_id, cast.vip.id),
    "a member who left and came back": lambda cast: (
        servers.remove_member(cast.server_id, cast.vip.id),
        servers.put_member(cast.server_id, cast.vip.id, []),
    ),
    "a channel that became private": lambda cast: servers.update_channel(cast.general, {"private": True}),
    "a role that was granted": lambda cast: servers.put_member(cast.server_id, cast.lapsed.id, [cast.vip_role]),
    "a role that was revoked": lambda cast: servers.put_member(cast.server_id, cast.vip.id, []),
    "a message that was edited": lambda cast: run_to_end(
        edit_message(cast.subscriber.user, Message.select().first().id, "gold, @moira").run_id
    ),
    "a message that was deleted": lambda cast: delete_message(cast.subscriber.user, Message.select().first().id),
    "a notification that was read and dismissed": lambda cast: (
        mark_all_read(cast.vip.user),
        dismiss(cast.vip.user, cast.vip.id, Message.select().first().id),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_decision_is_not_a_finding(decided, change):
    cast, _ = decided
    CHANGES[change](cast)
    assert findings_of_decisions() == []


def test_changed_roles_of_a_private_channel_are_not_a_finding(cast):
    age_by_a_day()
    post_and_notify(cast.vip, cast.vault, "gold, @vip")
    assert findings_of_decisions() == []
    servers.put_member(cast.server_id, cast.moderator.id, [cast.moderators_role, cast.vip_role])
    assert findings_of_decisions() == []
    servers.put_member(cast.server_id, cast.vip.id, [])
    assert findings_of_decisions() == []
    servers.update_channel(cast.vault, {"private": False})
    assert findings_of_decisions() == []


def test_a_period_or_a_mute_that_has_ended_is_not_a_finding(cast):
    soon = datetime.now(UTC) + timedelta(seconds=1)
    subscriptions.set_subscription(cast.vip.id, "active", soon - timedelta(hours=24))
    set_preference(cast.moderator.user, cast.general, "all", soon)
    age_by_a_day()
    post_and_notify(cast.subscriber, cast.general, "gold")
    execute("SELECT pg_sleep(1.2)")
    report = check(decisions=10)
    assert report.findings == []
    assert "decisions not compared: of 2 members whose inputs have changed since" in report.notes


def test_failures_retries_and_replays_leave_no_finding(cast):
    _, run_id = post(cast.subscriber, cast.general)
    execute(
        "UPDATE run SET state = 'failed', error = 'the disk is full', finished_at = now(), attempts_left = 0,"
        " attempts = 6, started_at = now(), sweep_after = NULL"
    )
    assert [finding.check for finding in check().findings] == ["no run has failed"]
    recovery.retry_failed([run_id])
    assert findings_of_decisions() == []
    assert run_to_end(run_id) == "succeeded"
    set_preference(cast.vip.user, cast.general, "none", None)
    servers.put_member(cast.server_id, cast.stranger.id, [])
    replayed = runs.replay(run_id, dry_run=False)
    assert run_to_end(replayed["run_id"]) == "succeeded"
    assert findings_of_decisions() == []
