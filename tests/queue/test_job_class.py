"""A job in Redis can call only an entry point of jobs.py with ids."""

import inspect
import json
import os
import re
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError
from rq import Queue, SimpleWorker
from rq.exceptions import NoSuchJobError
from rq.job import Job

import jobs
from belfry.core.db import LARGEST_ID
from belfry.fanout.claims import WorkItem
from belfry.queue import job_class, queues
from belfry.queue.job_class import BelfryJob
from config import settings
from models import Run
from tests.fanout_helpers import post
from tests.processes import RQ_WORKER, running, wait_until, worker_process
from tests.worker.test_worker import horses_of

pytestmark = pytest.mark.slow

CREATE_MARK = "tests.faults.forbidden_function.create_mark"
NOW = "2026-11-26T12:00:00.000000Z"


def call(function: object, *arguments: object, instance: object = None, options: object = None) -> bytes:
    return zlib.compress(json.dumps([function, instance, arguments, {} if options is None else options]).encode())


def fields(**changed: Any) -> dict[str, Any]:
    """The stored fields of a job for a run that does not exist."""
    return {
        "created_at": NOW, "enqueued_at": NOW, "data": call("jobs.notify", 999), "origin": "notifications",
        "description": "run 999", "status": "queued", "timeout": 300, "result_ttl": 0,
    } | changed  # fmt: skip


def write(redis: Redis, job_id: str, **changed: Any) -> None:
    redis.hset(f"rq:job:{job_id}", mapping=fields(**changed))


def test_the_entry_points_match_the_functions_of_jobs_py():
    for name, ids in job_class.ENTRY_POINTS.items():
        module, _, function = name.partition(".")
        assert module == "jobs"
        parameters = inspect.signature(getattr(jobs, function)).parameters.values()
        assert [one.name for one in parameters if one.default is one.empty] == ["run_id", "after_user_id"][:ids]


def decompression_bomb() -> bytes:
    """150 KB that decompress to 150 MB."""
    return zlib.compress(b" " * 150_000_000, 9)


REJECTED: list[dict[str, Any]] = [
    {"data": call("os.system", "true")},
    {"data": json.dumps(["os.system", None, ["true"], {}])},  # RQ also accepts uncompressed data
    {"data": call("jobs.sweep")},
    {"data": call(["jobs.notify"], 7)},
    {"data": call("jobs.notify")},
    {"data": call("jobs.notify", 7, 8)},
    {"data": call("jobs.notify_slice", 7)},
    {"data": call("jobs.notify", "7")},
    {"data": call("jobs.notify", True)},
    {"data": call("jobs.notify", 7.0)},
    {"data": call("jobs.notify", -1)},
    {"data": call("jobs.notify", LARGEST_ID + 1)},
    {"data": call("jobs.notify", 7, instance="os")},
    {"data": call("jobs.notify", 7, options={"run_id": 7})},
    {"data": call("jobs.notify", 7, options=[])},
    {"data": b""},
    {"data": b"\x80\x04N."},
    {"data": b"[" * 200},
    {"data": b'{"a": 1, "b": 2, "c": 3, "d": 4}'},
    {"data": decompression_bomb()},
    {"success_callback_name": CREATE_MARK},
    {"failure_callback_name": "builtins.print"},
    {"stopped_callback_name": CREATE_MARK},
    {"webhooks": json.dumps([{"url": "http://127.0.0.1:1/", "job_status": "finished"}])},
    {"dependency_id": "run-1"},
    {"dependency_ids": '["run-1"]'},
    {"group_id": "one"},
    {"repeats_left": 9},
    {"rate_limit_key": "one"},
    {"meta": "{}"},
    {"result": "1"},
    {"of_a_later_version": "1"},
    {"timeout": -1},
    {"timeout": 10**18},
    {"timeout": "1h"},
    {"retries_left": 10**6},
    {"retry_intervals": "[]"},
    {"retry_intervals": "[-1]"},
    {"origin": "elsewhere"},
    {"status": "nothing"},
    {"created_at": "yesterday"},
    {"created_at": "2026-13-26T12:00:00Z"},
    {"worker_name": b"\xff"},
    {"description": "\x1b[31m\n2026-11-26 CRITICAL"},
    {"description": "x" * 10_000},
]  # fmt: skip


@pytest.mark.parametrize("changed", REJECTED, ids=lambda changed: next(iter(changed)))
def test_a_job_that_is_not_a_call_of_an_entry_point_with_ids_is_reported_and_deleted(redis, caplog, changed):
    write(redis, "forged-1", **changed)
    with pytest.raises(NoSuchJobError):
        BelfryJob.fetch("forged-1", redis)
    assert not redis.exists("rq:job:forged-1")
    [line] = caplog.records
    assert line.levelname == "ERROR"
    assert re.fullmatch(r"job 'forged-1' is rejected and deleted: [ -~]{1,200}", line.getMessage())


@pytest.mark.parametrize("job_id", ["a b", "\x1b[31m\n2026-11-26 CRITICAL", "\u2028" * 2000])
def test_a_job_with_an_invalid_id_is_reported_and_deleted(redis, caplog, job_id):
    redis.hset(f"rq:job:{job_id}", mapping=fields())
    with pytest.raises(NoSuchJobError):
        BelfryJob.fetch(job_id, redis)
    assert not redis.exists(f"rq:job:{job_id}")
    assert re.fullmatch(r"[ -~]{1,1000}", caplog.records[0].getMessage())


def test_a_key_that_is_not_a_hash_is_deleted_and_a_redis_error_is_raised(redis, caplog):
    redis.set("rq:job:forged-1", "not a job")
    with pytest.raises(NoSuchJobError):
        BelfryJob.fetch("forged-1", redis)
    assert not redis.exists("rq:job:forged-1")
    with pytest.raises(AuthenticationError):
        BelfryJob._accepted("run-1", AuthenticationError("WRONGPASS"), redis)


def test_a_decompression_bomb_is_not_decompressed(redis):
    data = decompression_bomb()
    assert len(job_class._decompressed(call("jobs.notify", 7))) < job_class.MAX_CALL_BYTES
    with pytest.raises(job_class.RejectedJobError, match="too long"):
        job_class._decompressed(data)


def test_each_of_several_jobs_is_checked(redis):
    write(redis, "run-1")
    write(redis, "forged-1", failure_callback_name=CREATE_MARK)
    redis.set("rq:job:forged-2", "not a job")
    found = BelfryJob.fetch_many(["run-1", "forged-1", "missing", "forged-2"], redis)
    assert [job and job.args for job in found] == [[999], None, None, None]


def test_the_checked_call_is_the_call_that_runs_and_pickle_is_never_used(redis):
    write(redis, "run-1")
    job = BelfryJob.fetch("run-1", redis, serializer="pickle")
    assert (job.func_name, job.args, job.kwargs, job.instance) == ("jobs.notify", [999], {}, None)
    assert job.func is jobs.notify
    assert job.serializer.loads(b"[1]") == [1]


def test_a_job_is_accepted_in_every_state_that_rq_stores(redis, at_failpoint):
    """Enqueued by RQ, failed, retried, finally failed, and requeued as the dashboard does."""
    made = Queue(queues.BULK, connection=redis, serializer="json", job_class=BelfryJob)
    job = made.enqueue("jobs.notify_slice", 7, 40, retry=queues.Retry(max=1), failure_ttl=600)
    wrong = SimpleWorker([made], connection=Redis.from_url(settings.redis_url), serializer="json", job_class=BelfryJob)
    at_failpoint("job.begun", lambda: 1 / 0)
    with wrong.connection:
        wrong.work(burst=True, logging_level="CRITICAL")
    assert redis.hget(f"rq:job:{job.id}", "status") == b"failed"
    assert BelfryJob.fetch(job.id, redis).args == [7, 40]
    Job.fetch(job.id, connection=redis, serializer="json").requeue()
    assert redis.hget(f"rq:job:{job.id}", "exc_info")
    assert BelfryJob.fetch(job.id, redis).is_queued


def test_a_job_with_the_largest_ids_is_accepted(redis):
    assert queues.enqueue([WorkItem(LARGEST_ID), WorkItem(LARGEST_ID, LARGEST_ID)])
    assert [job.args for job in queues.queue().jobs] == [[LARGEST_ID]]
    assert [job.args for job in queues.queue(queues.BULK).jobs] == [[LARGEST_ID, LARGEST_ID]]


def forge(redis: Redis, mark: Path) -> list[str]:
    """Write forged jobs to every place from which RQ reads jobs, as an attacker with write access; return their ids."""
    waiting = {
        "forged-system": {"data": call("os.system", f"touch {mark}")},
        "forged-function": {"data": json.dumps([CREATE_MARK, None, [], {}])},
        "forged-success": {"success_callback_name": CREATE_MARK},
        "forged-failure": {"failure_callback_name": CREATE_MARK, "data": call("jobs.notify", "no id")},
        "forged-dependency": {"dependency_ids": '["run-1"]', "success_callback_name": CREATE_MARK},
    }
    for job_id, changed in waiting.items():
        write(redis, job_id, **changed)
        redis.rpush("rq:queue:notifications", job_id)
    write(redis, "forged-started", status="started", failure_callback_name=CREATE_MARK)
    redis.zadd("rq:wip:notifications", {"forged-started:1234": 1})
    write(redis, "forged-scheduled", status="scheduled", data=call(CREATE_MARK))
    redis.zadd("rq:scheduled:notifications", {"forged-scheduled": 1})
    write(redis, "forged-ready", status="ready_to_enqueue", data=call(CREATE_MARK))
    redis.zadd("rq:ready:notifications", {"forged-ready": 1})
    write(redis, "forged-failed", status="failed", data=call(CREATE_MARK))
    redis.zadd("rq:failed:notifications", {"forged-failed": time.time() + 600})
    Job.fetch("forged-failed", connection=redis, serializer="json").requeue()
    write(redis, "forged-dependent", status="deferred", data=call(CREATE_MARK))
    redis.zadd("rq:deferred:notifications", {"forged-dependent": 1})
    for parent in ("run-1", "run-999"):
        redis.sadd(f"rq:job:{parent}:dependents", "forged-dependent")
    write(redis, "run-999")  # its run does not exist, so that the job succeeds
    redis.rpush("rq:queue:notifications", "run-999")
    return [*waiting, "forged-started", "forged-scheduled", "forged-ready", "forged-failed"]


def succeeded(run_id: int) -> bool:
    return str(Run.get_by_id(run_id).state) == "succeeded"


def test_the_worker_runs_no_forged_job_and_keeps_running(cast, redis, tmp_path):
    mark = tmp_path / "mark"
    with worker_process(MARK=str(mark)) as process:
        horses = horses_of(process.pid)
        forged = forge(redis, mark)
        _, run_id = post(cast.subscriber, cast.general)
        queues.enqueue_run(run_id)
        wait_until(lambda: succeeded(run_id), "the run behind the forged jobs to succeed")
        redis.publish(f"rq:pubsub:{next(iter(redis.smembers('rq:workers'))).decode()[10:]}", "no command")
        wait_until(lambda: not redis.keys("rq:job:forged-s*"), "the forged retry to be deleted", 60)
        wait_until(lambda: not redis.exists("rq:job:forged-started"), "RQ's clean-up of abandoned jobs", 60)
        assert not mark.exists()
        assert horses[0] in horses_of(process.pid), "the work-horse was not replaced"
        reported = {line["message"].split("'")[1] for line in process.lines() if line["level"] == "ERROR"}
        assert reported >= set(forged) - {"forged-ready"}
    assert {key.decode() for key in redis.keys("rq:job:forged*")} <= {"rq:job:forged-dependent", "rq:job:forged-ready"}


def test_a_plain_rq_worker_with_the_job_class_runs_no_forged_job(cast, redis, tmp_path):
    mark = tmp_path / "mark"
    forged = forge(redis, mark)
    _, run_id = post(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    with running(
        [*RQ_WORKER, "--burst", "--with-scheduler", "-u", os.environ["REDIS_URL"], *queues.QUEUES], MARK=str(mark)
    ) as process:
        assert process.wait(60) == 0
        log = process.log()
    assert succeeded(run_id)
    assert not mark.exists()
    assert set(re.findall(r"job '([a-z-]+)' is rejected and deleted", log)) == {*forged, "forged-dependent"}
    assert not redis.keys("rq:job:forged*")
    assert queues.queue().count == 0


def test_invalid_entries_in_the_queue_do_not_stop_the_worker(cast, redis):
    redis.set("rq:job:garbage", "not a job")
    redis.zadd("rq:wip:bulk", {"no execution": 1, b"\xff": 1})
    redis.zadd("rq:scheduled:notifications", {b"\xff": 1, "a b": 1, "garbage": 1, "missing": 1})
    with worker_process() as process:
        horses = horses_of(process.pid)
        for entry in (b"\xff", b"garbage", b"a b", b"run-" + b"9" * 5000, b"\n2026-11-26 CRITICAL"):
            redis.rpush("rq:queue:notifications", entry)
        _, run_id = post(cast.subscriber, cast.general)
        queues.enqueue_run(run_id)
        wait_until(lambda: succeeded(run_id), "the run behind the forged jobs to succeed")
        wait_until(lambda: not redis.exists("rq:scheduled:notifications"), "the registry of retries to be empty")
        assert horses[0] in horses_of(process.pid), "the work-horse was not replaced"
        assert "RQ's registries could not be cleaned" in process.log()
        assert "quitting" not in process.log()


def test_a_queue_entry_with_a_very_long_number_is_harmless(cast, redis):
    _, run_id = post(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    redis.rpush("rq:queue:notifications", b"run-" + b"9" * 5000)
    jobs.notify(run_id)
    assert succeeded(run_id)
