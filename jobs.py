"""Every function that RQ may run, its queue, and its retries. What runs later.

A job takes ids, reloads everything, and may run twice. Arguments are JSON, so that whoever can write to
Redis cannot run code here. Plain RQ runs them as well: `rq worker -S json notifications bulk deliveries`.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as RedisRetry
from rq import Queue, Retry, get_current_job
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.timeouts import JobTimeoutException

from belfry import fanout, idempotency, leases, live, logs, partitions
from belfry.leases import Part
from belfry.points import reach
from belfry.sql import lock_for_this_transaction, transaction
from config import settings
from models import LARGEST_ID, TRIES, db

log = logging.getLogger(__name__)

NOTIFICATIONS = "notifications"  # one job a run; always served first
BULK = "bulk"  # one job a slice of a large run, served after `notifications`, but for one job in four
DELIVERIES = "deliveries"  # other transports
QUEUES = (NOTIFICATIONS, BULK, DELIVERIES)

RETRIES = TRIES - 1
GRACE_SECONDS = 5  # after a retry should have begun, before the sweeper takes it for lost
WAITING_AT_MOST = 10_000  # jobs in a queue; what is beyond that waits in PostgreSQL, and Redis stays small
TOGETHER_AT_MOST = 400  # small runs that are done in one transaction
ENQUEUED_AT_ONCE = 500  # jobs in one round trip to Redis
_at_once: Job | None = None  # the job that `do_at_once` does
_failed: tuple[str, Exception] | None = None  # the id of the one that failed there, and why
_process = os.getpid()
_full_until: dict[str, float] = {}  # by queue, in `time.monotonic()`: asking each time would be a round trip more
PARTITIONS_SECONDS = 60  # between two looks of a worker at the partitions
_partitions_looked_at = 0.0  # `time.monotonic()`
_indexing: threading.Thread | None = None  # at the index of a partition that was left
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


def live_channel() -> str:
    """Where `announce` publishes. Redis has one set of channels for all of its databases."""
    return f"belfry:{redis_connection().connection_pool.connection_kwargs.get('db', 0)}:live"


def announce(**what: Any) -> None:
    """Tell the web processes that something has changed that they may have to show at once: after the commit.

    `told=True`, `user_id`, `message_id`, `access` (a user id, or True for all) or `signed_out`: views/hub.py says what
    it does with each. One that is lost does no harm: they look by themselves as well, every few seconds.
    """
    try:
        redis_connection().publish(live_channel(), json.dumps(what))
    except RedisError as error:
        log.warning("Redis is out of reach, %s is not announced: %s", what, error)


def queue(name: str = NOTIFICATIONS, connection: Redis | None = None) -> Queue:
    """One of QUEUES, with the JSON serializer."""
    return _queue(name, connection or redis_connection())


@cache  # RQ looks its serializer over each time, for longer than Redis takes to answer
def _queue(name: str, connection: Redis) -> Queue:
    return Queue(name, connection=connection, serializer="json")


def enqueue_run(run_id: int) -> bool:
    """As `enqueue`, of a new run. Call it after the commit that made it."""
    enqueued = enqueue([Part(run_id)])
    reach("run.enqueued", run_id)
    return enqueued


def enqueue(parts: Sequence[Part], *, lost: bool = False) -> bool:
    """Wish that somebody look at these parts soon: a job for each, in its queue.

    False when Redis is out of reach, or a queue is full: runs are `pending` then, and the sweeper enqueues what is
    left as soon as there is room. `lost` parts go before all that wait, for their turn has been: and the oldest
    first, so that a queue stays in the order of its parts.
    """
    own = [part for part in parts if part.after is None]
    slices = [part for part in parts if part.after is not None]
    all_in = _enqueue(BULK, slices, lost)
    if not _enqueue(NOTIFICATIONS, own, lost):
        all_in = False
        try:
            leases.wait_for_room([part.run_id for part in own])
        except (OperationalError, InterfaceError) as error:
            # They are committed: whoever waits for an answer must not get an error for this.
            log.warning("run(s) could not be marked pending: %s", error)
    return all_in


def _enqueue(name: str, parts: list[Part], lost: bool) -> bool:
    in_order, waiting_queue = parts[::-1] if lost else parts, queue(name)
    try:
        if parts and not lost and _is_full(name):
            return False
        for first in range(0, len(parts), ENQUEUED_AT_ONCE):
            some = [_wish(part, lost) for part in in_order[first : first + ENQUEUED_AT_ONCE]]
            # In order, and not as a transaction, which would cost two replies for each command: each job before its
            # id, and what a lost connection cuts off is `pending`, and written anew under the same id.
            with redis_connection().pipeline(transaction=False) as pipeline:
                waiting_queue.enqueue_many(some, pipeline=pipeline)
                waiting = pipeline.execute()[-1]  # the last push answers how many wait
            if waiting >= WAITING_AT_MOST:
                _full_until[name] = time.monotonic() + 1
    except RedisError as error:
        log.warning("Redis is out of reach, %s job(s) are not enqueued: %s", len(parts), error)
        return False
    return True


def queue_is_full() -> bool:
    """Whether new runs had better wait in PostgreSQL. False as well where Redis is out of reach."""
    try:
        return _is_full(NOTIFICATIONS)
    except RedisError:
        return False


def _is_full(name: str) -> bool:
    """Whether a queue that was full is so still. Asked of Redis once a second, and only then: not by every request."""
    until = _full_until.get(name)
    if until is None or time.monotonic() < until:
        return until is not None
    if queue(name).count >= WAITING_AT_MOST:
        _full_until[name] = time.monotonic() + 1
        return True
    _full_until.pop(name, None)  # two threads may come to this at once
    return False


def _job_id(part: Part) -> str:
    return f"run-{part.run_id}" if part.after is None else f"slice-{part.run_id}-{part.after}"


def _run_of(job_id: bytes) -> int | None:
    """Whose job it is, as far as the id alone says so: of a run as a whole."""
    kind, _, number = job_id.partition(b"-")
    return int(number) if kind == b"run" and number.isdigit() and int(number) <= LARGEST_ID else None


def _waiting_runs() -> list[int]:
    """The runs whose jobs come next; [] where Redis is out of reach."""
    try:
        ids: list[Any] = redis_connection().lrange(queue().key, 0, TOGETHER_AT_MOST - 1)
    except RedisError:
        return []
    return [run_id for job_id in ids if (run_id := _run_of(job_id)) is not None]


def _withdraw(run_ids: Sequence[int]) -> None:
    """Take the jobs of these runs out of the queue: somebody is at them. One that is left finds nothing to do."""
    key, job_ids = queue().key, [_job_id(Part(run_id)) for run_id in run_ids]
    try:
        with redis_connection().pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.lrem(key, 1, job_id)
            pipeline.unlink(*map(Job.key_for, job_ids))
            pipeline.execute()
    except RedisError as error:
        log.warning("Redis is out of reach, %s job(s) stay in the queue: %s", len(run_ids), error)


def _wish(part: Part, at_front: bool) -> Any:
    return Queue.prepare_data(
        "jobs.notify" if part.after is None else "jobs.notify_slice",
        args=(part.run_id,) if part.after is None else (part.run_id, part.after),
        timeout=settings.job_timeout,
        result_ttl=0,  # the run says how it went; Redis keeps nothing of what is done
        failure_ttl=7 * 86_400,
        description=str(part),
        at_front=at_front,
        job_id=_job_id(part),  # enqueued again it is written over: nothing is left of a job whose process died
        retry=Retry(max=RETRIES, interval=retry_intervals()),
    )


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
    """Fan out one run; of one with a large audience, share it out and tell the mentioned. Queue `notifications`.

    The small ones that wait behind it are done in the same transaction: a commit, a statement and a job for all of
    them. Retried with growing intervals; what failed is on the run.
    """
    part = Part(run_id)
    with _at_work_on(part):
        taken = leases.take_together(run_id, _waiting_runs(), settings.slice_members)
        left = _tell_together(taken, run_id) if taken else []
        if run_id not in taken:
            _take_and_tell(part)
        elif run_id in left:
            _tell(part, 1)
        reach("job.done", run_id)


def notify_slice(run_id: int, after: int) -> None:
    """Fan out the slice of a large run that begins after a user id. Queue `bulk`; otherwise as `notify`."""
    part = Part(run_id, after)
    with _at_work_on(part):
        _take_and_tell(part)
        reach("job.done", run_id, after)


def do_at_once(job: Job) -> bool:
    """Do a job without RQ's accounts of it, which take longer than to tell 50 people; False where it is none of ours.

    Whatever goes wrong is written down as ever, and goes up to the caller: RQ is to meet it, by `fail_as_before`.
    """
    global _at_once, _failed
    if job.func_name not in ("jobs.notify", "jobs.notify_slice"):
        return False
    _at_once, _failed = job, None
    try:
        job.func(*job.args)
    finally:
        _at_once = None
    return True


def fail_as_before(job: Job, error: Exception) -> None:
    """Let a job that failed at once fail so again, doing nothing, when RQ does it: for its accounts, and the retry."""
    global _failed
    _failed = (job.id, error)


def _this_job() -> Job | None:
    return _at_once or get_current_job()


@contextmanager
def _at_work_on(part: Part) -> Iterator[None]:
    global _failed
    job, failed = _this_job(), _failed
    _failed = None
    if failed and job and job.id == failed[0]:
        raise failed[1]
    with logs.context(run_id=part.run_id, job_id=job.id if job else None), _connection():
        reach("job.begun", part.run_id, part.after)
        yield


def _tell_together(taken: list[int], first: int) -> list[int]:
    """Fan out runs that were taken together; those that are not done: of the others the failure is on the run."""
    for run_id in taken:
        reach("run.taken", run_id)
    others = [run_id for run_id in taken if run_id != first]
    if others:
        _withdraw(others)
    try:
        done = fanout.tell_together(taken)
    except (JobTimeoutException, OperationalError, InterfaceError):
        raise  # no fault of any of them: their leases end, and the sweeper goes on
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("%s runs together failed, and are tried one by one: %s", len(taken), reason)
        done = []
    for run_id in done:
        reach("run.committed", run_id)
    if done:
        announce(told=True)
        log.info("%s: done%s", Part(done[0]), f", with {len(done) - 1} others" if len(done) > 1 else "")
    left = sorted(set(taken) - set(done))
    for run_id in left:
        if run_id != first:
            try:
                _tell(Part(run_id), 1)
            except (JobTimeoutException, OperationalError, InterfaceError):
                raise  # the job's time is up, or the database away: the leases end, and the sweeper goes on
            except Exception:
                log.info("%s: its failure is on it, and the sweeper begins it again", Part(run_id))
    return left


def _take_and_tell(part: Part) -> None:
    attempt = leases.take(part)
    if attempt is None:
        log.info("%s: nothing to do: it is done, has failed (`flask runs retry`), or is in other hands", part)
        return
    reach("run.taken" if part.after is None else "slice.taken", part.run_id, part.after)
    _tell(part, attempt)


def _tell(part: Part, attempt: int) -> None:
    try:
        slices = fanout.tell(part, attempt)
    except Exception as error:
        reach("failure.met", part.run_id, part.after)
        log.warning("%s failed: %s: %s", part, type(error).__name__, error)
        # Written down, and up it goes: RQ's retry must see it. Where the connection broke this fails as well,
        # and rightly so: that is no fault of the message's, its lease has ended, and the sweeper goes on.
        leases.fail(part, attempt, f"{type(error).__name__}: {error}", _sweep_in(_this_job()))
        reach("failure.written", part.run_id, part.after)
        raise
    if slices is None:
        log.info("%s: attempt %s was overtaken by a later one, and wrote nothing", part, attempt)
        return
    reach("run.committed" if part.after is None else "slice.committed", part.run_id, part.after)
    announce(told=True)
    if slices:
        enqueue(slices)
    log.info("%s: done%s", part, f", {len(slices)} slices to go" if slices else "")


def _sweep_in(job: Any) -> float | None:
    """Seconds until the sweeper takes the retry of a job that fails now for lost; None where there will be none."""
    return job.get_retry_interval() + GRACE_SECONDS if job and job.retries_left else None


def sweep() -> int:
    """Enqueue again what nobody takes care of; how many parts that were. 0 too where another worker sweeps.

    One sweeper at a time, by an advisory lock that ends with its transaction.
    """
    try:
        oldest = {name: _oldest_waiting(name) for name in (NOTIFICATIONS, BULK)}
        room = WAITING_AT_MOST - queue().count
    except RedisError as error:
        log.warning("Redis is out of reach, nothing is swept: %s", error)
        return 0
    with _connection():
        _look_after_partitions()
        with transaction(statement_timeout="20s"):
            if not lock_for_this_transaction(SWEEP_LOCK):
                return 0
            reach("sweep.locked")
            idempotency.forget_old_keys()
            live.forget_old_tellings()
            if given_up := leases.give_up():
                log.error("%s run(s) or slice(s) gave up: each attempt ended without a word", given_up)
            lost = leases.lost_runs(oldest[NOTIFICATIONS]) + leases.lost_slices(oldest[BULK])
            pending = leases.pending_runs(room - len(lost))
            reach("sweep.marked")
        reach("sweep.committed")
        _enqueue_retries()
        swept = len(lost) if enqueue(lost, lost=True) else 0
        swept += len(pending) if enqueue(pending) else 0
        reach("sweep.enqueued")
    if swept:
        log.info("swept: %s part(s) that nobody took care of, %s that were pending", len(lost), len(pending))
    return swept


def _look_after_partitions() -> None:
    """Once in PARTITIONS_SECONDS. What stands in its way, as somebody who reads for long, stops no sweep."""
    global _partitions_looked_at, _indexing
    if time.monotonic() - _partitions_looked_at < PARTITIONS_SECONDS:
        return
    _partitions_looked_at = time.monotonic()
    try:
        partitions.care()
        if _indexing is None or not _indexing.is_alive():
            for name in partitions.without_index()[:1]:
                _indexing = threading.Thread(target=partitions.make_index, args=(name,), daemon=True)
                _indexing.start()  # it may take minutes, in which others wait for the next sweep
    except (OperationalError, InterfaceError) as error:
        log.warning("the partitions have to wait for the next look: %s", error)
    except Exception:
        log.exception("the partitions cannot be looked after")


@cache
def _scheduler() -> RQScheduler:
    """RQ's scheduler, without its process: that outlives a worker that is killed, and nobody ends it."""
    scheduler = RQScheduler(QUEUES, connection=redis_connection(), serializer="json")
    scheduler.prepare_registries(QUEUES)
    return scheduler


def _enqueue_retries() -> None:
    """Put the retries whose time has come into their queues. What stands in the way there stops nothing else: a retry
    that does not come is found by the sweeper."""
    try:
        _scheduler().enqueue_scheduled_jobs()
    except RedisError as error:
        log.warning("Redis is out of reach, no retry is enqueued: %s", error)
    except Exception:
        log.exception("RQ's scheduled jobs cannot be read")


def _oldest_waiting(name: str) -> Part | None:
    """The part whose job has waited longest in a queue; None where none waits. Raises RedisError.

    What is no job of ours tells nothing: then it is a part before all others.
    """
    waiting = queue(name)
    ids = waiting.get_job_ids(0, 1)
    if not ids:
        return None
    with suppress(TypeError, ValueError, OverflowError, DeserializationError):
        job = waiting.fetch_job(ids[0])
        if job and all(0 <= int(number) <= LARGEST_ID for number in job.args):
            return Part(*map(int, job.args))
    return Part(0, 0)


def redis_answers() -> bool:
    """Whether Redis is in reach."""
    try:
        return bool(redis_connection().ping())
    except RedisError:
        return False
