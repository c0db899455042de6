"""Belfry's worker: RQ's SimpleWorker, which processes small runs in batches.

RQ's own worker forks for each job, which takes 25 ms, as long as notifying for 25 small messages. Here one process, the
work-horse, runs job after job. What a fork for each job guarantees is kept in other ways:

- RQ interrupts a job that exceeds its time-out; where that fails, the parent kills the process.
- A job that kills the process does not stop the others: the parent starts another process within 0.1 s, or after the
  sweep that it runs at that moment. The lock on the work item, its lease, ends with the process's connection.
- Memory is bounded: after `tuning.max_jobs_per_process` jobs, where a batch counts as one, the process is replaced.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import SimpleWorker, worker_registration
from rq.exceptions import InvalidJobOperation, StopRequested
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.timeouts import JobTimeoutException
from rq.utils import now

import jobs
from belfry.core.failpoints import failpoint
from belfry.queue import queues
from belfry.queue.job_class import BelfryJob
from belfry.queue.registries import BatchRecord, load_scripts, trim
from belfry.worker.deadline import Deadline
from config import settings, tuning

log = logging.getLogger(__name__)

BULK_EVERY_NTH = 4  # every 4th job may come from another queue while some wait in the first


class BelfryWorker(SimpleWorker):  # type: ignore[misc]
    """RQ's worker that runs its jobs in its own process, with checked jobs only."""

    job_class = BelfryJob
    max_connection_wait_time = 5.0  # seconds between attempts to reach Redis; RQ's own limit is a minute
    asked_to_stop = False
    deadline: Deadline | None = None
    dequeued = 0
    _busy = False
    _stop_ignored_until = 0.0  # `time.monotonic()`

    def request_stop(self, signum: int, frame: object) -> None:
        """Stop after the current job. Further signals do not interrupt it: Heroku signals each process of a dyno.

        An idle worker waits in a blocking call to Redis, which only an exception ends, so this raises StopRequested as
        RQ does. The interrupted code may swallow the exception, as logging does; so a signal that comes
        `tuning.stop_retry_seconds` later raises it again. Signals before that are ignored, because the worker
        unregisters from Redis.
        """
        if not self.asked_to_stop:
            self.asked_to_stop = True
            self.handle_warm_shutdown_request()
        self._stop_requested = True  # RQ's handler writes to Redis first, which may be unavailable
        if not self._busy and time.monotonic() < self._stop_ignored_until:
            return
        self._stop_ignored_until = time.monotonic() + tuning.stop_retry_seconds
        if not self._busy:
            raise StopRequested

    def register_birth(self) -> None:
        super().register_birth()
        load_scripts(self.connection)

    def dequeue_job_and_maintain_ttl(self, *arguments: Any) -> Any:
        while True:
            try:
                return super().dequeue_job_and_maintain_ttl(*arguments)
            except UnicodeDecodeError as error:  # RQ has removed the entry, and would end the worker
                log.error("an entry of a queue is not a job id and is dropped: %a", error.object[:100])

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Extend the worker's life as RQ does, in one round trip in place of three, because it precedes each job.

        Where Redis has lost the worker, as after a restart without its data, the worker is registered again.
        """
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)
            return
        with self.connection.pipeline(transaction=False) as own_pipeline:
            super().heartbeat(timeout, own_pipeline)
            is_new = own_pipeline.execute()[0]
        if is_new:
            self.connection.hset(self.key, mapping=self.serialize())
            worker_registration.register(self)
            load_scripts(self.connection)

    def run_maintenance_tasks(self) -> None:
        """Clean RQ's registries. Entries that RQ cannot read do not stop the worker."""
        try:
            super().run_maintenance_tasks()
        except (StopRequested, RedisConnectionError, RedisTimeoutError):
            raise
        except Exception:
            self.last_cleaned_at = now()
            log.exception("RQ's registries could not be cleaned")
            with _without_redis():
                for queue in self.queues:  # RQ keeps the lock of the queue that failed, for 15 minutes
                    queue.release_maintenance_lock()

    def teardown(self) -> None:
        """Unregister as RQ does. Where Redis is unavailable, RQ would leave the thread that listens for commands."""
        try:
            super().teardown()
        finally:
            if self.pubsub_thread:
                self.pubsub_thread.stop()

    def reorder_queues(self, reference_queue: Queue) -> None:
        """Serve the first queue first, but last for one job in BULK_EVERY_NTH, so that others are not starved."""
        self.dequeued += 1
        first, *others = self.queues
        others_turn = self.dequeued % BULK_EVERY_NTH == BULK_EVERY_NTH - 1
        self._ordered_queues = [*others, first] if others_turn else [first, *others]

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Process a run and the small runs behind it as a batch; run all other jobs through RQ's life cycle."""
        self._busy = True
        try:
            failpoint("worker.dequeued")
            self._limit_time(job)
            claimed = self._claim_batch(job)
            left = self._execute_batch(job, claimed, queue) if claimed else []
            if job.args[0] not in claimed and self._claim_alone(job):
                self._limit_time(job)
                super().execute_job(job, queue)
            for other in left:
                self._limit_time(other)
                other.use_attempt(1)
                super().execute_job(other, queue)
        finally:
            self._busy = False
            if self.deadline:
                self.deadline.clear()

    def _limit_time(self, job: Job) -> None:
        if self.deadline:
            self.deadline.set(job.timeout or settings.job_timeout_seconds)

    def _claim_batch(self, job: Job) -> list[int]:
        """Claim a batch; [] for a slice, and where claiming fails: the job then fails too, and RQ records it."""
        if job.func_name != "jobs.notify":
            return []
        try:
            return jobs.claim_batch(*job.args)
        except Exception as error:
            log.warning("claiming a batch failed: %s: %s", type(error).__name__, error)
            return []

    def _claim_alone(self, job: Job) -> bool:
        """Claim a job for RQ's life cycle; False where another worker has it in a batch, and writes RQ's records.

        That worker may have claimed the run after this one took the job from the queue.
        """
        if job.func_name != "jobs.notify":
            return True
        try:
            attempt, is_claimed = jobs.claim_run(*job.args)
        except Exception:
            return True  # the job fails too, and RQ records it
        if attempt is not None:
            job.use_attempt(attempt)
            return True
        if is_claimed:
            return False
        with _without_redis(), suppress(InvalidJobOperation):  # the job was deleted
            return bool(job.get_status() == JobStatus.QUEUED)
        return False

    def _execute_batch(self, job: Job, run_ids: list[int], queue: Queue) -> list[BelfryJob]:
        """Process a claimed batch; the jobs of the runs that must be processed one by one.

        RQ's records are written once before and once after it; without Redis the work continues without them.
        """
        job_ids = {queues.run_job_id(run_id): run_id for run_id in run_ids}
        record, timeout = BatchRecord(self, queue), job.timeout or settings.job_timeout_seconds
        results: dict[int, jobs.Result] = {}
        error: BaseException | None = None
        with _without_redis():
            record.start(list(job_ids), timeout + 60)
        try:
            with self.death_penalty_class(timeout, JobTimeoutException, job_id=job.id):
                results = jobs.run_batch(run_ids)
        except (JobTimeoutException, OperationalError, InterfaceError) as caught:
            error = caught  # not the fault of one run: RQ retries each, or the sweeper finds it
            log.warning("a batch of %s runs was interrupted: %s: %s", len(run_ids), type(error).__name__, error)
        except Exception as caught:
            log.warning(
                "a batch of %s runs failed, so they are processed one by one: %s: %s",
                len(run_ids), type(caught).__name__, caught,
            )  # fmt: skip
        left: list[BelfryJob] = []
        with _without_redis():
            record.end({job_id: results.get(run_id) for job_id, run_id in job_ids.items()})
            trim(self.connection, queue)
            remaining = [job_id for job_id, run_id in job_ids.items() if run_id not in results]
            found = BelfryJob.fetch_many(remaining, self.connection) if remaining else []
            # A job that another worker has taken over is that worker's.
            left = [one for one in found if one and one.worker_name == self.name]
            if error is not None:
                for one in left:
                    execution = self.prepare_execution(one)
                    self._finalize_failure(one, queue, execution, (type(error), error, error.__traceback__))
                left = []
        return left

    def handle_job_success(self, job: Job, queue: Queue, *arguments: Any, **named: Any) -> None:
        """Record a success as RQ does, and delete the oldest jobs beyond the limit."""
        super().handle_job_success(job, queue, *arguments, **named)
        with _without_redis():
            trim(self.connection, queue)

    def handle_job_failure(self, job: Job, queue: Queue, *arguments: Any, **named: Any) -> None:
        """Record a failure as RQ does, and delete the oldest jobs beyond the limit."""
        super().handle_job_failure(job, queue, *arguments, **named)
        with _without_redis():
            trim(self.connection, queue)


@contextmanager
def _without_redis() -> Iterator[None]:
    """Continue where Redis fails: PostgreSQL holds the truth, and RQ's records are corrected later."""
    try:
        yield
    except RedisError as error:
        log.warning("Redis failed, RQ's records are incomplete: %s", error)


def run_jobs(deadline: Deadline | None = None, burst: bool = False) -> bool:
    """Run jobs until a signal, or until `max_jobs_per_process` are done; with `burst`, until the queues are empty.

    False after a signal.
    """
    # Its own connection: RQ waits on it for minutes, which the short time-outs of requests would end.
    connection = Redis.from_url(settings.redis_url, socket_connect_timeout=5)
    worker = None
    try:
        while True:
            try:
                worker = BelfryWorker(
                    [queues.queue(name, connection) for name in queues.QUEUES],
                    connection=connection,
                    serializer="json",
                    worker_ttl=30,
                    maintenance_interval=10,
                    job_monitoring_interval=5,
                )
                worker.deadline = deadline
                worker.log_result_lifespan = False
                worker.work(burst=burst, logging_level=None, max_jobs=None if burst else tuning.max_jobs_per_process)
                if burst or worker.dequeued >= tuning.max_jobs_per_process:
                    return not worker.asked_to_stop
            except RedisError as error:
                log.warning("Redis is unavailable: %s", error)
            if worker and worker.asked_to_stop:
                return False
            time.sleep(1)
    except StopRequested:
        return False  # raised while waiting for Redis
