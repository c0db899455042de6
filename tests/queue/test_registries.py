"""RQ's registries and rq-dashboard agree with the database while jobs run, after they end, and after failures, retries
and the death of a worker."""

import os
import signal

import psycopg
import pytest
from redis import Redis

import jobs
from belfry.core.db import execute
from belfry.fanout import recovery
from belfry.fanout.claims import WorkItem
from belfry.queue import queues, registries
from belfry.worker import maintenance, worker
from config import settings
from models import Run
from tests.fanout_helpers import fault_on_insert
from tests.fanout_helpers import post as write
from tests.processes import wait_until, worker_process
from tests.worker.test_worker import horses_of

pytestmark = pytest.mark.slow


def run_worker(at_most: int | None = None) -> worker.BelfryWorker:
    """Run the queued jobs by a Belfry worker in this process; return the worker."""
    with Redis.from_url(settings.redis_url) as connection:
        all_queues = [queues.queue(name, connection) for name in queues.QUEUES]
        one = worker.BelfryWorker(all_queues, connection=connection)
        one.log_result_lifespan = False
        one.work(burst=True, max_jobs=at_most, logging_level=None)
    return one


def runs_by_state() -> dict[str, set[str]]:
    """{state of runs in the database: ids of their jobs}."""
    found: dict[str, set[str]] = {}
    for run in Run.select():
        found.setdefault(run.state, set()).add(queues.run_job_id(run.id))
    return found


def in_registries(name: str = queues.NOTIFICATIONS) -> dict[str, set[str]]:
    """{registry: ids of its jobs}, without cleaning it up."""
    one = queues.queue(name)
    found = {"queued": set(one.get_job_ids())}
    for kind in ("started", "finished", "failed", "scheduled"):
        found[kind] = set(getattr(one, f"{kind}_job_registry").get_job_ids(cleanup=False))
    return found


def assert_consistent(redis: Redis) -> None:
    """Assert that each job of an ended run is in the registry of the run's state, and each entry has its job."""
    states, found = runs_by_state(), in_registries()
    assert found["finished"] == states.get("succeeded", set())
    assert found["failed"] == states.get("failed", set())
    assert found["started"] == set()
    for name in queues.QUEUES:
        for kind, ids in in_registries(name).items():
            for job_id in ids:
                assert redis.exists(f"rq:job:{job_id}"), (name, kind, job_id)
    assert redis.keys("rq:execution*") == []


def listed(api, cast, name: str, registry: str) -> list[str]:
    """The ids of the jobs that rq-dashboard shows on all pages."""
    shown: list[str] = []
    for page in range(1, 100):
        response = api(cast.admin).get(f"/rq/0/data/jobs/{name}/{registry}/100/asc/{page}.json").get_json()
        shown += [job["id"] for job in response["jobs"]]
        if page >= response["pagination"]["num_pages"]:
            break
    return shown


def test_each_job_of_a_batch_is_shown_finished_with_result_times_and_counters(api, cast, redis):
    runs = [write(cast.subscriber, cast.general, f"gold {number}")[1] for number in range(300)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    assert listed(api, cast, "notifications", "queued") == [queues.run_job_id(run_id) for run_id in runs]
    one = run_worker()
    assert_consistent(redis)
    assert len(listed(api, cast, "notifications", "finished")) == 300
    info = api(cast.admin).get(f"/rq/0/data/job/{queues.run_job_id(runs[7])}.json").get_json()
    assert (info["status"], info["origin"]) == ("finished", "notifications")
    assert info["ended_at"]
    job = queues.queue().fetch_job(queues.run_job_id(runs[7]))
    assert job.started_at <= job.ended_at
    result = job.latest_result()
    assert result.worker_name == one.name
    assert result.return_value == {
        "run": runs[7], "state": "succeeded", "summary": "3 notifications inserted for 5 members"
    }  # fmt: skip
    assert int(redis.hget(one.key, "successful_job_count") or 300) == 300
    assert redis.ttl(f"rq:job:{job.id}") <= registries.RESULT_SECONDS


def test_jobs_of_slices_are_shown(api, cast, redis, set_slice_size):
    set_slice_size(2)
    _, run_id = write(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    run_worker()
    assert Run.get_by_id(run_id).state == "succeeded"
    assert_consistent(redis)
    slices = listed(api, cast, "bulk", "finished")
    assert len(slices) == 3
    assert all(job_id.startswith(f"slice-{run_id}-") for job_id in slices)


def test_a_failure_its_retries_and_the_final_failure_are_shown(api, cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    queues.enqueue_run(run_id)
    with fault_on_insert():
        run_worker()
        assert (Run.get_by_id(run_id).state, in_registries()["scheduled"]) == ("queued", {job_id})
        while Run.get_by_id(run_id).state != "failed":
            redis.zadd("rq:scheduled:notifications", {job_id: 0})
            queues.queue().scheduled_job_registry.remove(job_id)
            redis.rpush(queues.queue().key, job_id)
            run_worker()
    assert_consistent(redis)
    assert listed(api, cast, "notifications", "failed") == [job_id]
    assert "division by zero" in queues.queue().fetch_job(job_id).latest_result().exc_string
    queues.enqueue(recovery.retry_failed([run_id]))
    assert in_registries()["failed"] == set()
    run_worker()
    assert Run.get_by_id(run_id).state == "succeeded"
    assert_consistent(redis)


def test_requeueing_a_failed_job_retries_its_run(api, cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    queues.enqueue_run(run_id)
    execute("UPDATE run SET attempts_left = 1")
    redis.hset(f"rq:job:{job_id}", "retries_left", 0)
    with fault_on_insert():
        run_worker()
    assert (Run.get_by_id(run_id).state, in_registries()["failed"]) == ("failed", {job_id})
    assert api(cast.admin).post(f"/rq/job/{job_id}/requeue").status_code == 200
    assert (Run.get_by_id(run_id).state, in_registries()["queued"], in_registries()["failed"]) == (
        "queued", {job_id}, set()
    )  # fmt: skip
    run_worker()
    assert Run.get_by_id(run_id).state == "succeeded"
    assert_consistent(redis)
    assert api(cast.admin).post(f"/rq/job/{job_id}/requeue").status_code == 409


def test_a_busy_worker_is_shown_with_its_job(api, cast, redis):
    with fault_on_insert("PERFORM pg_sleep(2);"), worker_process():
        _, run_id = write(cast.subscriber, cast.general)
        queues.enqueue_run(run_id)
        job_id = queues.run_job_id(run_id)
        wait_until(lambda: in_registries()["started"] == {job_id}, "the job to be started")
        assert [job["id"] for job in _started(api, cast)] == [job_id]
        [shown] = api(cast.admin).get("/rq/0/data/workers.json").get_json()["workers"]
        assert (shown["state"], shown["current_job"]["job_id"]) == ("busy", job_id)
        wait_until(lambda: in_registries()["finished"] == {job_id}, "the job to be finished")
    assert_consistent(redis)


def _started(api, cast) -> list[dict]:
    return api(cast.admin).get("/rq/0/data/jobs/notifications/started/100/asc/1.json").get_json()["jobs"]


def test_a_job_of_a_dead_worker_is_not_shown_as_started_after_its_run_succeeded(cast, redis):
    with worker_process() as process:
        with fault_on_insert("PERFORM pg_sleep(2);"):
            _, run_id = write(cast.subscriber, cast.general)
            queues.enqueue_run(run_id)
            wait_until(lambda: in_registries()["started"] != set(), "the job to be started")
            [horse] = horses_of(process.pid)
            os.kill(horse, signal.SIGKILL)
        wait_until(lambda: Run.get_by_id(run_id).state == "succeeded", "another attempt to succeed", 60)
        wait_until(lambda: in_registries()["finished"] != set(), "the job to be finished")
    assert_consistent(redis)


def other_worker(redis: Redis) -> worker.BelfryWorker:
    return worker.BelfryWorker([queues.queue(name, redis) for name in queues.QUEUES], connection=redis)


def test_a_job_that_another_worker_has_in_a_batch_is_recorded_by_that_worker_only(cast, redis, at_failpoint):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    queues.enqueue_run(run_id)
    other = other_worker(redis)
    record = registries.BatchRecord(other, queues.queue())
    claimed: list[int] = []

    def claim_it() -> None:
        claimed.extend(jobs.claim_batch(run_id))
        record.start([job_id], 60)

    at_failpoint("worker.dequeued", claim_it)
    with psycopg.connect(settings.database_url) as session:  # the other worker's, which has locked the run
        at_failpoint("job.begun", lambda: claimed and session.execute("SELECT FROM run FOR NO KEY UPDATE SKIP LOCKED"))
        dequeued_by = run_worker()
    assert (claimed, Run.get_by_id(run_id).state) == ([run_id], "running")
    assert (in_registries()["started"], in_registries()["finished"]) == ({job_id}, set())
    record.end({job_id: jobs.run_batch(claimed)[run_id]})
    assert_consistent(redis)
    assert redis.hget(other.key, "successful_job_count") == b"1"
    assert redis.hget(dequeued_by.key, "successful_job_count") is None


def test_a_job_that_another_worker_has_finished_is_not_counted_again(cast, redis, at_failpoint):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    queues.enqueue_run(run_id)
    record = registries.BatchRecord(other_worker(redis), queues.queue())

    def finish_it() -> None:
        record.start([job_id], 60)
        record.end({job_id: jobs.run_batch(jobs.claim_batch(run_id))[run_id]})

    at_failpoint("worker.dequeued", finish_it)
    run_worker()
    assert_consistent(redis)
    assert len(queues.queue().fetch_job(job_id).results()) == 1


def test_the_end_of_a_batch_removes_only_its_own_executions(cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    queues.enqueue_run(run_id)
    overtaken, newer = (registries.BatchRecord(other_worker(redis), queues.queue()) for _ in range(2))
    overtaken.start([job_id], 60)
    newer.start([job_id], 60)
    overtaken.end({job_id: None})
    [entry] = redis.zrange("rq:wip:notifications", 0, -1)
    assert redis.zrange(f"rq:executions:{job_id}", 0, -1) == [entry.split(b":")[1]]
    newer.end({job_id: {"run": run_id}})
    assert in_registries()["started"] == set()
    assert redis.keys("rq:execution*") == []


def test_runs_of_a_failed_batch_that_another_worker_took_over_are_left_to_it(cast, redis, at_failpoint):
    runs = [write(cast.subscriber, cast.general)[1] for _ in range(3)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    taken_over = runs[1]

    failures = iter([RuntimeError("the batch fails")])

    def fail_the_batch() -> None:
        for failure in failures:
            redis.hset(f"rq:job:{queues.run_job_id(taken_over)}", "worker_name", "another")
            raise failure

    at_failpoint("run.counted", fail_the_batch)
    run_worker()
    states = {run.id: run.state for run in Run.select()}
    assert states == {runs[0]: "succeeded", taken_over: "running", runs[2]: "succeeded"}
    assert in_registries()["finished"] == {queues.run_job_id(run_id) for run_id in (runs[0], runs[2])}


def test_a_second_job_of_a_failed_run_fails_with_the_error_of_the_run(cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    execute("UPDATE run SET state = 'failed', error = 'the disk is full', finished_at = now(), sweep_after = NULL")
    queues.enqueue_run(run_id)
    run_worker()
    assert_consistent(redis)
    assert in_registries()["failed"] == {job_id}
    assert "FailedRunError: the disk is full" in queues.queue().fetch_job(job_id).latest_result().exc_string


def test_a_due_retry_goes_to_the_front_of_the_queue(cast, redis):
    failing, waiting = (write(cast.subscriber, cast.general)[1] for _ in range(2))
    queues.enqueue_run(failing)
    with fault_on_insert():
        run_worker()
    queues.enqueue_run(waiting)
    redis.zadd("rq:scheduled:notifications", {queues.run_job_id(failing): 0})
    assert maintenance.sweep() == 1
    assert queues.queue().get_job_ids() == [queues.run_job_id(failing), queues.run_job_id(waiting)]


def test_jobs_that_wait_for_their_retry_count_towards_the_length_of_the_queue(cast, redis, override):
    override(max_queue_length=2, queue_full_recheck_seconds=0.0)
    redis.zadd("rq:scheduled:notifications", {"run-999": 9e9})
    assert queues.enqueue_run(write(cast.subscriber, cast.general)[1])
    assert not queues.enqueue_run(write(cast.subscriber, cast.general)[1]), "the queue is full"
    assert maintenance.sweep() == 0
    redis.delete("rq:scheduled:notifications")
    assert maintenance.sweep() == 1


def test_a_job_that_nobody_takes_expires_after_the_longest_time_that_a_failed_one_is_kept(cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    seconds = redis.ttl(f"rq:job:{queues.run_job_id(run_id)}")
    assert registries.FAILURE_SECONDS < seconds <= 2 * registries.FAILURE_SECONDS


def test_an_error_in_the_record_of_the_start_of_a_batch_does_not_prevent_its_end(cast, redis, at_failpoint, caplog):
    queues.enqueue_run(write(cast.subscriber, cast.general)[1])
    run_worker()  # Redis knows the script then
    _, run_id = write(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    redis.set("rq:wip:notifications", "not a sorted set")
    at_failpoint("run.committed", lambda: redis.delete("rq:wip:notifications"))
    run_worker()
    assert "the start of a batch could not be recorded" in caplog.text
    assert_consistent(redis)


def test_failed_jobs_are_kept_up_to_the_limit(cast, redis, override):
    runs = [write(cast.subscriber, cast.general)[1] for _ in range(4)]
    execute("UPDATE run SET attempts_left = 1")
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    override(max_ended_jobs=2)
    with fault_on_insert():
        run_worker()
    assert len(in_registries()["failed"]) == 2
    assert len(redis.keys("rq:job:*")) == 2
    assert sum(run.state == "failed" for run in Run.select()) == 4, "the database has all of them"


def test_finished_jobs_are_kept_up_to_the_limit(cast, redis, override):
    override(max_ended_jobs=5)
    runs = [write(cast.subscriber, cast.general)[1] for _ in range(12)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    run_worker()
    assert len(in_registries()["finished"]) == 5
    assert len(redis.keys("rq:job:*")) == len(redis.keys("rq:results:*")) == 5


def test_a_job_that_is_deleted_during_its_batch_leaves_no_record(cast, redis, at_failpoint):
    _, run_id = write(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    at_failpoint("run.committed", lambda: redis.delete(f"rq:job:{queues.run_job_id(run_id)}"))
    run_worker()
    assert Run.get_by_id(run_id).state == "succeeded"
    assert (in_registries()["finished"], in_registries()["started"]) == (set(), set())
    assert redis.keys("rq:job:*") == redis.keys("rq:execution*") == []
