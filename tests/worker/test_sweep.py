"""The parts of the sweep: each fails by itself, is reported, and old rows are deleted in batches."""

import time

import psycopg
import pytest
from peewee import OperationalError
from prometheus_client.parser import text_string_to_metric_families

from belfry.core.db import execute, fetch_one
from belfry.queue import queues, sweep_status
from belfry.worker import cleanup, maintenance
from belfry.worker.cleanup import CLEANUPS
from config import settings
from tests.fanout_helpers import post, statements


def old_keys(number: int, hours: int = 25) -> None:
    execute(
        "INSERT INTO idempotency_key (user_id, key, request_hash, response, created_at)"
        " SELECT (SELECT min(id) FROM user_account), gen_random_uuid()::text, sha256('x'), '{}',"
        " now() - make_interval(hours => %(hours)s) FROM generate_series(1, %(number)s)",
        {"number": number, "hours": hours},
    )


def keys_left() -> int:
    return fetch_one("SELECT count(*) AS keys FROM idempotency_key")["keys"]


def lost_run(cast) -> int:
    """A run that a dead worker left, which only recovery brings back into the queue."""
    _, run_id = post(cast.subscriber, cast.general)
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    return run_id


def refuse(table: str) -> None:
    """Every deletion from a table fails, until `allow`."""
    execute(
        "CREATE FUNCTION test_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE query_canceled USING MESSAGE = 'canceling statement due to statement timeout'; END $$;"
        f"CREATE TRIGGER test_refuse BEFORE DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION test_refuse()"
    )


def allow() -> None:
    execute("DROP FUNCTION IF EXISTS test_refuse CASCADE")


@pytest.fixture(autouse=True)
def _allowed(_clean):
    yield
    allow()


def readiness(client) -> tuple[int, dict]:
    answer = client.get("/readyz")
    return answer.status_code, answer.get_json()


def metric(api, cast, name: str) -> dict[str, float]:
    families = text_string_to_metric_families(api(cast.admin).get("/metrics").text)
    samples = [sample for family in families if family.name == name for sample in family.samples]
    return {sample.labels["part"]: sample.value for sample in samples}


@pytest.mark.parametrize("table", ["idempotency_key", "notification_log"])
def test_a_clean_up_that_fails_stops_no_recovery_and_is_reported(api, cast, client, table, caplog):
    run_id = lost_run(cast)
    old_keys(3)
    refuse(table)
    assert maintenance.sweep() == 1
    assert [job.args for job in queues.queue().jobs] == [[run_id]]
    part = {"idempotency_key": "idempotency_keys", "notification_log": "stream_log"}[table]
    assert f"{part} is delayed until the next sweep" in caplog.text
    status, ready = readiness(client)
    (warning,) = ready["warnings"]
    assert (status, warning.split(" has failed ")[0]) == (200, f"The worker's {part}")
    assert metric(api, cast, "belfry_sweep_part_failing") == {part: 1}
    assert part not in metric(api, cast, "belfry_sweep_part_last_success_timestamp_seconds")
    assert keys_left() == (3 if table == "idempotency_key" else 0), "the other one went on"
    allow()
    maintenance.sweep()
    assert (readiness(client)[1]["warnings"], keys_left()) == ([], 0)
    assert metric(api, cast, "belfry_sweep_part_failing") == {}
    succeeded = metric(api, cast, "belfry_sweep_part_last_success_timestamp_seconds")
    assert set(maintenance.SWEEP_STEPS) - {"partitions"} <= set(succeeded)


def test_recovery_that_fails_stops_no_other_part_and_is_an_error_once_lost_work_waits_too_long(cast, client, redis):
    old_keys(3)
    with psycopg.connect(settings.database_url) as other:
        other.execute("LOCK TABLE slice")
        execute("SET lock_timeout = '200ms'")
        maintenance.sweep()
        execute("RESET lock_timeout")
        assert keys_left() == 0
        status, ready = readiness(client)
        assert (status, len(ready["warnings"])) == (200, 1), "it may be well again in a moment"
        redis.hset(sweep_status.SWEEP_KEY, "recovery failing since", round(time.time()) - 31)
        status, problem = readiness(client)
        assert (status, list(problem["errors"])) == (503, ["recovery"])
    maintenance.sweep()
    assert readiness(client)[0] == 200


def test_a_part_that_gets_no_connection_is_reported_as_failed(cast, client, database_away):
    """Recovery most of all: nothing is recovered then."""
    with database_away(), pytest.raises(OperationalError):
        maintenance.sweep()
    status, ready = readiness(client)
    (warning,) = ready["warnings"]
    assert (status, warning.split(" has failed ")[0]) == (200, "The worker's recovery")
    maintenance.sweep()
    assert readiness(client)[1]["warnings"] == []


def test_while_redis_is_away_what_needs_postgresql_alone_goes_on(cast, redis_away):
    lost_run(cast)
    old_keys(3)
    with redis_away():
        assert maintenance.sweep() == 0
    assert keys_left() == 0
    assert maintenance.sweep() == 1


def test_old_keys_are_deleted_in_batches_and_young_ones_stay(cast, override):
    override(cleanup_batch_rows=100)
    old_keys(350)
    old_keys(20, hours=23)
    with statements() as seen:
        maintenance.sweep()
    assert sum("DELETE FROM idempotency_key" in statement for statement in seen) == 4
    assert keys_left() == 20


def test_a_sweep_deletes_one_batch_where_there_is_no_time_for_more(cast, override):
    override(cleanup_batch_rows=100)
    override(cleanup_seconds=0)
    old_keys(350)
    for left in (250, 150, 50, 0):
        maintenance.sweep()
        assert keys_left() == left


def test_two_workers_do_not_clean_up_at_the_same_time(cast, in_another_session):
    old_keys(3)
    with in_another_session(f"SELECT pg_advisory_xact_lock({cleanup.CLEANUP_LOCK})"):
        assert [cleanup.clean_up(name) for name in CLEANUPS] == [None] * len(CLEANUPS)
    assert cleanup.clean_up("idempotency_keys") == 3
