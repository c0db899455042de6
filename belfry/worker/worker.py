"""The worker of the Procfile: a process that does the jobs, and its parent, which sweeps and keeps one running.

RQ's own worker forks for each job: 25 ms, in which 25 messages could be told. Here the work-horse stays, and takes job
after job. What a fork a job gives is kept otherwise:

- a job that runs too long is broken off by RQ in the process, and by the parent where that does not help;
- one that kills the process takes nobody else's work with it: the parent starts another in a tenth of a second, and the
  part's lock, its lease, has ended with the process's connection;
- memory cannot grow without an end: after tuning.max_jobs_per_process jobs the process ends, and another follows.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import SimpleWorker
from rq.exceptions import StopRequested
from rq.job import Job
from rq.queue import Queue
from rq.timeouts import JobTimeoutException
from rq.utils import now

import jobs
from belfry.core.failpoints import failpoint
from belfry.queue import queues
from belfry.queue.job_class import BelfryJob
from belfry.queue.registries import BatchRecord, trim_finished
from belfry.worker.deadline import Deadline
from config import settings, tuning

log = logging.getLogger(__name__)

BULK_EVERY_NTH = 4  # one job in so many may be of another queue though some wait in the first: a quarter of the time


class BelfryWorker(SimpleWorker):  # type: ignore[misc]
    """RQ's worker that does its jobs itself. It runs the entry points of jobs.py, whatever a job in Redis names."""

    job_class = BelfryJob
    max_connection_wait_time = 5.0  # seconds between attempts to reach Redis; RQ's own limit is a minute
    asked_to_stop = False
    deadline: "Deadline | None" = None
    dequeued = 0
    _busy = False
    _leaving_until = 0.0  # `time.monotonic()`

    def request_stop(self, signum: int, frame: object) -> None:
        """The work in hand is finished, however often somebody asks: Heroku sends SIGTERM to every process, and the
        parent passes its own on, again and again.

        What is raised here may be taken for an error of the line that it broke in on, as by logging, which passes over
        its own: so who asks tuning.stop_retry_seconds later is heard again. Until then it takes its leave of Redis.
        """
        if not self.asked_to_stop:
            self.asked_to_stop = True
            self.handle_warm_shutdown_request()
        self._stop_requested = True  # RQ itself would write to Redis first: it may be away, and a job in hand goes on
        if not self._busy and time.monotonic() < self._leaving_until:
            return
        self._leaving_until = time.monotonic() + tuning.stop_retry_seconds
        if not self._busy:
            raise StopRequested

    def dequeue_job_and_maintain_ttl(self, *arguments: Any) -> Any:
        while True:
            try:
                return super().dequeue_job_and_maintain_ttl(*arguments)
            except UnicodeDecodeError as error:  # RQ has taken it out of the queue, and would end the worker for it
                log.error("an entry of a queue is no job's id, and is dropped: %a", error.object[:100])

    def run_maintenance_tasks(self) -> None:
        """Clean RQ's registries. What RQ cannot read there does not stop the worker."""
        try:
            super().run_maintenance_tasks()
        except (StopRequested, RedisConnectionError, RedisTimeoutError):
            raise
        except Exception:
            self.last_cleaned_at = now()
            log.exception("RQ's registries cannot be cleaned up")

    def reorder_queues(self, reference_queue: Queue) -> None:
        """The first queue comes first; but for one job in BULK_EVERY_NTH it comes last, so that it starves nobody."""
        self.dequeued += 1
        first, *others = self.queues
        others_turn = self.dequeued % BULK_EVERY_NTH == BULK_EVERY_NTH - 1
        self._ordered_queues = [*others, first] if others_turn else [first, *others]

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Process a run and the small ones behind it in one batch, and whatever cannot be in one by RQ's life cycle."""
        self._busy = True
        try:
            failpoint("worker.dequeued")
            self._limit_time(job)
            claimed = self._claim_batch(job)
            left = self._execute_batch(job, claimed, queue) if claimed else []
            if job.args[0] not in claimed:
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
        """The runs that were claimed; [] for a slice, and where claiming fails: the job meets that error too, and RQ
        records it."""
        if job.func_name != "jobs.notify":
            return []
        try:
            return jobs.claim_batch(*job.args)
        except Exception as error:
            log.warning("no batch is claimed: %s: %s", type(error).__name__, error)
            return []

    def _execute_batch(self, job: Job, run_ids: list[int], queue: Queue) -> list[BelfryJob]:
        """Process claimed runs together; the jobs of those that have to be processed one by one.

        RQ's records are written once before and once after it. While Redis is away the work goes on without them.
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
            error = caught  # no fault of any single run: each is retried by RQ, or found by the sweeper
            log.warning("%s runs together were interrupted: %s: %s", len(run_ids), type(error).__name__, error)
        except Exception as caught:
            log.warning(
                "%s runs together failed, and are tried one by one: %s: %s",
                len(run_ids), type(caught).__name__, caught,
            )  # fmt: skip
        left: list[BelfryJob] = []
        with _without_redis():
            record.end({job_id: results.get(run_id) for job_id, run_id in job_ids.items()})
            trim_finished(self.connection, queue)
            remaining = [job_id for job_id, run_id in job_ids.items() if run_id not in results]
            left = [one for one in BelfryJob.fetch_many(remaining, self.connection) if one] if remaining else []
            if error is not None:
                for one in left:
                    execution = self.prepare_execution(one)
                    self._finalize_failure(one, queue, execution, (type(error), error, error.__traceback__))
                left = []
        return left

    def handle_job_success(self, job: Job, queue: Queue, *arguments: Any, **named: Any) -> None:
        """Record a success as RQ does, and delete the oldest finished jobs beyond the limit."""
        super().handle_job_success(job, queue, *arguments, **named)
        with _without_redis():
            trim_finished(self.connection, queue)


@contextmanager
def _without_redis() -> Iterator[None]:
    """Go on where Redis is away: the database has the truth, and RQ's records catch up with the next job."""
    try:
        yield
    except RedisError as error:
        log.warning("Redis is out of reach, RQ's records are not written: %s", error)


def run_jobs(deadline: Deadline | None = None, burst: bool = False) -> bool:
    """Run jobs until somebody asks to stop, or `max_jobs_per_process` are done; with `burst`, until there are no more.

    Whether nobody asked to stop.
    """
    # Its own connection: RQ waits on it for minutes, and requests' short timeouts would cut that off.
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
                log.warning("Redis is out of reach: %s", error)
            if worker and worker.asked_to_stop:
                return False
            time.sleep(1)
    except StopRequested:
        return False  # while it waited for Redis
