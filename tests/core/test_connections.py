"""Belfry does not depend on connection settings that a role or a database in PostgreSQL changes."""

import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest

from belfry.core import partitions
from belfry.core.db import SESSION, configure_connection, connect_parameters, db, execute, fetch_one
from belfry.fanout import claims, fanout
from belfry.fanout.claims import WorkItem
from config import settings
from tests.fanout_helpers import notified, post
from tests.processes import wait_until


@pytest.fixture
def database_sets(_clean: None) -> Iterator[Callable[[str, str], None]]:
    """`database_sets("DateStyle", "German")`: set a parameter for each new connection to the database."""
    found = fetch_one("SELECT current_database() AS name")
    assert found is not None
    name = found["name"]

    def set_parameter(parameter: str, value: str) -> None:
        execute(f"ALTER DATABASE \"{name}\" SET {parameter} = '{value}'")
        db.close_all()
        db.connect()

    yield set_parameter
    execute(f'ALTER DATABASE "{name}" RESET ALL')
    db.close_all()


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_message_deleted_while_its_run_waits_for_it_notifies_nobody(cast, database_sets, isolation):
    database_sets("default_transaction_isolation", isolation)
    message_id, run_id = post(cast.subscriber, cast.general)
    attempt = claims.claim(WorkItem(run_id))

    def fan_out() -> None:
        with db.connection_context():
            fanout.process_work_item(WorkItem(run_id), attempt)

    thread = threading.Thread(target=fan_out)
    with psycopg.connect(settings.database_url) as deleting:
        deleting.execute(f"SELECT pg_advisory_xact_lock({claims.MESSAGE_LOCK}, {message_id})")
        deleting.execute(f"UPDATE message SET deleted_at = now() WHERE id = {message_id}")
        thread.start()
        waiting = "SELECT 1 AS yes FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        wait_until(lambda: fetch_one(waiting), "the run to wait for the message")
        deleting.commit()
    thread.join()
    assert notified(message_id) == {}


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("client_encoding", "LATIN1"), ("DateStyle", "German")],
)
def test_text_and_times_do_not_depend_on_database_settings(api, cast, run_jobs, database_sets, parameter, value):
    database_sets(parameter, value)
    posted = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "żółw 🐢"})
    assert (posted.status_code, run_jobs()) == (201, 0)
    (item,) = api(cast.vip).get("/api/notifications").get_json()["items"]
    assert item["body"].endswith("żółw 🐢")
    assert item["created_at"].endswith("Z")


def test_connections_and_transactions_set_all_parameters_that_belfry_needs(database_sets):
    database_sets("default_transaction_isolation", "serializable")
    with psycopg.connect(**connect_parameters(), autocommit=True) as own:
        configure_connection(own)
        for name, value in SESSION.items():
            assert own.execute(f"SHOW {name}").fetchone()[0].lower().startswith(value.lower())
    execute("SET default_transaction_isolation = 'serializable'")  # as behind PgBouncer, on another server connection
    with db.atomic():
        assert fetch_one("SHOW transaction_isolation") == {"transaction_isolation": "read committed"}
    assert partitions.create_unread_index("notification_before_1")
