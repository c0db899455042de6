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
from typing import Any

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
    _in_hand = False
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
        if not self._in_hand and time.monotonic() < self._leaving_until:
            return
        self._leaving_until = time.monotonic() + tuning.stop_retry_seconds
        if not self._in_hand:
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
        self._in_hand = True
        try:
            failpoint("worker.taken")
            if self.deadline:
                self.deadline.set(job.timeout or settings.job_timeout)
            if not self._do_at_once(job, queue):
                super().execute_job(job, queue)
        finally:
            self._in_hand = False
            if self.deadline:
                self.deadline.clear()

    def _do_at_once(self, job: Job, queue: Queue) -> bool:
        """All that RQ hears of a job that goes well is that it is no more: meanwhile /rq shows it as queued, and its
        worker as idle. What goes wrong RQ meets itself.
        """
        try:
            if queue.name != queues.NOTIFICATIONS:  # a slice may take long, and says nothing meanwhile
                self.heartbeat((job.timeout or settings.job_timeout) + 60)
            with self.death_penalty_class(job.timeout or settings.job_timeout, JobTimeoutException, job_id=job.id):
                done = jobs.do_at_once(job)
        except Exception as error:
            jobs.fail_as_before(job, error)
            return False
        if done:
            with self.connection.pipeline(transaction=False) as pipeline:
                pipeline.unlink(job.key)
                self.increment_successful_job_count(pipeline)
                pipeline.execute()
        return done


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
