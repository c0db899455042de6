"""From a request to a notification through real processes: a web process, Redis, and a separate worker."""

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from redis import Redis
from redis.connection import AbstractConnection
from redis.exceptions import RedisError
from rq import Worker
from rq.exceptions import StopRequested

import jobs
from belfry.core.db import execute, fetch_one
from belfry.fanout.claims import WorkItem
from belfry.integrity.verification import verify
from belfry.messages import messages
from belfry.queue import queues
from belfry.worker import maintenance, supervisor, worker
from belfry.worker.deadline import KILL_GRACE_SECONDS, Deadline
from config import settings, tuning
from models import Notification, Run
from tests.fanout_helpers import add_members, fault_on_insert, process_next, remaining_work_items, statements
from tests.fanout_helpers import post as write
from tests.processes import RQ_WORKER, open_redis_proxy, running, wait_until, web_process, worker_process

pytestmark = pytest.mark.slow


def post(address: str, token: str, channel_id: int, content: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/api/messages",
        json.dumps({"channel_id": channel_id, "content": content}).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return response.status, json.load(response)


def state_of(run_id: int) -> str:
    return str(Run.get_by_id(run_id).state)


def notified_of(message_id: int) -> set[int]:
    return {notified.user_id for notified in Notification.select().where(Notification.message_id == message_id)}


def test_a_message_reaches_the_inbox_through_web_queue_and_worker(cast, redis):
    with web_process() as address, worker_process() as process:
        status, message = post(address, cast.subscriber.token, cast.general, "gold breaks out, @vera")
        assert status == 201
        wait_until(lambda: state_of(message["run"]["id"]) == "succeeded", "the run to succeed")
        assert notified_of(message["id"]) == {cast.admin.id, cast.moderator.id, cast.vip.id}

        done = next(line for line in process.lines() if line["message"] == f"run {message['run']['id']}: done")
        assert done["run_id"] == message["run"]["id"]
        assert done["job_id"]
        job_id = queues.run_job_id(message["run"]["id"])
        finished = queues.queue().finished_job_registry
        wait_until(lambda: finished.get_job_ids() == [job_id], "RQ to record that the job is finished")
        result = queues.queue().fetch_job(job_id).latest_result()
        assert result.return_value["run"] == message["run"]["id"]


def test_an_error_is_recorded_on_the_run_which_is_retried_until_it_succeeds(cast):
    with web_process() as address, worker_process() as process:
        with fault_on_insert("RAISE EXCEPTION 'the disk is full';"):
            _, message = post(address, cast.subscriber.token, cast.general, "gold")
            run_id = message["run"]["id"]
            wait_until(lambda: Run.get_by_id(run_id).error, "the failure to be recorded")
            failed = Run.get_by_id(run_id)
            assert "the disk is full" in failed.error
            assert failed.state == "queued"
            assert notified_of(message["id"]) == set()
        wait_until(lambda: state_of(run_id) == "succeeded", "the retry to succeed")
        retried = Run.get_by_id(run_id)
        assert retried.attempts >= 2
        assert retried.error is None
        assert notified_of(message["id"]) == {cast.admin.id, cast.moderator.id, cast.vip.id}
        job_ids = {line["job_id"] for line in process.lines() if line.get("run_id") == run_id}
        assert len(job_ids) == 1, "RQ retried the job: the sweeper would have created another one"


def test_posting_answers_201_while_redis_is_unavailable_and_the_sweeper_finds_the_run(cast, redis):
    with open_redis_proxy(os.environ["REDIS_URL"]) as proxy:
        behind = {"REDIS_URL": proxy.url}
        with web_process(**behind) as address, worker_process(**behind) as process:
            proxy.cut_connections()
            posted = [post(address, cast.subscriber.token, cast.general, f"gold {number}") for number in range(3)]
            assert [status for status, _ in posted] == [201, 201, 201]
            assert {message["run"]["state"] for _, message in posted} == {"pending"}
            assert {run.state for run in Run.select()} == {"pending"}
            redis.flushdb()
            proxy.accept_connections()
            wait_until(lambda: {run.state for run in Run.select()} == {"succeeded"}, "the sweeper to find the runs", 60)
            for _, message in posted:
                assert notified_of(message["id"]) == {cast.admin.id, cast.moderator.id, cast.vip.id}
            assert process.running()


def test_a_worker_that_starts_before_redis_waits_for_it(cast):
    with open_redis_proxy(os.environ["REDIS_URL"]) as proxy:
        proxy.cut_connections()
        with running(["flask", "--app", "app", "worker"], REDIS_URL=proxy.url, SWEEP_INTERVAL_SECONDS="1") as process:
            wait_until(lambda: "Redis is unavailable" in process.log(), "the worker to report it")
            proxy.accept_connections()
            wait_until(lambda: "Listening on" in process.log(), "the worker to listen")


def test_sigterm_finishes_the_current_job(api, cast):
    with worker_process() as process, fault_on_insert("PERFORM pg_sleep(2);"):
        message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
        run_id = message.get_json()["run"]["id"]
        wait_until(_is_sleeping_in_the_database, "the worker to process the job")
        # As Heroku does: to every process of the dyno, including the work-horse.
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert state_of(run_id) == "succeeded"
        assert notified_of(message.get_json()["id"]) == {cast.admin.id, cast.moderator.id, cast.vip.id}


def _is_sleeping_in_the_database() -> bool:
    found = fetch_one(
        "SELECT count(*) AS sessions FROM pg_stat_activity"
        " WHERE wait_event = 'PgSleep' AND datname = current_database()"
    )
    return bool(found and found["sessions"])


def test_sigterm_ends_a_worker_that_has_lost_redis():
    with open_redis_proxy(os.environ["REDIS_URL"]) as proxy, worker_process(REDIS_URL=proxy.url) as process:
        proxy.cut_connections()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0


def test_sigterm_is_repeated_for_a_worker_that_keeps_running_but_not_during_a_job(redis, monkeypatch):
    horse = worker.BelfryWorker([queues.queue()], connection=redis)
    with pytest.raises(StopRequested):
        horse.request_stop(signal.SIGTERM, None)
    horse.request_stop(signal.SIGTERM, None)  # the worker is stopping
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + tuning.stop_retry_seconds + 0.1)
    with pytest.raises(StopRequested):
        horse.request_stop(signal.SIGTERM, None)
    another = worker.BelfryWorker([queues.queue()], connection=redis)
    another._busy = True
    another.request_stop(signal.SIGTERM, None)
    assert another._stop_requested
    another._busy = False
    another.request_stop(signal.SIGTERM, None)  # the job is done and the worker is stopping
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    with pytest.raises(StopRequested):
        another.request_stop(signal.SIGTERM, None)


def test_no_notification_is_lost_when_a_work_horse_is_killed(api, cast):
    with worker_process() as process, fault_on_insert("PERFORM pg_sleep(1);"):
        message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
        run_id = message.get_json()["run"]["id"]
        wait_until(_is_sleeping_in_the_database, "the worker to process the job")
        horse = max(psutil.Process(process.pid).children(), key=lambda child: child.create_time())
        horse.kill()
        wait_until(lambda: state_of(run_id) == "succeeded", "another attempt to succeed", 60)
    assert Run.get_by_id(run_id).attempts == 2
    assert notified_of(message.get_json()["id"]) == {cast.admin.id, cast.moderator.id, cast.vip.id}


def test_a_plain_rq_worker_can_run_the_jobs(api, cast):
    message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    with running(
        [*RQ_WORKER, "--burst", "-u", os.environ["REDIS_URL"], *queues.QUEUES]
    ) as process:
        assert process.wait(60) == 0
    assert state_of(message.get_json()["run"]["id"]) == "succeeded"


def test_the_burst_worker_ends_when_the_queues_are_empty(api, cast):
    message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    with running(["flask", "--app", "app", "worker", "--burst"]) as process:
        assert process.wait(60) == 0
    assert state_of(message.get_json()["run"]["id"]) == "succeeded"


def test_the_sweeper_survives_an_unexpected_error(monkeypatch, caplog):
    def fail() -> None:
        raise RuntimeError("no such table")

    monkeypatch.setattr(maintenance, "sweep", fail)
    supervisor.sweep_once()
    assert "the sweep failed" in caplog.text


def test_small_messages_have_priority_and_do_not_starve_a_large_one(cast, set_slice_size, at_failpoint, override):
    add_members(cast.server_id, 20)
    set_slice_size(5)
    _, large = write(cast.subscriber, cast.general)
    process_next(large)
    slices = remaining_work_items(large)
    assert len(slices) == 5
    queues.enqueue(slices)
    small = [write(cast.subscriber, cast.general)[1] for _ in range(20)]
    queues.enqueue([WorkItem(run_id) for run_id in small])
    override(max_batch_runs=0)
    set_slice_size(100)
    claimed: list[str] = []
    at_failpoint("run.claimed", lambda: claimed.append("run"))
    at_failpoint("slice.claimed", lambda: claimed.append("slice"))
    supervisor.work(burst=True)
    assert claimed[:7] == ["run"] * 3 + ["slice"] + ["run"] * 3
    assert claimed.count("slice") == 5
    assert claimed[-1] == "run"


def test_the_burst_worker_sweeps_until_no_run_is_pending(cast, override):
    override(max_queue_length=2, queue_full_recheck_seconds=0)
    for _ in range(5):
        queues.enqueue_run(write(cast.subscriber, cast.general)[1])
    assert queues.queue().count == 2
    supervisor.work(burst=True)
    assert {run.state for run in Run.select()} == {"succeeded"}


def horses_of(pid: int) -> list[int]:
    """The running work-horses of a worker; a process that created an index may wait to be reaped."""
    return [child.pid for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_worker_leaves_no_process_behind():
    with worker_process() as process:
        horses = horses_of(process.pid)
        assert len(horses) == 1
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(horses[0]), "its work-horse to end")


def test_a_work_horse_that_dies_is_replaced(cast):
    with worker_process() as process:
        (horse,) = horses_of(process.pid)
        os.kill(horse, signal.SIGKILL)
        wait_until(lambda: horses_of(process.pid) not in ([], [horse]), "another work-horse")
        assert "the work-horse ended with signal 9 and is replaced" in process.log()
        _, run_id = write(cast.subscriber, cast.general)
        queues.enqueue_run(run_id)
        wait_until(lambda: state_of(run_id) == "succeeded", "the run to succeed")


def test_a_job_that_ignores_signals_is_killed_with_its_process(cast, override):
    """RQ interrupts a job by a signal, which this job ignores."""
    override(job_timeout_seconds=1)
    with worker_process(through=("tests.faults.hanging_fanout",)) as process:
        (horse,) = horses_of(process.pid)
        _, run_id = write(cast.subscriber, cast.general, "deaf")
        queues.enqueue_run(run_id)
        wait_until(lambda: horses_of(process.pid) not in ([], [horse]), "another work-horse", 60)
        assert "its process is killed" in process.log()
    with worker_process():
        wait_until(lambda: state_of(run_id) == "succeeded", "the run to succeed")


def test_a_work_horse_ends_after_the_maximum_number_of_jobs(cast, override):
    override(max_jobs_per_process=3, max_batch_runs=0)
    queues.enqueue([WorkItem(write(cast.subscriber, cast.general)[1]) for _ in range(5)])
    assert worker.run_jobs()
    assert queues.queue().count == 2


def test_a_deadline_expires_only_while_a_job_runs():
    deadline = Deadline()
    assert not deadline.has_passed()
    deadline.set(-KILL_GRACE_SECONDS - 1)
    assert deadline.has_passed()
    deadline.clear()
    assert not deadline.has_passed()
    deadline.set(0)
    assert not deadline.has_passed()


def run_worker(at_most: int | None = None) -> None:
    """Run a Belfry worker in this process until the queue is empty or it has run `at_most` jobs."""
    with Redis.from_url(settings.redis_url) as connection:
        one = worker.BelfryWorker([queues.queue(queues.NOTIFICATIONS, connection)], connection=connection)
        one.log_result_lifespan = False
        one.work(burst=True, max_jobs=at_most, logging_level=None)


def test_small_runs_that_wait_are_processed_in_one_batch(cast, run_jobs):
    """One job processes them in one transaction; edits, test messages and retries are processed separately."""
    runs = [write(cast.subscriber, cast.general, f"gold {number}, @vera")[1] for number in range(30)]
    message_id, first = write(cast.moderator, cast.general, "silver")
    runs += [first, messages.edit_message(cast.moderator.user, message_id, "@vera").run_id]
    execute("UPDATE run SET attempts = 1, attempts_left = 5 WHERE id = 7")
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    with statements() as executed:
        run_worker(1)
    assert sum("INSERT INTO notification" in statement for statement in executed) == 1
    assert [state_of(run_id) for run_id in runs].count("succeeded") == len(runs) - 2
    assert [job.args[0] for job in queues.queue().jobs] == [7, runs[-1]], "the jobs of the other runs are removed"
    assert run_jobs() == 0
    assert {state_of(run_id) for run_id in runs} == {"succeeded"}
    assert notified_of(message_id) == {cast.admin.id, cast.subscriber.id, cast.vip.id}
    assert verify() == []


def test_a_failing_run_of_a_batch_does_not_affect_the_others(cast, run_jobs):
    runs = [write(cast.subscriber, cast.general)[1] for _ in range(5)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    with fail_inserts_for(3):
        run_worker()
        states = [state_of(run_id) for run_id in runs]
    assert states == ["succeeded", "succeeded", "queued", "succeeded", "succeeded"]
    assert "poison" in Run.get_by_id(3).error
    assert [Run.get_by_id(run_id).attempts for run_id in runs] == [1] * 5
    execute("UPDATE run SET sweep_after = now() - interval '1 second' WHERE sweep_after IS NOT NULL")
    assert maintenance.sweep() == 1
    assert run_jobs() == 0
    assert state_of(3) == "succeeded"
    assert verify() == []


def test_large_audiences_are_not_in_a_batch_with_small_ones(cast, set_slice_size):
    set_slice_size(11)  # room for two messages to five members
    runs = [write(cast.subscriber, cast.general)[1] for _ in range(5)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    run_worker(1)
    assert [state_of(run_id) for run_id in runs] == ["succeeded"] * 2 + ["queued"] * 3
    set_slice_size(4)
    run_worker(1)
    assert [state_of(run_id) for run_id in runs] == ["succeeded"] * 2 + ["running"] + ["queued"] * 2


@contextlib.contextmanager
def fail_inserts_for(message_id: int) -> Iterator[None]:
    execute(
        "CREATE FUNCTION test_poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.message_id = {message_id} THEN RAISE EXCEPTION 'poison'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER test_poison BEFORE INSERT ON notification FOR EACH ROW EXECUTE FUNCTION test_poison()"
    )
    try:
        yield
    finally:
        execute("DROP FUNCTION test_poison CASCADE")


def test_a_large_run_notifies_mentioned_members_and_enqueues_a_job_for_each_slice(api, cast, run_jobs, set_slice_size):
    set_slice_size(2)
    message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold, @vera"})
    run_id = message.get_json()["run"]["id"]
    jobs.notify(run_id)
    assert (state_of(run_id), Run.get_by_id(run_id).members_processed) == ("running", 1)
    assert notified_of(message.get_json()["id"]) == {cast.vip.id}
    waiting = [(job.func_name, *job.args) for job in queues.queue(queues.BULK).jobs]
    assert waiting == [("jobs.notify_slice", run_id, item.after_user_id) for item in remaining_work_items(run_id)]
    assert len(waiting) == 3
    assert run_jobs() == 0
    finished = Run.get_by_id(run_id)
    assert (finished.state, finished.members_processed, finished.members_total) == ("succeeded", 5, 5)
    assert notified_of(message.get_json()["id"]) == {cast.admin.id, cast.moderator.id, cast.vip.id}


def test_a_job_does_not_claim_a_run_that_another_session_has_locked(api, cast, in_another_session):
    api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    with in_another_session("SELECT FROM run FOR NO KEY UPDATE"):
        jobs.notify(1)
    assert (state_of(1), Run.get_by_id(1).attempts) == ("queued", 0)


def test_an_overtaken_job_logs_that_it_was_overtaken_and_not_that_it_is_done(cast, at_failpoint, caplog):
    _, run_id = write(cast.subscriber, cast.general)
    at_failpoint("run.claimed", lambda: execute("UPDATE run SET attempts = attempts + 1"))
    with caplog.at_level("INFO"):
        jobs.notify(run_id)
    assert f"run {run_id}: attempt 1 was overtaken" in caplog.text
    assert "done" not in caplog.text


def test_an_author_does_not_see_the_details_of_an_error(api, cast):
    message = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    execute("UPDATE run SET error = 'connection to 10.0.0.7 failed'")
    url = message.get_json()["run"]["url"]
    assert "10.0.0.7" not in api(cast.subscriber).get(url).get_json()["error"]
    assert "10.0.0.7" in api(cast.admin).get(url).get_json()["error"]


def test_a_heartbeat_takes_one_round_trip_and_extends_the_expiry_of_the_worker(redis, monkeypatch):
    one = worker.BelfryWorker([queues.queue()], connection=redis)
    one.register_birth()
    redis.expire(one.key, 1)
    sent = []
    send = AbstractConnection.send_packed_command

    def record(connection, command, **options):
        sent.append(command)
        return send(connection, command, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", record)
    one.heartbeat()
    assert len(sent) == 1
    assert redis.ttl(one.key) > 60
    one.register_death()


def test_a_worker_is_registered_again_after_redis_lost_its_data(redis):
    one = worker.BelfryWorker([queues.queue()], connection=redis)
    one.register_birth()
    redis.flushdb()
    one.heartbeat()
    assert [found.name for found in Worker.all(connection=redis)] == [one.name]
    assert redis.hget(one.key, "birth")
    assert redis.ttl(one.key) > 60
    one.register_death()


def test_the_lock_on_cleaning_a_queue_is_released_after_an_error(redis):
    one = worker.BelfryWorker([queues.queue(name, redis) for name in queues.QUEUES], connection=redis)
    redis.zadd("rq:wip:notifications", {b"\xff": 1})  # RQ reads the entries as UTF-8
    one.run_maintenance_tasks()
    assert redis.keys("rq:clean*") == []


def test_the_thread_that_listens_for_commands_ends_where_redis_was_lost(redis, cast, at_failpoint):
    queues.enqueue_run(write(cast.subscriber, cast.general)[1])
    with Redis.from_url(settings.redis_url) as connection:
        pool = connection.connection_pool

        def lose_redis() -> None:
            pool.connection_kwargs["path"] = "/nonexistent"
            pool.reset()

        one = worker.BelfryWorker([queues.queue(name, connection) for name in queues.QUEUES], connection=connection)
        at_failpoint("worker.dequeued", lose_redis)
        with pytest.raises(RedisError):
            one.work(burst=True, logging_level=None)
        assert not one.pubsub_thread._running.is_set()
