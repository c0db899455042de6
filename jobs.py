"""Every function that RQ may run, its queue, and its retries. What runs later.

A job takes ids, reloads everything, and may run twice. Arguments are JSON, so that whoever can write to
Redis cannot run code here. Plain RQ runs them as well: `rq worker -S json notifications bulk deliveries`.
"""

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as RedisRetry
from rq import Queue, Retry, Worker, get_current_job

from belfry import fanout, idempotency, logs, runs
from belfry.sql import row
from config import settings
from models import TRIES, db

log = logging.getLogger(__name__)

NOTIFICATIONS = "notifications"  # one job a message; always served first
BULK = "bulk"  # the rest of large audiences, served when nobody waits in `notifications`
DELIVERIES = "deliveries"  # other transports
QUEUES = (NOTIFICATIONS, BULK, DELIVERIES)

RETRIES = TRIES - 1
TURN_SECONDS = 5.0  # that one run may keep a worker while others wait; the rest of it goes to `bulk`
GRACE_SECONDS = 15  # after a retry should have begun, before the sweeper takes it for lost
QUEUED_SECONDS = 30  # in a short queue, before the sweeper takes a run's job for lost
LONG_QUEUE = 200  # from this length on a queued run is taken to be waiting, not lost
SWEEP_AT_MOST = 500  # runs enqueued by one sweep
_process = os.getpid()
SWEEP_LOCK = 0x62656C66  # the advisory lock's key: "belf"


def retry_intervals() -> list[int]:
    """Seconds before each retry: growing threefold, each up to half longer by chance.

    The chance keeps the runs that failed together (a database that restarted) from coming back together.
    """
    return [
        round(settings.retry_seconds * 3**attempt * random.uniform(1.0, 1.5))  # noqa: S311
        for attempt in range(RETRIES)
    ]


@cache
def redis_connection() -> Redis:
    """The web's and the jobs' connection to Redis: short timeouts, for a request must not wait for it."""
    return Redis.from_url(
        settings.redis_url,
        socket_connect_timeout=0.5,
        socket_timeout=2,
        retry=RedisRetry(NoBackoff(), 1),  # a connection that a restart of Redis left dead is made again once
        health_check_interval=30,
    )


def queue(name: str = NOTIFICATIONS, connection: Redis | None = None) -> Queue:
    """One of QUEUES, with the JSON serializer."""
    return Queue(name, connection=connection or redis_connection(), serializer="json")


def enqueue_runs(run_ids: Sequence[int], *, rest: bool = False) -> bool:
    """Wish that somebody look at these runs soon. Call it after the commit that made them.

    `rest` puts them on `bulk`: they have begun, and are to be gone on with. False when Redis is out of reach:
    the runs stay as they are, and the sweeper finds them.
    """
    wishes = [
        Queue.prepare_data(
            "jobs.go_on" if rest else "jobs.notify",
            args=(run_id,),
            timeout=settings.job_timeout,
            result_ttl=0,  # the run says how it went; Redis keeps nothing of what is done
            failure_ttl=7 * 86_400,
            description=f"run {run_id}",
            retry=Retry(max=RETRIES, interval=retry_intervals()),
        )
        for run_id in run_ids
    ]
    try:
        queue(BULK if rest else NOTIFICATIONS).enqueue_many(wishes)
    except RedisError as error:
        log.warning("Redis is out of reach, %s run(s) stay pending: %s", len(wishes), error)
        return False
    try:
        runs.mark_queued(run_ids, QUEUED_SECONDS)
    except (OperationalError, InterfaceError) as error:
        # They are committed and in the queue: whoever waits for an answer must not get an error for this.
        log.warning("run(s) %s are queued, but could not be marked so: %s", list(run_ids), error)
    return True


@contextmanager
def _connection() -> Iterator[None]:
    """A database connection for a job or a sweep; the one that is open already, where there is one.

    A work-horse is a fork: what it inherited of the pool is its parent's, and is forgotten, not closed.
    """
    global _process
    if os.getpid() != _process:
        db.dispose()
        _process = os.getpid()
    opened = db.connect(reuse_if_open=True)
    try:
        yield
    finally:
        if opened:
            db.close()


def notify(run_id: int) -> None:
    """Fan out one run, or its first part. Queue `notifications`.

    Retried with growing intervals; what failed is on the run.
    """
    _work_on(run_id, resumed=False)


def go_on(run_id: int) -> None:
    """Fan out the next part of a large run. Queue `bulk`; otherwise as `notify`."""
    _work_on(run_id, resumed=True)


def _work_on(run_id: int, *, resumed: bool) -> None:
    job = get_current_job()
    with logs.context(run_id=run_id, job_id=job.id if job else None):
        retry_in = None
        if job and job.retries_left:
            retry_in = Retry.get_interval(job.number_of_retries or 0, job.retry_intervals) + GRACE_SECONDS
        try:
            with _connection():
                state = fanout.execute(run_id, seconds=TURN_SECONDS, resumed=resumed)
                if state == "unfinished":
                    enqueue_runs([run_id], rest=True)
        except Exception as error:
            # Written down, and up it goes: RQ's retry must see it.
            log.warning("run %s failed: %s: %s", run_id, type(error).__name__, error)
            with _connection():
                runs.record_failure(run_id, f"{type(error).__name__}: {error}", retry_in)
            raise
        log.info("run %s %s", run_id, state)


def sweep() -> int:
    """Enqueue again what nobody takes care of; how many runs that were. 0 too where another worker sweeps.

    One sweeper at a time, by an advisory lock that dies with its connection.
    """
    with _connection(), db.atomic():
        held = row(
            "SELECT pg_try_advisory_xact_lock(%(key)s) AS held,"
            " set_config('idle_in_transaction_session_timeout', '20s', true)",  # for a sweeper that hangs
            {"key": SWEEP_LOCK},
        )
        if not held or not held["held"]:
            return 0
        idempotency.forget_old_keys()
        try:
            waiting = queue().count
        except RedisError as error:
            log.warning("Redis is out of reach, nothing is swept: %s", error)
            return 0
        due = runs.due_runs(SWEEP_AT_MOST, with_queued=waiting < LONG_QUEUE)
        if not due or not enqueue_runs(due):
            return 0
    log.info("swept %s run(s) that nobody was taking care of", len(due))
    return len(due)


def redis_answers() -> bool:
    """Whether Redis is in reach."""
    try:
        return bool(redis_connection().ping())
    except RedisError:
        return False


Reading = tuple[str, str, list[str], list[tuple[list[str], float]]]


def readings() -> list[Reading]:
    """What /metrics shows: (name, what it is, names of labels, [(labels, value), ...]) each.

    What is out of reach has no values, and `belfry_up` says so.
    """
    queues: list[tuple[list[str], float]] = []
    workers: list[tuple[list[str], float]] = []
    redis_up = redis_answers()
    if redis_up:
        for name in QUEUES:
            one = queue(name)
            queues.append(([name, "queued"], one.count))
            for state, registry in (
                ("started", one.started_job_registry),
                ("scheduled", one.scheduled_job_registry),
                ("failed", one.failed_job_registry),
            ):
                queues.append(([name, state], registry.get_job_count(cleanup=False)))
        workers.append(([], Worker.count(connection=redis_connection())))
    unfinished: dict[str, Any] | None = None
    with suppress(OperationalError, InterfaceError):
        unfinished = runs.count_unfinished()
    return [
        (
            "belfry_up",
            "Whether a part answers",
            ["part"],
            [(["redis"], float(redis_up)), (["database"], float(unfinished is not None))],
        ),
        ("belfry_queue_jobs", "Jobs of a queue by state", ["queue", "state"], queues),
        ("belfry_workers", "Workers that are registered", [], workers),
        (
            "belfry_runs",
            "Runs that are not finished, and failed ones, by state",
            ["state"],
            [([state], count) for state, count in unfinished["states"].items()] if unfinished else [],
        ),
        (
            "belfry_oldest_unfinished_run_seconds",
            "Age of the oldest unfinished run; 0 when all is done",
            [],
            [([], unfinished["oldest_seconds"])] if unfinished else [],
        ),
    ]
