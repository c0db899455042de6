"""Partitions: creation ahead of need, roll-over when full or old, drop after the retention, and later explanations."""

import contextlib
import threading
from importlib import import_module

import psycopg
import pytest
from peewee import IntegrityError, OperationalError

from belfry.core import migrations, partitions
from belfry.core.db import db, execute, fetch_all, fetch_one
from belfry.core.partitions import Partition
from belfry.fanout import claims, runs
from belfry.fanout.claims import WorkItem
from belfry.inbox import inbox
from belfry.integrity.verification import verify
from belfry.messages import messages
from belfry.worker import maintenance
from config import settings
from models import User
from tests.fanout_helpers import (
    add_members,
    claim_and_process,
    generic_plans,
    process_next,
    remaining_work_items,
    run_to_end,
    statements,
    stats,
)
from tests.fanout_helpers import post as write
from tests.processes import wait_until


@pytest.fixture(autouse=True)
def _restore_partitions():
    """Restore the table as the migrations create it after each test."""
    yield
    if maintenance._indexing:
        maintenance._indexing.join()
    execute("TRUNCATE message, notification RESTART IDENTITY CASCADE")
    runner = migrations._runner()
    runner.down("0003_partitions")
    runner.up()


@pytest.fixture
def retention_days(override):
    """`retention_days(30)`: set RETENTION_DAYS from here on."""
    return lambda days: override(retention_days=days)


@pytest.fixture
def full_at(override):
    """`full_at(100)`: a partition is full at that number of rows (136 rows fit on a page, which is the minimum)."""

    def set_rows(number: int) -> None:
        override(partition_min_rows=number, partition_messages_per_account=0)

    return set_rows


def upper_bounds():
    return [one.upper for one in partitions.list_partitions()]


def post(cast, content="gold", days_ago=0):
    """Post a message of the subscriber to all members and notify them; return the message's id."""
    posted = messages.post_message(User.get_by_id(cast.subscriber.id), cast.general, content)
    assert run_to_end(posted.run_id) == "succeeded"
    if days_ago:
        parameters = {"id": posted.message["id"], "days": days_ago}
        execute("UPDATE message SET created_at = now() - make_interval(days => %(days)s) WHERE id = %(id)s", parameters)
    return posted.message["id"]


def begin_partition(full_at):
    """Make the next message the first one of the next partition."""
    full_at(0)
    partitions.maintain()
    full_at(1_000_000)


def notified_users(message_id):
    found = fetch_all("SELECT user_id FROM notification WHERE message_id = %(id)s ORDER BY 1", {"id": message_id})
    return [one["user_id"] for one in found]


def test_every_message_id_has_a_partition_and_two_empty_partitions_follow():
    assert partitions.list_partitions() == [
        Partition(None, 1),
        Partition(1, 1_000_000),
        Partition(1_000_000, 2_000_000),
        Partition(2_000_000, 3_000_000),
    ]
    partitions.maintain()
    assert upper_bounds() == [1, 1_000_000, 2_000_000, 3_000_000], "nothing to create and no roll-over"


def test_a_full_partition_is_closed_and_the_next_message_starts_the_next_partition(api, cast, full_at, run_jobs):
    add_members(cast.server_id, 20)
    first = post(cast)
    full_at(100)
    partitions.maintain()
    second = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "more"})
    assert (first, second.get_json()["id"]) == (1, 1_000_000)
    assert run_jobs() == 0
    assert notified_users(1) == notified_users(1_000_000) != []
    page = api(cast.vip).get("/api/notifications").get_json()["items"]
    assert [one["message_id"] for one in page] == [1_000_000, 1]
    full_at(137)
    partitions.maintain()
    assert upper_bounds() == [1, 1_000_000, 2_000_000, 3_000_000, 4_000_000]
    assert post(cast) == 1_000_001
    assert verify() == []


def test_a_partition_that_is_not_full_receives_the_next_message(cast, full_at):
    post(cast)
    full_at(137)
    partitions.maintain()
    assert post(cast) == 2


@pytest.mark.parametrize(
    ("constant", "above_size", "below_size"),
    [
        # With many accounts, a few messages to all of them: to 206 users, on two pages of 136 rows.
        ("partition_messages_per_account", 2, 1),
        ("partition_soft_max", 0.5, 2),  # with many rows, a share of all rows: twice and half of them
    ],
)
def test_the_size_of_a_partition_grows_with_the_number_of_accounts_and_rows(
    cast, full_at, override, constant, above_size, below_size
):
    add_members(cast.server_id, 200)
    execute("ANALYZE user_account")
    post(cast)
    full_at(100)
    override(**{constant: above_size})
    partitions.maintain()
    assert post(cast) == 2, "the limit is above the partition's size"
    override(**{constant: below_size})
    partitions.maintain()
    assert post(cast) == 1_000_000


def test_a_partition_is_full_after_a_million_messages(cast):
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 999999")
    assert [post(cast), post(cast)] == [999_999, 1_000_000]
    partitions.maintain()
    assert upper_bounds()[-1] == 4_000_000
    assert [len(notified_users(999_999)), len(notified_users(1_000_000))] == [3, 3]


def test_a_roll_over_waits_only_briefly_for_a_posting_transaction(cast, full_at, in_another_session, override, caplog):
    full_at(0)
    with in_another_session("SELECT nextval('message_id_seq')"):
        with pytest.raises(OperationalError, match="lock timeout"):
            partitions.maintain()
        override(partition_check_seconds=0)
        maintenance.sweep()
        override(partition_check_seconds=3_600)
        assert "partitions is delayed" in caplog.text
        maintenance.sweep()
        assert caplog.text.count("partitions is delayed") == 1, "it is not logged at each sweep"
    assert upper_bounds() == [1, 1_000_000, 2_000_000, 3_000_000]
    override(partition_check_seconds=0)
    maintenance.sweep()
    assert post(cast) == 1_000_000


def test_a_roll_over_does_not_assign_a_message_id_twice(cast, full_at):
    """As if posts between reading the sequence and locking it moved the sequence beyond the partition."""
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 1000005")
    partitions._roll_over(Partition(1, 1_000_000))
    assert post(cast) == 1_000_005


def test_one_process_maintains_the_partitions_at_a_time(full_at, in_another_session, cast):
    full_at(0)
    with in_another_session(f"SELECT pg_advisory_xact_lock({partitions.PARTITION_LOCK})"):
        partitions.maintain()
    assert post(cast) == 1


def test_without_retention_the_age_causes_neither_a_drop_nor_a_roll_over(cast, full_at):
    post(cast, days_ago=4_000)
    partitions.maintain()
    assert post(cast, days_ago=3_000) == 2
    begin_partition(full_at)
    assert post(cast, days_ago=2_000) == 1_000_000
    partitions.maintain()
    assert upper_bounds()[:2] == [1, 1_000_000]


def test_a_partition_is_closed_after_a_tenth_of_the_retention(cast, retention_days):
    retention_days(30)
    post(cast, days_ago=2)
    partitions.maintain()
    assert post(cast, days_ago=4) == 2
    partitions.maintain()
    assert post(cast) == 3, "the age of the partition's first message counts"
    execute("UPDATE message SET created_at = now() - interval '73 hours' WHERE id = 1")
    partitions.maintain()
    assert post(cast) == 1_000_000


def test_only_partitions_older_than_the_retention_are_dropped(cast, retention_days, full_at):
    old = post(cast, days_ago=40)
    begin_partition(full_at)
    mixed = [post(cast, days_ago=35), post(cast, days_ago=29)]
    begin_partition(full_at)
    new = post(cast)
    retention_days(30)
    partitions.maintain()
    assert [notified_users(old), *map(len, map(notified_users, [*mixed, new]))] == [[], 3, 3, 3]
    assert partitions.list_partitions()[:2] == [Partition(None, 1_000_000), Partition(1_000_000, 2_000_000)]
    assert partitions.oldest_retained_message_id() == 1_000_000
    before = upper_bounds()
    partitions.maintain()
    assert upper_bounds() == before
    assert verify() == []
    execute("UPDATE message SET created_at = now() - interval '31 days' WHERE id = %(id)s", {"id": mixed[1]})
    partitions.maintain()
    assert notified_users(mixed[0]) == [] != notified_users(new)
    assert partitions.oldest_retained_message_id() == 2_000_000


def test_explain_and_replay_report_that_old_notifications_are_not_kept(api, cast, retention_days, full_at):
    old = post(cast, days_ago=40)
    begin_partition(full_at)
    new = post(cast)
    url = f"/api/messages/{old}/explain?user_id={cast.vip.id}"
    assert "not kept" not in api(cast.admin).get(url).get_json()["detail"]
    retention_days(30)
    partitions.maintain()
    explained = api(cast.admin).get(url).get_json()
    assert (explained["decision"], explained["notified_at"]) == ("message", None)
    assert "Notifications of messages that old are not kept" in explained["detail"]
    assert "not kept" not in api(cast.admin).get(url.replace(f"/{old}/", f"/{new}/")).get_json()["detail"]
    run_id = fetch_one("SELECT id FROM run WHERE message_id = %(id)s", {"id": old})["id"]
    replayed = api(cast.admin).post(f"/api/runs/{run_id}/replay", json={"dry_run": False})
    assert replayed.status_code == 409, "a replay would notify all users a second time"
    assert "RETENTION_DAYS" in replayed.get_json()["detail"]
    assert stats(run_id)["notified"] == 3, "the run keeps its statistics"


def test_a_replay_after_the_drop_notifies_nobody_twice(api, cast, retention_days, full_at):
    old = post(cast, days_ago=40)
    add_members(cast.server_id, 1)
    begin_partition(full_at)
    post(cast)
    run_id = fetch_one("SELECT id FROM run WHERE message_id = %(id)s", {"id": old})["id"]
    replayed = api(cast.admin).post(f"/api/runs/{run_id}/replay", json={"dry_run": False}).get_json()
    assert replayed["inserted"] == 1
    retention_days(30)
    partitions.maintain()
    assert claims.claim_batch(replayed["run"]["id"], [], 20_000) == [], "it is not processed in a batch"
    assert run_to_end(replayed["run"]["id"]) == "succeeded"
    assert notified_users(old) == []
    assert verify() == []


def old_message_with_a_replay(api, cast, full_at):
    """Post a message older than RETENTION_DAYS in a separate partition and start a replay that adds one user.

    Return the ids of message and run.
    """
    old = post(cast, days_ago=40)
    add_members(cast.server_id, 1)
    begin_partition(full_at)
    post(cast)
    run_id = fetch_one("SELECT id FROM run WHERE message_id = %(id)s", {"id": old})["id"]
    replayed = api(cast.admin).post(f"/api/runs/{run_id}/replay", json={"dry_run": False}).get_json()
    assert replayed["inserted"] == 1
    return old, replayed["run"]["id"]


def run_blocked_by_member_lock(function, meanwhile):
    """Run `function` in a thread until it waits to read the members, which is after it read what the retention keeps;
    call `meanwhile` at that moment, then wait for the end of both."""

    def run() -> None:
        with db.connection_context():
            function()

    thread = threading.Thread(target=run)
    with psycopg.connect(settings.database_url) as other:
        other.execute("LOCK TABLE member IN ACCESS EXCLUSIVE MODE")
        thread.start()
        waiting = "SELECT 1 AS yes FROM pg_locks WHERE NOT granted AND relation = 'member'::regclass"
        wait_until(lambda: fetch_one(waiting), "the thread to wait for the members")
        meanwhile()
        other.rollback()
    thread.join()


def try_to_drop():
    with contextlib.suppress(OperationalError):  # the next sweep repeats the drop
        partitions.maintain()


@pytest.mark.parametrize("in_slices", [False, True])
def test_a_running_replay_keeps_its_partition_and_notifies_nobody_twice(
    api, cast, retention_days, full_at, set_slice_size, in_slices
):
    old, run_id = old_message_with_a_replay(api, cast, full_at)
    before = notified_users(old)
    item = WorkItem(run_id)
    if in_slices:
        set_slice_size(2)
        process_next(run_id)
        item = remaining_work_items(run_id)[-1]
    retention_days(30)
    run_blocked_by_member_lock(lambda: claim_and_process(item), try_to_drop)
    assert [user for user in notified_users(old) if user in before] == before, "earlier notifications are kept"
    assert len(notified_users(old)) == len(before) + 1
    assert run_to_end(run_id) == "succeeded"
    partitions.maintain()
    assert notified_users(old) == []
    assert verify() == []


def test_a_dry_run_of_a_replay_counts_either_before_or_after_a_drop(api, cast, retention_days, full_at):
    old, run_id = old_message_with_a_replay(api, cast, full_at)
    retention_days(30)
    counted = []
    run_blocked_by_member_lock(lambda: counted.append(runs.replay(run_id, dry_run=True)), try_to_drop)
    assert [(one["inserted"], one["unchanged"]) for one in counted] == [(1, len(notified_users(old)))]


def test_a_retry_after_the_drop_of_its_partition_notifies_nobody_twice(api, cast, retention_days, full_at):
    """For any kind of run: the notifications of the other run are dropped, so a repetition cannot be recognised."""
    posted = messages.post_message(User.get_by_id(cast.subscriber.id), cast.general, "gold")
    old, run_id = posted.message["id"], posted.run_id
    replay_id = runs.replay(run_id, dry_run=False)["run_id"]
    assert run_to_end(replay_id) == "succeeded"
    begin_partition(full_at)
    post(cast)
    for table in ("message", "run"):
        execute(f"UPDATE {table} SET created_at = now() - interval '40 days' WHERE id IN (%(id)s, %(run)s)",
                {"id": old, "run": run_id})  # fmt: skip
    execute("UPDATE member SET joined_at = now() - interval '50 days'")
    retention_days(30)
    partitions.maintain()
    assert notified_users(old) == []
    assert claims.claim_batch(run_id, [], 20_000) == [], "it is not processed in a batch"
    assert run_to_end(run_id) == "succeeded"
    assert notified_users(old) == []
    assert verify() == []


def test_a_run_of_a_new_message_does_not_read_the_retention(cast):
    _, run_id = write(cast.subscriber, cast.general)
    with statements() as seen:
        assert run_to_end(run_id) == "succeeded"
    assert not any("LOCK TABLE" in statement or "pg_inherits" in statement for statement in seen)


def test_a_foreign_partition_is_ignored_and_a_failed_maintenance_does_not_stop_the_sweep(cast, caplog):
    execute("CREATE TABLE notification_foreign PARTITION OF notification DEFAULT")
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 3000000")
    try:
        assert len(partitions.list_partitions()) == 4
        assert len(notified_users(post(cast))) == 3
        maintenance.sweep()  # rows in the default partition block the missing one
        assert "partitions failed" in caplog.text
    finally:
        execute("DROP TABLE notification_foreign")


# Missing partitions ---------------------------------------------------------------------------------------


@pytest.fixture
def just_maintained(override):
    """The workers have just maintained the partitions: the regular maintenance is not due."""
    override(partition_check_seconds=10**9)


def failing_post(cast):
    """Post a message whose run fails because a partition is missing; return the ids of message and run."""
    message_id, run_id = write(cast.subscriber, cast.general)
    with pytest.raises(IntegrityError, match="no partition of relation"):
        run_to_end(run_id)
    return message_id, run_id


def assert_missing_partitions(api, cast, client, number):
    """Assert that /readyz and /metrics report this number of missing partitions."""
    response = client.get("/readyz")
    assert response.status_code == (503 if number else 200)
    if number:
        assert [error.split(":")[0] for error in response.get_json()["errors"]["partitions"]] == [f"{number} missing"]
    assert f"belfry_partitions_missing {float(number)}" in api(cast.admin).get("/metrics").text


@pytest.mark.parametrize("ahead", [3_000_000, 123_456_789, 10**15 + 5])
def test_one_sweep_creates_the_partitions_for_a_sequence_far_ahead(api, cast, client, just_maintained, ahead):
    execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {ahead}")
    message_id, run_id = failing_post(cast)
    assert_missing_partitions(api, cast, client, 1)
    maintenance.sweep()
    assert_missing_partitions(api, cast, client, 0)
    assert run_to_end(run_id) == "succeeded"
    assert (message_id, len(notified_users(message_id))) == (ahead, 3)
    assert len(upper_bounds()) <= 8
    assert upper_bounds()[-1] >= ahead // 1_000_000 * 1_000_000 + 2_000_000
    assert verify() == []


@pytest.mark.parametrize(
    "kind", ["TABLE {} (user_id bigint)", "VIEW {} AS SELECT 1", "SEQUENCE {}", "TYPE {} AS ENUM ()"]
)
def test_a_table_with_the_name_of_a_partition_does_not_block_its_creation(api, cast, client, just_maintained, kind):
    name = "notification_before_4000000"
    execute(f"CREATE {kind.format(name)}")
    try:
        execute("ALTER SEQUENCE message_id_seq RESTART WITH 3000000")
        _, run_id = failing_post(cast)
        maintenance.sweep()
        assert_missing_partitions(api, cast, client, 0)
        assert run_to_end(run_id) == "succeeded"
        assert f"{name}_2" in [one.name for one in partitions.list_partitions()]
        assert verify() == []
    finally:
        execute(f"DROP {kind.split()[0]} {name}")


def test_a_detached_partition_is_attached_again_with_its_rows(
    api, cast, client, just_maintained, caplog
):
    first = post(cast)
    before = notified_users(first)
    execute("ALTER TABLE notification DETACH PARTITION notification_before_1000000")
    _, run_id = failing_post(cast)
    assert_missing_partitions(api, cast, client, 1)
    maintenance.sweep()
    assert_missing_partitions(api, cast, client, 0)
    assert "notification_before_1000000 was detached" in caplog.text
    assert notified_users(first) == before
    assert run_to_end(run_id) == "succeeded"
    assert upper_bounds() == [1, 1_000_000, 2_000_000, 3_000_000]
    assert verify() == []


def test_a_detached_partition_with_rows_outside_its_range_is_kept_and_reported(
    api, cast, client, just_maintained, caplog
):
    execute("ALTER TABLE notification DETACH PARTITION notification_before_1000000")
    execute("INSERT INTO notification_before_1000000 (user_id, message_id, reason) VALUES (1, 5000000, 'message')")
    try:
        maintenance.sweep()
        assert "notification_before_1000000 has the name of a partition" in caplog.text
        assert_missing_partitions(api, cast, client, 0)
        assert len(notified_users(post(cast))) == 3
    finally:
        execute("DROP TABLE notification_before_1000000")


def test_missing_partitions_at_the_bottom_and_in_the_middle_are_created(api, cast, client, just_maintained):
    execute("DROP TABLE notification_before_1, notification_before_2000000")
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 2500000")
    assert partitions.missing_ranges() == [Partition(None, 1), Partition(1_000_000, 2_000_000)]
    assert_missing_partitions(api, cast, client, 2)
    maintenance.sweep()
    assert_missing_partitions(api, cast, client, 0)
    assert upper_bounds()[:4] == [1, 1_000_000, 2_000_000, 3_000_000]


def test_a_missing_partition_above_the_next_message_id_is_created_in_advance(api, cast, client, just_maintained):
    execute("DROP TABLE notification_before_2000000")
    assert_missing_partitions(api, cast, client, 0)
    maintenance.sweep()
    assert partitions.missing_ranges() == []
    assert upper_bounds() == [1, 1_000_000, 2_000_000, 3_000_000]


def test_a_partition_that_cannot_be_created_is_reported(api, cast, client, just_maintained, caplog):
    execute("CREATE TABLE notification_rest PARTITION OF notification DEFAULT")
    try:
        execute("INSERT INTO notification (user_id, message_id, reason) VALUES (1, 3000001, 'message')")
        execute("ALTER SEQUENCE message_id_seq RESTART WITH 3000000")
        maintenance.sweep()
        assert "have no partition: their runs fail until it is created" in caplog.text
        assert "partitions failed" in caplog.text
        assert_missing_partitions(api, cast, client, 1)
    finally:
        execute("DROP TABLE notification_rest")


def test_an_edit_of_an_old_message_notifies_newly_mentioned_users(api, cast, retention_days, full_at):
    old = post(cast, days_ago=40)
    begin_partition(full_at)
    post(cast, days_ago=31)
    begin_partition(full_at)
    post(cast)
    retention_days(35)
    partitions.maintain()
    edited = api(cast.subscriber).patch(f"/api/messages/{old}", json={"content": "gold @vera"})
    assert edited.status_code == 200, edited.get_json()
    assert run_to_end(edited.get_json()["run"]["id"]) == "succeeded"
    assert notified_users(old) == [cast.vip.id]
    assert verify() == []
    retention_days(30)
    partitions.maintain()
    assert notified_users(old) == [], "the drop of the next partition removes it"


def test_a_long_read_delays_only_the_drop_of_a_partition(cast, retention_days, full_at, in_another_session):
    post(cast, days_ago=40)
    begin_partition(full_at)
    post(cast)
    retention_days(30)
    full_at(0)
    with in_another_session("SELECT count(*) FROM notification"):
        with pytest.raises(OperationalError, match="lock timeout"):
            partitions.maintain()
        assert len(notified_users(1)) == 3
        assert upper_bounds()[-1] == 4_000_000
        assert post(cast) == 2_000_000, "the next partition is in use"
    full_at(1_000_000)
    partitions.maintain()
    assert notified_users(1) == []


def test_the_migration_to_partitions_keeps_existing_notifications(cast):
    migration = import_module("migrations.0003_partitions")  # only this migration: later ones stay applied
    migration.down(None, db)
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 1999998")
    first, second = post(cast), post(cast)
    before = fetch_all("SELECT * FROM notification ORDER BY user_id, message_id")
    migration.up(None, db)
    assert upper_bounds() == [1, 2_000_000, 3_000_000, 4_000_000]
    assert fetch_all("SELECT * FROM notification ORDER BY user_id, message_id") == before
    third = post(cast)
    assert (first, second, third) == (1_999_998, 1_999_999, 2_000_000)
    assert len(before) == 6
    migration.down(None, db)
    assert len(fetch_all("SELECT * FROM notification")) == 9
    migration.up(None, db)


def plan_nodes(monkeypatch, call):
    """The plan nodes that PostgreSQL executed for the statements about notifications in `call`."""
    executed = []
    for name, real in (("fetch_all", fetch_all), ("fetch_one", fetch_one)):
        record = lambda sql, args, real=real: executed.append((sql, args)) or real(sql, args)  # noqa: E731
        monkeypatch.setattr(inbox, name, record)
    call()
    found = []

    def walk(node):
        if node["Actual Loops"]:
            found.append(node)
        for child in node.get("Plans", []):
            walk(child)

    for sql, parameters in executed:
        if "notification" in sql:
            with db.atomic() as explained:
                walk(fetch_all(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", parameters)[0]["QUERY PLAN"][0]["Plan"])
                explained.rollback()
    return found


def read_partitions(monkeypatch, call):
    """The partitions that the statements of `call` read."""
    found = {node.get("Relation Name", "") for node in plan_nodes(monkeypatch, call)}
    return {name for name in found if name.startswith("notification_before_")}


def indexes_read(monkeypatch, call):
    return {node.get("Index Name", "") for node in plan_nodes(monkeypatch, call)}


def test_a_page_reads_only_the_partitions_of_its_rows(cast, full_at, monkeypatch):
    for number in range(4):
        execute(
            "WITH made AS (INSERT INTO message (channel_id, author_id, content)"
            " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 40) RETURNING id)"
            " INSERT INTO notification (user_id, message_id, reason)"
            " SELECT user_id, id, 'message' FROM made, generate_series(%(vip)s, 1000) AS user_id",
            {"channel": cast.general, "author": cast.subscriber.id, "vip": cast.vip.id},
        )
        if number < 3:
            begin_partition(full_at)
    execute("ANALYZE notification, message")
    vip = User.get_by_id(cast.vip.id)
    newest = "notification_before_4000000"
    first = read_partitions(monkeypatch, lambda: inbox.list_notifications(vip, before=None, limit=20))
    assert first <= {newest, "notification_before_5000000", "notification_before_6000000"}, "the last two are empty"
    assert newest in first
    older = read_partitions(monkeypatch, lambda: inbox.list_notifications(vip, before=1_000_020, limit=30))
    assert older == {"notification_before_2000000", "notification_before_1000000"}
    execute("SELECT pg_stat_force_next_flush()")  # so that earlier reads are not counted
    with db.atomic():
        execute("SET LOCAL plan_cache_mode = force_generic_plan")  # as on a connection with many executions
        inbox.list_notifications(vip, before=1_000_020, limit=30)
        read = fetch_all(
            "SELECT relname AS name FROM pg_stat_xact_user_tables WHERE relname ~ '^notification_before_'"
            " AND seq_tup_read + idx_tup_fetch > 0"
        )
    assert {one["name"] for one in read} == older
    assert inbox.unread_count(vip)["unread"] == 160


@pytest.mark.parametrize("query", [{}, {"before": 1_000_020}, {"unread": True}, {"before": 1_000_020, "unread": True}])
def test_a_page_uses_a_generic_plan(cast, query):
    vip = User.get_by_id(cast.vip.id)
    execute(
        "WITH made AS (INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 2000) RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason) SELECT %(vip)s, id, 'message' FROM made",
        {"channel": cast.general, "author": cast.subscriber.id, "vip": cast.vip.id},
    )
    execute("ANALYZE notification, message")
    page = {"before": None, "limit": 5, **query}
    assert generic_plans(lambda: inbox.list_notifications(vip, **page), "CROSS JOIN LATERAL") == [10]


@pytest.mark.parametrize("unread", [True, False])
def test_a_page_reads_only_the_rows_that_it_shows_for_a_user_with_many_notifications(cast, unread):
    """With a generic plan, while all other users have read everything."""
    vip = User.get_by_id(cast.vip.id)
    execute(
        "WITH made AS (INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 3000) RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason, read_at)"
        " SELECT user_id, id, 'message', CASE WHEN user_id <> %(vip)s THEN now() END"
        " FROM made, generate_series(%(vip)s, %(vip)s + 3000) AS user_id"
        " WHERE user_id = %(vip)s OR user_id %% 300 = id %% 300",
        {"channel": cast.general, "author": cast.subscriber.id, "vip": cast.vip.id},
    )
    execute("ANALYZE notification, message")
    execute("SELECT pg_stat_force_next_flush()")
    with db.atomic():
        execute("SET LOCAL plan_cache_mode = force_generic_plan")
        assert len(inbox.list_notifications(vip, before=None, limit=5, unread=unread)) == 5
        (read,) = fetch_all("SELECT seq_tup_read + idx_tup_fetch AS read FROM pg_stat_xact_user_tables"
                       " WHERE relname = 'message'")  # fmt: skip
    assert read["read"] == 5


# The index of unread notifications ------------------------------------------------------------------------


def unread_indexes():
    """{partition that has the index of unread notifications: whether the index is valid}."""
    found = fetch_all(
        "SELECT i.indrelid::regclass::text AS name, i.indisvalid AS valid FROM pg_index i"
        " JOIN pg_class x ON x.oid = i.indexrelid AND x.relname ~ '_unread$' ORDER BY length(x.relname), x.relname"
    )
    return {one["name"]: one["valid"] for one in found}


def maintain_and_index() -> bool:
    """Maintain partitions and create missing indexes, as the sweeper does; return whether all were created."""
    partitions.maintain()
    made = [partitions.create_unread_index(name) for name in partitions.partitions_missing_unread_index()]
    return all(made)


def test_only_closed_partitions_have_an_index_of_unread_notifications(cast, full_at):
    post(cast)
    maintain_and_index()
    assert unread_indexes() == {"notification_before_1": True}
    begin_partition(full_at)
    post(cast)
    maintain_and_index()
    assert unread_indexes() == {"notification_before_1": True, "notification_before_1000000": True}
    maintain_and_index()
    assert len(unread_indexes()) == 2
    assert verify() == []


def test_counting_listing_and_marking_unread_notifications_use_the_index(cast, full_at, monkeypatch):
    execute(
        "WITH made AS (INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 500) RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason, read_at)"
        " SELECT user_id, id, 'message', CASE WHEN id > 3 THEN now() END FROM made, generate_series(1, 20) AS user_id",
        {"channel": cast.general, "author": cast.subscriber.id},
    )
    begin_partition(full_at)
    post(cast)
    maintain_and_index()
    execute("VACUUM (ANALYZE) notification, message")
    vip = User.get_by_id(cast.vip.id)
    for call in (
        lambda: inbox.unread_count(vip),
        lambda: inbox.list_notifications(vip, before=None, limit=10, unread=True),
        lambda: inbox.mark_read(vip, up_to=(vip.id, 2)),
    ):
        assert "notification_before_1000000_unread" in indexes_read(monkeypatch, call)
    assert [one["message_id"] for one in inbox.list_notifications(vip, before=None, limit=10, unread=True)] == [
        1_000_000,
        3,
    ]


def test_an_index_with_an_interrupted_build_is_built_again(cast, full_at, in_another_session, override):
    post(cast)
    begin_partition(full_at)
    post(cast)
    maintain_and_index()
    execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'notification_before_1000000_unread'::regclass")
    override(partition_index_lock_timeout="200ms")
    with in_another_session("LOCK TABLE notification_before_1000000 IN SHARE UPDATE EXCLUSIVE MODE"):
        assert not maintain_and_index()  # another session is building it
    assert unread_indexes()["notification_before_1000000"] is False
    maintain_and_index()
    assert unread_indexes() == {"notification_before_1": True, "notification_before_1000000": True}


def test_building_the_index_blocks_no_other_statement(cast, full_at, in_another_session, override):
    override(partition_index_lock_timeout="200ms")
    post(cast)
    full_at(0)
    with in_another_session("UPDATE notification SET read_at = now()"):
        assert not maintain_and_index()
        assert post(cast) == 1_000_000, "the next partition is in use"
        inbox.mark_read(User.get_by_id(cast.moderator.id), up_to=(cast.moderator.id, 0))
    full_at(1_000_000)
    maintain_and_index()
    assert unread_indexes()["notification_before_1000000"] is True


def test_the_drop_of_a_partition_drops_its_index(cast, retention_days, full_at):
    post(cast, days_ago=40)
    begin_partition(full_at)
    post(cast)
    maintain_and_index()
    retention_days(30)
    maintain_and_index()
    assert unread_indexes() == {"notification_before_1000000": True}
    assert partitions.oldest_retained_message_id() == 1_000_000
