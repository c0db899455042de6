"""The migrations create the schema of the models, and constraints refuse invalid rows."""

import threading
import uuid

import pytest
from peewee import DataError, IntegrityError, PostgresqlDatabase
from playhouse.schema_diff import diff_models

from belfry.core import migrations, partitions
from belfry.core.db import db, execute, fetch_all, fetch_one
from belfry.fanout import recovery
from belfry.fanout.claims import WorkItem
from models import TABLES, Notification, Role, Run, Server, Subscription, User
from tests.fanout_helpers import run_to_end, stats


def test_the_migrations_create_the_schema_of_the_models():
    found = diff_models(db, list(TABLES))
    assert not found, found


def test_every_time_column_has_a_time_zone():
    wrong = fetch_all(
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = 'public' AND data_type = 'timestamp without time zone'"
        " AND table_name <> 'schema_migration'"
    )
    assert wrong == []


def test_the_partition_in_use_has_only_its_key():
    stored = partitions.list_partitions()
    used = partitions._in_use(stored)
    indexes = fetch_all("SELECT tablename, indexdef FROM pg_indexes WHERE tablename ~ '^notification(_before|$)'")
    keys = [index for index in indexes if index["indexdef"].endswith("btree (user_id, message_id)")]
    assert len({index["tablename"] for index in keys}) == len(keys) == 1 + len(stored)
    earlier = {partition.name for partition in stored if partition.upper < used.upper}
    assert {index["tablename"] for index in indexes if index not in keys} <= earlier


def test_migrating_repeatedly_and_concurrently_is_safe(monkeypatch):
    name = f"belfry_migrating_{uuid.uuid4().hex[:12]}"
    execute(f'CREATE DATABASE "{name}"')
    parameters = {key: value for key, value in db.connect_params.items() if key != "dbname"}
    fresh = PostgresqlDatabase(name, prefer_psycopg3=True, **parameters)
    monkeypatch.setattr(migrations, "db", fresh)
    monkeypatch.setattr("belfry.core.db.db", fresh)
    try:
        applied: list[list[str]] = []
        threads = [threading.Thread(target=lambda: applied.append(migrations.migrate())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(applied) == [[], [], [path.stem for path in sorted(migrations.MIGRATIONS.glob("0*.py"))]]
        with fresh.connection_context():
            assert migrations.missing_migrations() == []
    finally:
        monkeypatch.undo()
        execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def test_unfinished_runs_from_before_slices_continue_where_they_stopped(cast):
    runner = migrations._runner()
    runner.down("0002_slices")
    try:
        execute(
            "INSERT INTO message (channel_id, author_id, content) SELECT %(channel)s, %(author)s, 'gold'"
            " FROM generate_series(1, 4)",
            {"channel": cast.general, "author": cast.subscriber.id},
        )
        execute("INSERT INTO run (message_id, kind) VALUES (1, 'message')")
        execute("INSERT INTO run (message_id, kind, state, walked_to, done) VALUES (2, 'message', 'running', 2, 2)")
        execute(
            "INSERT INTO run (message_id, kind, state, walked_to, done, error, finished_at)"
            " VALUES (3, 'message', 'failed', 2, 2, 'why', now()), (4, 'message', 'succeeded', 6, 5, NULL, now())"
        )
    finally:
        runner.up()
    assert [(run.state, run.slices_left, run.sweep_after is None) for run in Run.select().order_by(Run.id)] == [
        ("pending", 0, False),
        ("running", 1, True),
        ("failed", 1, True),
        ("succeeded", 0, True),
    ]
    assert recovery.requeue_lost_slices(None) == [WorkItem(2, 2)], "failed runs are retried only on request"
    assert recovery.retry_failed() == [WorkItem(3, 2)]
    for run_id in (2, 3):
        execute("UPDATE run SET decisions = '{\"message\": 2}' WHERE id = %(id)s", {"id": run_id})
        assert run_to_end(run_id) == "succeeded"
        assert stats(run_id)["audience"] == 5, "two members were counted before, three are counted now"


def assert_refused(statement: str, **parameters: object) -> None:
    with pytest.raises((IntegrityError, DataError)), db.atomic():
        execute(statement, parameters)


def test_constraints_of_the_database_refuse_invalid_rows(cast):
    other = Server.create(name="Other")
    foreign = Role.create(server=other, name="foreign")
    assert_refused(
        "INSERT INTO member_role (role_id, user_id, server_id) VALUES (%(role)s, %(user)s, %(server)s)",
        role=foreign.id, user=cast.subscriber.id, server=cast.server_id,
    )  # fmt: skip
    assert_refused(
        "INSERT INTO channel_role (channel_id, role_id, server_id) VALUES (%(channel)s, %(role)s, %(server)s)",
        channel=cast.vault, role=foreign.id, server=cast.server_id,
    )  # fmt: skip
    assert_refused("INSERT INTO member_role (role_id, user_id, server_id) VALUES (%(role)s, %(user)s, %(server)s)",
            role=cast.vip_role, user=cast.stranger.id, server=cast.server_id)  # fmt: skip
    assert_refused("INSERT INTO subscription (user_id, status) VALUES (%(user)s, 'active')", user=cast.subscriber.id)
    assert_refused("UPDATE subscription SET status = 'sort of'")
    assert_refused("INSERT INTO user_account (username, name) VALUES ('Loud', 'Loud')")
    assert_refused("INSERT INTO user_account (username, name) VALUES ('everyone', 'Everyone')")
    assert_refused("INSERT INTO user_account (username, name) VALUES ('dot.', 'Dot')")
    assert_refused("INSERT INTO message (channel_id, author_id, content) VALUES (%(channel)s, %(user)s, '')",
            channel=cast.general, user=cast.subscriber.id)  # fmt: skip
    assert_refused("INSERT INTO preference (channel_id, user_id, level) VALUES (%(channel)s, %(user)s, 'some')",
            channel=cast.general, user=cast.subscriber.id)  # fmt: skip
    assert_refused("INSERT INTO notification (user_id, message_id, reason) VALUES (1, 1, 'muted')")
    Notification.insert(user_id=1, message_id=1, reason="message").execute()
    assert_refused("INSERT INTO notification (user_id, message_id, reason) VALUES (1, 1, 'mention')")
    assert Subscription.select().count() == 5
    assert User.select().where(User.username == "everyone").count() == 0


def test_a_message_has_one_run_of_its_own(api, cast):
    message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    assert_refused("INSERT INTO run (message_id, kind) VALUES (%(id)s, 'message')", id=message.get_json()["id"])
    assert_refused("UPDATE run SET state = 'failed', finished_at = now()")  # without an error
    assert_refused("UPDATE run SET state = 'succeeded'")  # without a time
    assert fetch_one("SELECT state FROM run") == {"state": "queued"}
