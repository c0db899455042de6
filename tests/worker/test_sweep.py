"""The steps of the sweep: a failure affects only its own step and is reported, and old rows are deleted in batches."""

import time
from contextlib import ExitStack
from datetime import UTC, datetime

import psycopg
import pytest
from peewee import OperationalError
from prometheus_client.parser import text_string_to_metric_families

from belfry.core.db import execute, fetch_one
from belfry.core.locks import SWEEP_LOCK
from belfry.queue import queues, sweep_status
from belfry.worker import cleanup, maintenance
from belfry.worker.cleanup import CLEANUPS
from config import settings
from tests.fanout_helpers import post, statements


def insert_old_keys(number: int, hours: int = 25) -> None:
    execute(
        "INSERT INTO idempotency_key (user_id, key, request_hash, response, created_at)"
        " SELECT (SELECT min(id) FROM user_account), gen_random_uuid()::text, sha256('x'), '{}',"
        " now() - make_interval(hours => %(hours)s) FROM generate_series(1, %(number)s)",
        {"number": number, "hours": hours},
    )


def count_keys() -> int:
    return fetch_one("SELECT count(*) AS keys FROM idempotency_key")["keys"]


def create_lost_run(cast) -> int:
    """Create a run that a dead worker left and that only recovery enqueues again; return its id."""
    _, run_id = post(cast.subscriber, cast.general)
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    return run_id


def fail_deletions(table: str) -> None:
    """Make every deletion from a table fail until `allow_deletions` is called."""
    execute(
        "CREATE FUNCTION test_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE query_canceled USING MESSAGE = 'canceling statement due to statement timeout'; END $$;"
        f"CREATE TRIGGER test_refuse BEFORE DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION test_refuse()"
    )


def allow_deletions() -> None:
    execute("DROP FUNCTION IF EXISTS test_refuse CASCADE")


@pytest.fixture(autouse=True)
def _deletions_allowed(_clean):
    yield
    allow_deletions()


def readiness(client) -> tuple[int, dict]:
    response = client.get("/readyz")
    return response.status_code, response.get_json()


def metric(api, cast, name: str) -> dict[str, float]:
    families = text_string_to_metric_families(api(cast.admin).get("/metrics").text)
    samples = [sample for family in families if family.name == name for sample in family.samples]
    return {sample.labels["part"]: sample.value for sample in samples}


@pytest.mark.parametrize("table", ["idempotency_key", "notification_log"])
def test_a_failing_clean_up_does_not_stop_recovery_and_is_reported(api, cast, client, table, caplog):
    run_id = create_lost_run(cast)
    insert_old_keys(3)
    fail_deletions(table)
    assert maintenance.sweep() == 1
    assert [job.args for job in queues.queue().jobs] == [[run_id]]
    step = {"idempotency_key": "idempotency_keys", "notification_log": "stream_log"}[table]
    assert f"{step} is delayed until the next sweep" in caplog.text
    status, ready = readiness(client)
    (warning,) = ready["warnings"]
    assert (status, warning.split(" has failed ")[0]) == (200, f"The worker's {step}")
    assert metric(api, cast, "belfry_sweep_part_failing") == {step: 1}
    assert step not in metric(api, cast, "belfry_sweep_part_last_success_timestamp_seconds")
    assert count_keys() == (3 if table == "idempotency_key" else 0), "the other clean-up continues"
    allow_deletions()
    maintenance.sweep()
    assert (readiness(client)[1]["warnings"], count_keys()) == ([], 0)
    assert metric(api, cast, "belfry_sweep_part_failing") == {}
    succeeded = metric(api, cast, "belfry_sweep_part_last_success_timestamp_seconds")
    assert set(maintenance.SWEEP_STEPS) - {"partitions"} <= set(succeeded)


def test_failing_recovery_stops_no_other_step_and_becomes_an_error_after_a_while(cast, client, redis):
    insert_old_keys(3)
    with psycopg.connect(settings.database_url) as other:
        other.execute("LOCK TABLE slice")
        execute("SET lock_timeout = '200ms'")
        maintenance.sweep()
        execute("RESET lock_timeout")
        assert count_keys() == 0
        status, ready = readiness(client)
        assert (status, len(ready["warnings"])) == (200, 1), "a short failure is only a warning"
        redis.hset(sweep_status.SWEEP_KEY, "recovery failing since", round(time.time()) - 31)
        status, problem = readiness(client)
        assert (status, list(problem["errors"])) == (503, ["recovery"])
    maintenance.sweep()
    assert readiness(client)[0] == 200


def test_a_step_without_a_database_connection_is_reported_as_failed(cast, client, database_unavailable):
    """Recovery above all, because without it no lost work is found."""
    with database_unavailable(), pytest.raises(OperationalError):
        maintenance.sweep()
    status, ready = readiness(client)
    (warning,) = ready["warnings"]
    assert (status, warning.split(" has failed ")[0]) == (200, "The worker's recovery")
    maintenance.sweep()
    assert readiness(client)[1]["warnings"] == []


def test_steps_that_need_only_postgresql_run_while_redis_is_unavailable(cast, redis_unavailable):
    create_lost_run(cast)
    insert_old_keys(3)
    with redis_unavailable():
        assert maintenance.sweep() == 0
    assert count_keys() == 0
    assert maintenance.sweep() == 1


def test_old_keys_are_deleted_in_batches_and_recent_keys_are_kept(cast, override):
    override(cleanup_batch_rows=100)
    insert_old_keys(350)
    insert_old_keys(20, hours=23)
    with statements() as seen:
        maintenance.sweep()
    assert sum("DELETE FROM idempotency_key" in statement for statement in seen) == 4
    assert count_keys() == 20


def test_a_sweep_deletes_one_batch_when_its_time_is_used_up(cast, override):
    override(cleanup_batch_rows=100)
    override(cleanup_seconds=0)
    insert_old_keys(350)
    for left in (250, 150, 50, 0):
        maintenance.sweep()
        assert count_keys() == left


def test_two_workers_do_not_clean_up_at_the_same_time(cast, in_another_session):
    insert_old_keys(3)
    with in_another_session(f"SELECT pg_advisory_xact_lock({cleanup.CLEANUP_LOCK})"):
        assert [cleanup.clean_up(name) for name in CLEANUPS] == [None] * len(CLEANUPS)
    assert cleanup.clean_up("idempotency_keys") == 3


def test_two_sweepers_enqueue_a_due_retry_once(cast, redis, in_another_session):
    _, run_id = post(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    job = queues.queue().fetch_job(queues.run_job_id(run_id))
    redis.delete(queues.queue().key)
    queues.queue().scheduled_job_registry.schedule(job, datetime.now(UTC))
    with in_another_session(f"SELECT pg_advisory_xact_lock({SWEEP_LOCK})"):
        assert maintenance.SWEEP_STEPS[maintenance.RETRIES]() is None
        assert queues.queue().count == 0
    assert maintenance.SWEEP_STEPS[maintenance.RETRIES]() == 1
    assert queues.queue().get_job_ids() == [job.id]


def test_a_sweep_that_is_stopped_begins_no_further_step(cast):
    insert_old_keys(3)
    answers = iter([False, True])
    maintenance.sweep(lambda: next(answers))
    assert count_keys() == 3


def test_a_failure_that_redis_did_not_take_is_recorded_by_the_next_sweep(cast, redis, redis_unavailable, at_failpoint):
    runs = [post(cast.subscriber, cast.general)[1] for _ in range(2)]
    execute("UPDATE run SET state = 'running', attempts_left = 0, sweep_after = now() - interval '1 minute'")
    with ExitStack() as outage:
        at_failpoint("sweep.enqueued", lambda: outage.enter_context(redis_unavailable()))
        maintenance.sweep()
    assert redis.zcard("rq:failed:notifications") == 0
    redis.set(f"rq:results:{queues.run_job_id(runs[0])}", "not a stream")
    at_failpoint("sweep.enqueued", lambda: None)
    maintenance.sweep()
    failed = queues.queue().failed_job_registry.get_job_ids()
    assert set(failed) == {queues.run_job_id(run_id) for run_id in runs}
