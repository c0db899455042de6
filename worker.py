"""The worker of the Procfile: RQ's own, which also sweeps, and outlives a restart of Redis."""

import logging
import signal
import threading
import time

from peewee import InterfaceError, OperationalError
from playhouse.pool import MaxConnectionsExceeded
from redis import Redis
from redis.exceptions import RedisError
from rq import Worker
from rq.job import Job
from rq.queue import Queue

import jobs
from belfry.points import reach
from config import settings

log = logging.getLogger(__name__)

OTHERS_TURN = 4  # one job in so many may be of another queue though some wait in the first: a quarter of the time
_fork_or_sweep = threading.Lock()
"""A fork copies locks as they are. While the sweeper's thread is in the database, nothing may fork."""


class BelfryWorker(Worker):  # type: ignore[misc]
    """RQ's forking worker. Its jobs' modules are imported before the fork: four times as many jobs a second."""

    max_connection_wait_time = 5.0  # seconds between attempts to reach Redis; RQ's own limit is a minute
    asked_to_stop = False
    _dequeued = 0

    def reorder_queues(self, reference_queue: Queue) -> None:
        """The first queue comes first; but for one job in OTHERS_TURN it comes last, so that it starves nobody."""
        self._dequeued += 1
        first, *others = self.queues
        others_turn = self._dequeued % OTHERS_TURN == OTHERS_TURN - 1
        self._ordered_queues = [*others, first] if others_turn else [first, *others]

    def request_stop(self, signum: int, frame: object) -> None:
        self.asked_to_stop = True
        super().request_stop(signum, frame)

    def execute_job(self, job: Job, queue: Queue) -> None:
        reach("worker.taken")
        super().execute_job(job, queue)

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        with _fork_or_sweep:
            super().fork_work_horse(job, queue)
        reach("worker.forked")

    def setup_work_horse_signals(self) -> None:
        """Heroku sends SIGTERM to every process: the work in hand is finished, and the worker ends after it."""
        super().setup_work_horse_signals()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Sweeper(threading.Thread):
    """Looks every SWEEP_SECONDS for retries whose time has come, and for what nobody takes care of. Goes on whatever
    is out of reach."""

    def __init__(self) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.is_set():
            sweep_once()
            self._stop_asked.wait(settings.sweep_seconds)

    def stop(self) -> None:
        """Ends it after the sweep in hand."""
        self._stop_asked.set()
        self.join(timeout=10)


def sweep_once() -> int:
    """One sweep: how many parts it enqueued. With the database away the log says so, and the next one tries again."""
    with _fork_or_sweep:
        try:
            return jobs.sweep()
        except (OperationalError, InterfaceError, MaxConnectionsExceeded) as error:
            log.warning("the database is out of reach, nothing is swept: %s", error)
        except Exception:
            # A sweeper that died would be missed by nobody until a run is lost: it says why, and goes on.
            log.exception("the sweep failed")
    return 0


def work(burst: bool = False) -> None:
    """Run jobs until SIGTERM or SIGINT; with `burst`, until the queues are empty and nothing is left to enqueue.

    Waits for Redis where it is not there yet, and begins anew where RQ's worker gives up on it.
    """
    # Its own connection: RQ waits on it for minutes, and requests' short timeouts would cut that off.
    connection = Redis.from_url(settings.redis_url, socket_connect_timeout=5)
    if burst:
        while _work_in_burst(connection):
            pass
        return
    sweeper = Sweeper()
    sweeper.start()
    try:
        while not _work_once(connection, burst=False):
            time.sleep(1)
    finally:
        sweeper.stop()


def _work_in_burst(connection: Redis) -> bool:
    """One sweep, and the queues until they are empty; whether another round may find more to do."""
    swept = sweep_once()
    while not _work_once(connection, burst=True):
        time.sleep(1)
    return swept > 0


def _work_once(connection: Redis, burst: bool) -> bool:
    """Until the worker ends; True when that was meant."""
    try:
        worker = BelfryWorker(
            [jobs.queue(name, connection) for name in jobs.QUEUES],
            connection=connection,
            serializer="json",
            worker_ttl=30,
            maintenance_interval=10,
            job_monitoring_interval=5,
        )
        worker.log_result_lifespan = False
        worker.work(burst=burst, logging_level=None)
    except RedisError as error:
        log.warning("Redis is out of reach: %s", error)
        return False
    return burst or worker.asked_to_stop
