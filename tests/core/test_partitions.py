"""Partitions: made ahead, left when they are full or old, and dropped; and what is then still said of old messages."""

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
from tests.fanout_helpers import advance, crowd, do, generic_plans, parts_of, run_to_end, statements, stats
from tests.fanout_helpers import post as write
from tests.processes import wait_until


@pytest.fixture(autouse=True)
def _as_migrated():
    """What a test does to the table is undone after it."""
    yield
    if maintenance._indexing:
        maintenance._indexing.join()
    execute("TRUNCATE message, notification RESTART IDENTITY CASCADE")
    runner = migrations._runner()
    runner.down("0003_partitions")
    runner.up()


@pytest.fixture
def keeping(override):
    """`keeping(30)`: RETENTION_DAYS from here on."""
    return lambda days: override(retention_days=days)


@pytest.fixture
def full_at(override):
    """`full_at(100)`: a partition is full with that many rows (of which 136 fit on a page, which is the least)."""

    def set_rows(number: int) -> None:
        override(partition_min_rows=number, partition_messages_per_account=0)

    return set_rows


def bounds():
    return [one.upper for one in partitions.list_partitions()]


def post(cast, content="gold", days_ago=0):
    """A message by the subscriber to everybody, notified; its id."""
    posted = messages.post_message(User.get_by_id(cast.subscriber.id), cast.general, content)
    assert run_to_end(posted.run_id) == "succeeded"
    if days_ago:
        parameters = {"id": posted.message["id"], "days": days_ago}
        execute("UPDATE message SET created_at = now() - make_interval(days => %(days)s) WHERE id = %(id)s", parameters)
    return posted.message["id"]


def begin_partition(full_at):
    """The next message is the first of the next partition."""
    full_at(0)
    partitions.maintain()
    full_at(1_000_000)


def notified_of(message_id):
    found = fetch_all("SELECT user_id FROM notification WHERE message_id = %(id)s ORDER BY 1", {"id": message_id})
    return [one["user_id"] for one in found]


def test_every_message_id_has_a_partition_and_two_more_are_ahead():
    assert partitions.list_partitions() == [
        Partition(None, 1),
        Partition(1, 1_000_000),
        Partition(1_000_000, 2_000_000),
        Partition(2_000_000, 3_000_000),
    ]
    partitions.maintain()
    assert bounds() == [1, 1_000_000, 2_000_000, 3_000_000], "nothing to make, nothing to leave"


def test_a_full_one_is_left_and_the_next_message_begins_the_next(api, cast, full_at, run_jobs):
    crowd(cast.server_id, 20)
    first = post(cast)
    full_at(100)
    partitions.maintain()
    second = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "more"})
    assert (first, second.get_json()["id"]) == (1, 1_000_000)
    assert run_jobs() == 0
    assert notified_of(1) == notified_of(1_000_000) != []
    page = api(cast.vip).get("/api/notifications").get_json()["items"]
    assert [one["message_id"] for one in page] == [1_000_000, 1]
    full_at(137)
    partitions.maintain()
    assert bounds() == [1, 1_000_000, 2_000_000, 3_000_000, 4_000_000]
    assert post(cast) == 1_000_001
    assert verify() == []


def test_one_that_is_not_full_is_not_left(cast, full_at):
    post(cast)
    full_at(137)
    partitions.maintain()
    assert post(cast) == 2


@pytest.mark.parametrize(
    ("constant", "too_much", "enough"),
    [
        # Where there are many accounts, a few messages to all: to 206, on two pages of 136.
        ("partition_messages_per_account", 2, 1),
        ("partition_soft_max", 0.5, 2),  # where there is much, so much of it: twice of all, and half
    ],
)
def test_the_more_there_is_the_more_a_partition_holds(cast, full_at, override, constant, too_much, enough):
    crowd(cast.server_id, 200)
    execute("ANALYZE user_account")
    post(cast)
    full_at(100)
    override(**{constant: too_much})
    partitions.maintain()
    assert post(cast) == 2, "that is more than there is in it"
    override(**{constant: enough})
    partitions.maintain()
    assert post(cast) == 1_000_000


def test_a_million_messages_fill_one_too(cast):
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 999999")
    assert [post(cast), post(cast)] == [999_999, 1_000_000]
    partitions.maintain()
    assert bounds()[-1] == 4_000_000
    assert [len(notified_of(999_999)), len(notified_of(1_000_000))] == [3, 3]


def test_who_is_just_posting_is_not_waited_for_for_long(cast, full_at, in_another_session, override, caplog):
    full_at(0)
    with in_another_session("SELECT nextval('message_id_seq')"):
        with pytest.raises(OperationalError, match="lock timeout"):
            partitions.maintain()
        override(partition_check_seconds=0)
        maintenance.sweep()
        override(partition_check_seconds=3_600)
        assert "partitions is delayed" in caplog.text
        maintenance.sweep()
        assert caplog.text.count("partitions is delayed") == 1, "not with each sweep"
    assert bounds() == [1, 1_000_000, 2_000_000, 3_000_000]
    override(partition_check_seconds=0)
    maintenance.sweep()
    assert post(cast) == 1_000_000


def test_an_id_is_never_given_twice(cast, full_at):
    """As if so much was posted between the look at the sequence and its lock that the partition was left by itself."""
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 1000005")
    partitions._roll_over(Partition(1, 1_000_000))
    assert post(cast) == 1_000_005


def test_one_looks_after_them_at_a_time(full_at, in_another_session, cast):
    full_at(0)
    with in_another_session(f"SELECT pg_advisory_xact_lock({partitions.PARTITION_LOCK})"):
        partitions.maintain()
    assert post(cast) == 1


def test_without_retention_nothing_is_dropped_or_left_for_its_age(cast, full_at):
    post(cast, days_ago=4_000)
    partitions.maintain()
    assert post(cast, days_ago=3_000) == 2
    begin_partition(full_at)
    assert post(cast, days_ago=2_000) == 1_000_000
    partitions.maintain()
    assert bounds()[:2] == [1, 1_000_000]


def test_one_is_left_after_a_tenth_of_the_retention(cast, keeping):
    keeping(30)
    post(cast, days_ago=2)
    partitions.maintain()
    assert post(cast, days_ago=4) == 2
    partitions.maintain()
    assert post(cast) == 3, "its first message counts"
    execute("UPDATE message SET created_at = now() - interval '73 hours' WHERE id = 1")
    partitions.maintain()
    assert post(cast) == 1_000_000


def test_what_is_older_than_the_retention_is_dropped_and_nothing_else(cast, keeping, full_at):
    old = post(cast, days_ago=40)
    begin_partition(full_at)
    mixed = [post(cast, days_ago=35), post(cast, days_ago=29)]
    begin_partition(full_at)
    new = post(cast)
    keeping(30)
    partitions.maintain()
    assert [notified_of(old), *map(len, map(notified_of, [*mixed, new]))] == [[], 3, 3, 3]
    assert partitions.list_partitions()[:2] == [Partition(None, 1_000_000), Partition(1_000_000, 2_000_000)]
    assert partitions.oldest_retained_message_id() == 1_000_000
    before = bounds()
    partitions.maintain()
    assert bounds() == before
    assert verify() == []
    execute("UPDATE message SET created_at = now() - interval '31 days' WHERE id = %(id)s", {"id": mixed[1]})
    partitions.maintain()
    assert notified_of(mixed[0]) == [] != notified_of(new)
    assert partitions.oldest_retained_message_id() == 2_000_000


def test_of_what_is_not_kept_it_is_said_so(api, cast, keeping, full_at):
    old = post(cast, days_ago=40)
    begin_partition(full_at)
    new = post(cast)
    about = f"/api/messages/{old}/explain?user_id={cast.vip.id}"
    assert "not kept" not in api(cast.admin).get(about).get_json()["detail"]
    keeping(30)
    partitions.maintain()
    explained = api(cast.admin).get(about).get_json()
    assert (explained["decision"], explained["notified_at"]) == ("message", None)
    assert "notifications of messages that old are not kept" in explained["detail"]
    assert "not kept" not in api(cast.admin).get(about.replace(f"/{old}/", f"/{new}/")).get_json()["detail"]
    run_id = fetch_one("SELECT id FROM run WHERE message_id = %(id)s", {"id": old})["id"]
    replayed = api(cast.admin).post(f"/api/runs/{run_id}/replay", json={"dry_run": False})
    assert replayed.status_code == 409, "everybody would be notified a second time"
    assert "RETENTION_DAYS" in replayed.get_json()["detail"]
    assert stats(run_id)["notified"] == 3, "its run still says how many they were"


def test_a_replay_after_the_drop_notifies_nobody_twice(api, cast, keeping, full_at):
    old = post(cast, days_ago=40)
    crowd(cast.server_id, 1)
    begin_partition(full_at)
    post(cast)
    run_id = fetch_one("SELECT id FROM run WHERE message_id = %(id)s", {"id": old})["id"]
    replayed = api(cast.admin).post(f"/api/runs/{run_id}/replay", json={"dry_run": False}).get_json()
    assert replayed["inserted"] == 1
    keeping(30)
    partitions.maintain()
    assert claims.claim_batch(replayed["run"]["id"], [], 20_000) == [], "it is done by itself"
    assert run_to_end(replayed["run"]["id"]) == "succeeded"
    assert notified_of(old) == []
    assert verify() == []


def old_message_with_a_replay(api, cast, full_at):
    """A message of which RETENTION_DAYS has passed, in a partition of its own, and a replay that would add one person:
    ids of message and run."""
    old = post(cast, days_ago=40)
    crowd(cast.server_id, 1)
    begin_partition(full_at)
    post(cast)
    run_id = fetch_one("SELECT id FROM run WHERE message_id = %(id)s", {"id": old})["id"]
    replayed = api(cast.admin).post(f"/api/runs/{run_id}/replay", json={"dry_run": False}).get_json()
    assert replayed["inserted"] == 1
    return old, replayed["run"]["id"]


def in_a_thread_that_waits_for_members(function, meanwhile):
    """Start `function`, which comes to read the members of a server after it has asked what is kept; do `meanwhile` at
    that moment, and wait for the end of both."""

    def run() -> None:
        with db.connection_context():
            function()

    thread = threading.Thread(target=run)
    with psycopg.connect(settings.database_url) as other:
        other.execute("LOCK TABLE member IN ACCESS EXCLUSIVE MODE")
        thread.start()
        waiting = "SELECT 1 AS yes FROM pg_locks WHERE NOT granted AND relation = 'member'::regclass"
        wait_until(lambda: fetch_one(waiting), "the members to be asked for")
        meanwhile()
        other.rollback()
    thread.join()


def drop_or_wait():
    with contextlib.suppress(OperationalError):  # the drop waits for the next sweep
        partitions.maintain()


@pytest.mark.parametrize("in_slices", [False, True])
def test_a_replay_under_way_keeps_its_partition_and_notifies_nobody_twice(
    api, cast, keeping, full_at, slices_of, in_slices
):
    old, run_id = old_message_with_a_replay(api, cast, full_at)
    before = notified_of(old)
    part = WorkItem(run_id)
    if in_slices:
        slices_of(2)
        advance(run_id)
        part = parts_of(run_id)[-1]
    keeping(30)
    in_a_thread_that_waits_for_members(lambda: do(part), drop_or_wait)
    assert [user for user in notified_of(old) if user in before] == before, "it is still known who was notified"
    assert len(notified_of(old)) == len(before) + 1
    assert run_to_end(run_id) == "succeeded"
    partitions.maintain()
    assert notified_of(old) == []
    assert verify() == []


def test_what_a_replay_would_add_is_counted_before_or_after_a_drop_but_not_in_between(api, cast, keeping, full_at):
    old, run_id = old_message_with_a_replay(api, cast, full_at)
    keeping(30)
    counted = []
    in_a_thread_that_waits_for_members(lambda: counted.append(runs.replay(run_id, dry_run=True)), drop_or_wait)
    assert [(one["inserted"], one["unchanged"]) for one in counted] == [(1, len(notified_of(old)))]


def test_a_message_that_is_retried_after_its_replay_was_dropped_notifies_nobody_twice(api, cast, keeping, full_at):
    """Whatever its kind: who was notified by the other run is not known any more."""
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
    keeping(30)
    partitions.maintain()
    assert notified_of(old) == []
    assert claims.claim_batch(run_id, [], 20_000) == [], "it is done by itself"
    assert run_to_end(run_id) == "succeeded"
    assert notified_of(old) == []
    assert verify() == []


def test_a_new_message_does_not_ask_what_is_kept(cast):
    _, run_id = write(cast.subscriber, cast.general)
    with statements() as seen:
        assert run_to_end(run_id) == "succeeded"
    assert not any("LOCK TABLE" in statement or "pg_inherits" in statement for statement in seen)


def test_what_is_no_partition_of_ours_is_passed_over_and_what_goes_wrong_stops_no_sweep(cast, caplog):
    execute("CREATE TABLE notification_of_others PARTITION OF notification DEFAULT")
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 3000000")
    try:
        assert len(partitions.list_partitions()) == 4
        assert len(notified_of(post(cast))) == 3
        maintenance.sweep()  # what is in the default partition is in the way of the one that is missing
        assert "partitions failed" in caplog.text
    finally:
        execute("DROP TABLE notification_of_others")


# Missing partitions ---------------------------------------------------------------------------------------


@pytest.fixture
def looked_after(override):
    """The workers looked after the partitions a moment ago."""
    override(partition_check_seconds=10**9)


def failing_post(cast):
    """A message of which nobody can be notified, for lack of a partition: ids of message and run."""
    message_id, run_id = write(cast.subscriber, cast.general)
    with pytest.raises(IntegrityError, match="no partition of relation"):
        run_to_end(run_id)
    return message_id, run_id


def assert_missing(api, cast, client, number):
    """What /readyz and /metrics say."""
    answer = client.get("/readyz")
    assert answer.status_code == (503 if number else 200)
    if number:
        assert [why.split(":")[0] for why in answer.get_json()["errors"]["partitions"]] == [f"{number} missing"]
    assert f"belfry_partitions_missing {float(number)}" in api(cast.admin).get("/metrics").text


@pytest.mark.parametrize("ahead", [3_000_000, 123_456_789, 10**15 + 5])
def test_where_the_sequence_is_far_ahead_one_sweep_makes_the_partitions(api, cast, client, looked_after, ahead):
    execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {ahead}")
    message_id, run_id = failing_post(cast)
    assert_missing(api, cast, client, 1)
    maintenance.sweep()
    assert_missing(api, cast, client, 0)
    assert run_to_end(run_id) == "succeeded"
    assert (message_id, len(notified_of(message_id))) == (ahead, 3)
    assert len(bounds()) <= 8
    assert bounds()[-1] >= ahead // 1_000_000 * 1_000_000 + 2_000_000
    assert verify() == []


@pytest.mark.parametrize(
    "kind", ["TABLE {} (user_id bigint)", "VIEW {} AS SELECT 1", "SEQUENCE {}", "TYPE {} AS ENUM ()"]
)
def test_what_has_a_partitions_name_is_not_in_its_way(api, cast, client, looked_after, kind):
    name = "notification_before_4000000"
    execute(f"CREATE {kind.format(name)}")
    try:
        execute("ALTER SEQUENCE message_id_seq RESTART WITH 3000000")
        _, run_id = failing_post(cast)
        maintenance.sweep()
        assert_missing(api, cast, client, 0)
        assert run_to_end(run_id) == "succeeded"
        assert f"{name}_2" in [one.name for one in partitions.list_partitions()]
        assert verify() == []
    finally:
        execute(f"DROP {kind.split()[0]} {name}")


def test_a_partition_that_was_detached_is_attached_again_with_what_is_in_it(
    api, cast, client, looked_after, caplog
):
    first = post(cast)
    before = notified_of(first)
    execute("ALTER TABLE notification DETACH PARTITION notification_before_1000000")
    _, run_id = failing_post(cast)
    assert_missing(api, cast, client, 1)
    maintenance.sweep()
    assert_missing(api, cast, client, 0)
    assert "notification_before_1000000 was detached" in caplog.text
    assert notified_of(first) == before
    assert run_to_end(run_id) == "succeeded"
    assert bounds() == [1, 1_000_000, 2_000_000, 3_000_000]
    assert verify() == []


def test_one_that_was_detached_and_does_not_fit_any_more_is_left_and_said_to_be_in_the_way(
    api, cast, client, looked_after, caplog
):
    execute("ALTER TABLE notification DETACH PARTITION notification_before_1000000")
    execute("INSERT INTO notification_before_1000000 (user_id, message_id, reason) VALUES (1, 5000000, 'message')")
    try:
        maintenance.sweep()
        assert "notification_before_1000000 has the name of a partition" in caplog.text
        assert_missing(api, cast, client, 0)
        assert len(notified_of(post(cast))) == 3
    finally:
        execute("DROP TABLE notification_before_1000000")


def test_the_lowest_and_one_in_the_middle_are_missed_as_well(api, cast, client, looked_after):
    execute("DROP TABLE notification_before_1, notification_before_2000000")
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 2500000")
    assert partitions.missing_ranges() == [Partition(None, 1), Partition(1_000_000, 2_000_000)]
    assert_missing(api, cast, client, 2)
    maintenance.sweep()
    assert_missing(api, cast, client, 0)
    assert bounds()[:4] == [1, 1_000_000, 2_000_000, 3_000_000]


def test_one_that_is_missing_ahead_of_the_next_message_is_made_before_it_is_needed(api, cast, client, looked_after):
    execute("DROP TABLE notification_before_2000000")
    assert_missing(api, cast, client, 0)
    maintenance.sweep()
    assert partitions.missing_ranges() == []
    assert bounds() == [1, 1_000_000, 2_000_000, 3_000_000]


def test_what_cannot_be_made_is_said_so(api, cast, client, looked_after, caplog):
    execute("CREATE TABLE notification_rest PARTITION OF notification DEFAULT")
    try:
        execute("INSERT INTO notification (user_id, message_id, reason) VALUES (1, 3000001, 'message')")
        execute("ALTER SEQUENCE message_id_seq RESTART WITH 3000000")
        maintenance.sweep()
        assert "have no partition: their runs fail until it is created" in caplog.text
        assert "partitions failed" in caplog.text
        assert_missing(api, cast, client, 1)
    finally:
        execute("DROP TABLE notification_rest")


def test_an_edit_of_an_old_message_notifies_the_newly_mentioned(api, cast, keeping, full_at):
    old = post(cast, days_ago=40)
    begin_partition(full_at)
    post(cast, days_ago=31)
    begin_partition(full_at)
    post(cast)
    keeping(35)
    partitions.maintain()
    edited = api(cast.subscriber).patch(f"/api/messages/{old}", json={"content": "gold @vera"})
    assert edited.status_code == 200, edited.get_json()
    assert run_to_end(edited.get_json()["run"]["id"]) == "succeeded"
    assert notified_of(old) == [cast.vip.id]
    assert verify() == []
    keeping(30)
    partitions.maintain()
    assert notified_of(old) == [], "it went with the next partition"


def test_somebody_who_reads_for_long_delays_a_drop_and_nothing_else(cast, keeping, full_at, in_another_session):
    post(cast, days_ago=40)
    begin_partition(full_at)
    post(cast)
    keeping(30)
    full_at(0)
    with in_another_session("SELECT count(*) FROM notification"):
        with pytest.raises(OperationalError, match="lock timeout"):
            partitions.maintain()
        assert len(notified_of(1)) == 3
        assert bounds()[-1] == 4_000_000
        assert post(cast) == 2_000_000, "the next one is begun"
    full_at(1_000_000)
    partitions.maintain()
    assert notified_of(1) == []


def test_what_was_there_before_partitions_stays(cast):
    migration = import_module("migrations.0003_partitions")  # by itself: what came later stays
    migration.down(None, db)
    execute("ALTER SEQUENCE message_id_seq RESTART WITH 1999998")
    first, second = post(cast), post(cast)
    before = fetch_all("SELECT * FROM notification ORDER BY user_id, message_id")
    migration.up(None, db)
    assert bounds() == [1, 2_000_000, 3_000_000, 4_000_000]
    assert fetch_all("SELECT * FROM notification ORDER BY user_id, message_id") == before
    third = post(cast)
    assert (first, second, third) == (1_999_998, 1_999_999, 2_000_000)
    assert len(before) == 6
    migration.down(None, db)
    assert len(fetch_all("SELECT * FROM notification")) == 9
    migration.up(None, db)


def nodes_of(monkeypatch, ask):
    """The nodes of the plans of the statements about notifications in `ask`, as they ran."""
    said = []
    for name, real in (("fetch_all", fetch_all), ("fetch_one", fetch_one)):
        heard = lambda sql, parameters, real=real: said.append((sql, parameters)) or real(sql, parameters)  # noqa: E731
        monkeypatch.setattr(inbox, name, heard)
    ask()
    found = []

    def walk(node):
        if node["Actual Loops"]:
            found.append(node)
        for child in node.get("Plans", []):
            walk(child)

    for sql, parameters in said:
        if "notification" in sql:
            with db.atomic() as explained:
                walk(fetch_all(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", parameters)[0]["QUERY PLAN"][0]["Plan"])
                explained.rollback()
    return found


def read_partitions(monkeypatch, ask):
    """The partitions that they look into."""
    found = {node.get("Relation Name", "") for node in nodes_of(monkeypatch, ask)}
    return {name for name in found if name.startswith("notification_before_")}


def indexes_read(monkeypatch, ask):
    return {node.get("Index Name", "") for node in nodes_of(monkeypatch, ask)}


def test_a_page_reads_its_own_partitions_only(cast, full_at, monkeypatch):
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
    assert first <= {newest, "notification_before_5000000", "notification_before_6000000"}, "those ahead are empty"
    assert newest in first
    older = read_partitions(monkeypatch, lambda: inbox.list_notifications(vip, before=1_000_020, limit=30))
    assert older == {"notification_before_2000000", "notification_before_1000000"}
    execute("SELECT pg_stat_force_next_flush()")  # what was read before is not to be counted
    with db.atomic():
        execute("SET LOCAL plan_cache_mode = force_generic_plan")  # as a connection has it that was asked often
        inbox.list_notifications(vip, before=1_000_020, limit=30)
        read = fetch_all(
            "SELECT relname AS name FROM pg_stat_xact_user_tables WHERE relname ~ '^notification_before_'"
            " AND seq_tup_read + idx_tup_fetch > 0"
        )
    assert {one["name"] for one in read} == older
    assert inbox.unread_count(vip)["unread"] == 160


@pytest.mark.parametrize("asked", [{}, {"before": 1_000_020}, {"unread": True}, {"before": 1_000_020, "unread": True}])
def test_a_page_is_not_planned_anew_each_time(cast, asked):
    vip = User.get_by_id(cast.vip.id)
    execute(
        "WITH made AS (INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 2000) RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason) SELECT %(vip)s, id, 'message' FROM made",
        {"channel": cast.general, "author": cast.subscriber.id, "vip": cast.vip.id},
    )
    execute("ANALYZE notification, message")
    page = {"before": None, "limit": 5, **asked}
    assert generic_plans(lambda: inbox.list_notifications(vip, **page), "CROSS JOIN LATERAL") == [10]


@pytest.mark.parametrize("unread", [True, False])
def test_a_page_of_one_who_has_far_more_than_others_looks_at_no_more_than_it_shows(cast, unread):
    """By a plan for everybody, who have read all."""
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


# The index of what is unread ------------------------------------------------------------------------------


def indexes():
    """The partitions that have it, and whether it is of use."""
    found = fetch_all(
        "SELECT i.indrelid::regclass::text AS name, i.indisvalid AS valid FROM pg_index i"
        " JOIN pg_class x ON x.oid = i.indexrelid AND x.relname ~ '_unread$' ORDER BY length(x.relname), x.relname"
    )
    return {one["name"]: one["valid"] for one in found}


def care_and_index() -> bool:
    """As the sweeper does, which makes one index at a time; whether all were made."""
    partitions.maintain()
    made = [partitions.create_unread_index(name) for name in partitions.partitions_missing_unread_index()]
    return all(made)


def test_only_what_was_left_has_an_index_of_the_unread(cast, full_at):
    post(cast)
    care_and_index()
    assert indexes() == {"notification_before_1": True}
    begin_partition(full_at)
    post(cast)
    care_and_index()
    assert indexes() == {"notification_before_1": True, "notification_before_1000000": True}
    care_and_index()
    assert len(indexes()) == 2
    assert verify() == []


def test_it_is_what_the_unread_are_counted_shown_and_marked_by(cast, full_at, monkeypatch):
    execute(
        "WITH made AS (INSERT INTO message (channel_id, author_id, content)"
        " SELECT %(channel)s, %(author)s, 'gold' FROM generate_series(1, 500) RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason, read_at)"
        " SELECT user_id, id, 'message', CASE WHEN id > 3 THEN now() END FROM made, generate_series(1, 20) AS user_id",
        {"channel": cast.general, "author": cast.subscriber.id},
    )
    begin_partition(full_at)
    post(cast)
    care_and_index()
    execute("VACUUM (ANALYZE) notification, message")
    vip = User.get_by_id(cast.vip.id)
    for ask in (
        lambda: inbox.unread_count(vip),
        lambda: inbox.list_notifications(vip, before=None, limit=10, unread=True),
        lambda: inbox.mark_read(vip, up_to=(vip.id, 2)),
    ):
        assert "notification_before_1000000_unread" in indexes_read(monkeypatch, ask)
    assert [one["message_id"] for one in inbox.list_notifications(vip, before=None, limit=10, unread=True)] == [
        1_000_000,
        3,
    ]


def test_one_that_was_begun_and_not_finished_is_made_anew(cast, full_at, in_another_session, override):
    post(cast)
    begin_partition(full_at)
    post(cast)
    care_and_index()
    execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'notification_before_1000000_unread'::regclass")
    override(partition_index_lock_timeout="200ms")
    with in_another_session("LOCK TABLE notification_before_1000000 IN SHARE UPDATE EXCLUSIVE MODE"):
        assert not care_and_index()  # somebody is just making it
    assert indexes()["notification_before_1000000"] is False
    care_and_index()
    assert indexes() == {"notification_before_1": True, "notification_before_1000000": True}


def test_nobody_waits_for_it_longer_than_it_may_take(cast, full_at, in_another_session, override):
    override(partition_index_lock_timeout="200ms")
    post(cast)
    full_at(0)
    with in_another_session("UPDATE notification SET read_at = now()"):
        assert not care_and_index()
        assert post(cast) == 1_000_000, "the next one is begun"
        inbox.mark_read(User.get_by_id(cast.moderator.id), up_to=(cast.moderator.id, 0))
    full_at(1_000_000)
    care_and_index()
    assert indexes()["notification_before_1000000"] is True


def test_a_partition_that_is_dropped_takes_it_along(cast, keeping, full_at):
    post(cast, days_ago=40)
    begin_partition(full_at)
    post(cast)
    care_and_index()
    keeping(30)
    care_and_index()
    assert indexes() == {"notification_before_1000000": True}
    assert partitions.oldest_retained_message_id() == 1_000_000
