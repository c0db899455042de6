"""The queues: enqueue work items, and ask what waits.

A job names a work item by its ids, as JSON. RQ calls any function that a job names, so every job is read by
job_class.py, which accepts only the entry points of jobs.py. Redis may be unavailable at any time: what cannot be
enqueued waits in PostgreSQL, and the sweeper finds it.
"""

import json
import logging
import random
import re
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.commands.core import Script
from redis.exceptions import RedisError
from rq import Queue, Retry
from rq.job import JOB_ID_PATTERN, JobStatus
from rq.utils import now, utcformat

from belfry.core.db import LARGEST_ID
from belfry.core.failpoints import failpoint
from belfry.core.redis import redis_connection
from belfry.fanout import recovery
from belfry.fanout.claims import WorkItem
from belfry.queue import registries
from belfry.queue.job_class import BelfryJob
from config import settings, tuning
from models import MAX_ATTEMPTS

log = logging.getLogger(__name__)

NOTIFICATIONS = "notifications"  # one job for each run; served first
BULK = "bulk"  # one job for each slice of a large run; served second, but for one job in four
DELIVERIES = "deliveries"  # for transports
QUEUES = (NOTIFICATIONS, BULK, DELIVERIES)

RETRIES = MAX_ATTEMPTS - 1
_full_until: dict[str, float] = {}  # {queue: `time.monotonic()` until which it counts as full}


def retry_intervals() -> list[int]:
    """Seconds before each retry: three times as many each, and up to half of it more at random.

    The random part spreads runs that failed together, as when the database restarts.
    """
    return [
        round(settings.retry_base_delay_seconds * 3**attempt * random.uniform(1.0, 1.0 + tuning.retry_jitter))  # noqa: S311
        for attempt in range(RETRIES)
    ]


def queue(name: str = NOTIFICATIONS, connection: Redis | None = None) -> Queue:
    """One of QUEUES, with the JSON serializer and the checked job class."""
    return _queue(name, connection or redis_connection())


@cache  # creating RQ's object takes longer than Redis takes to answer
def _queue(name: str, connection: Redis) -> Queue:
    return Queue(name, connection=connection, serializer="json", job_class=BelfryJob)


def enqueue_run(run_id: int) -> bool:
    """Enqueue a new run, as `enqueue` does. Call it after the commit that created the run."""
    enqueued = enqueue([WorkItem(run_id)])
    failpoint("run.enqueued", run_id)
    return enqueued


def enqueue(items: Sequence[WorkItem], *, lost: bool = False) -> bool:
    """Enqueue a job for each work item.

    False where Redis is unavailable or a queue is full: the runs are marked `pending`, and the sweeper enqueues them
    as soon as there is room. `lost` items, which were in the queue before, go to its front, the oldest first.
    """
    runs = [item for item in items if item.is_run]
    slices = [item for item in items if not item.is_run]
    all_enqueued = _enqueue(BULK, slices, lost)
    if not _enqueue(NOTIFICATIONS, runs, lost):
        all_enqueued = False
        try:
            recovery.mark_pending([item.run_id for item in runs])
        except (OperationalError, InterfaceError) as error:
            # The runs are committed, so the request that created them must not fail.
            log.warning("run(s) could not be marked pending: %s", error)
    return all_enqueued


def _enqueue(name: str, items: list[WorkItem], lost: bool) -> bool:
    ordered = items[::-1] if lost else items
    try:
        if items and not lost and _is_full(name):
            return False
        for first in range(0, len(items), tuning.enqueue_batch_size):
            waiting = _store_jobs(
                name, ordered[first : first + tuning.enqueue_batch_size], "LPUSH" if lost else "RPUSH"
            )
            if waiting >= tuning.max_queue_length:
                _full_until[name] = time.monotonic() + tuning.queue_full_recheck_seconds
    except RedisError as error:
        log.warning("Redis is unavailable, %s job(s) are not enqueued: %s", len(items), error)
        return False
    return True


def _store_jobs(name: str, items: Sequence[WorkItem], push: str) -> int:
    """Store jobs, and push them to the queue unless `push` is empty. Raises RedisError.

    Returns how many jobs wait in the queue, and for their retry.
    """
    one = queue(name)
    stale = (one.finished_job_registry, one.failed_job_registry, one.scheduled_job_registry, one.started_job_registry)
    keys = [Queue.redis_queues_keys, one.key, *(registry.key for registry in stale)]
    arguments = [push, utcformat(now())]
    for item in items:
        arguments += _job_id(item), _data(item), str(item), json.dumps(retry_intervals())
    return int(_enqueue_script(name, settings.job_timeout_seconds)(keys, arguments, client=redis_connection()))


def record_failed(item: WorkItem, error: str) -> None:
    """Show a work item that the sweeper failed, with its error, in RQ's failed registry. Raises RedisError."""
    name = NOTIFICATIONS if item.is_run else BULK
    _store_jobs(name, [item], push="")
    registries.record_failed(BelfryJob.fetch(_job_id(item), redis_connection()), queue(name), error)


def queue_is_full() -> bool:
    """Whether new runs should wait in PostgreSQL. False as well where Redis is unavailable."""
    try:
        return _is_full(NOTIFICATIONS)
    except RedisError:
        return False


def _is_full(name: str) -> bool:
    """Whether a queue is still full. Redis is asked once a second, and only for a queue that was full."""
    until = _full_until.get(name)
    if until is None or time.monotonic() < until:
        return until is not None
    if waiting_jobs(name) >= tuning.max_queue_length:
        _full_until[name] = time.monotonic() + tuning.queue_full_recheck_seconds
        return True
    _full_until.pop(name, None)  # two threads may reach this line at the same time
    return False


def waiting_jobs(name: str) -> int:
    """How many jobs wait in a queue, and for their retry. Raises RedisError."""
    one = queue(name)
    return int(one.count + one.scheduled_job_registry.get_job_count(cleanup=False))


def _job_id(item: WorkItem) -> str:
    return f"run-{item.run_id}" if item.is_run else f"slice-{item.run_id}-{item.after_user_id}"


def run_job_id(run_id: int) -> str:
    """The id of the job of a run."""
    return _job_id(WorkItem(run_id))


def run_of_job_id(job_id: str) -> int | None:
    """The run whose job, or whose slice's job, has this id; None for any other id."""
    found = re.fullmatch(r"(?:run|slice)-([0-9]{1,19})(?:-[0-9]{1,19})?", job_id)
    return int(found[1]) if found and int(found[1]) <= LARGEST_ID else None


def peek_runs(limit: int) -> list[int]:
    """The runs whose jobs are first in the queue, at most `limit`; [] where Redis is unavailable."""
    if not limit:
        return []
    try:
        ids: list[Any] = redis_connection().lrange(queue().key, 0, limit - 1)
    except RedisError:
        return []
    found = [run_of_job_id(job_id.decode("ascii", "replace")) for job_id in ids if job_id.startswith(b"run-")]
    return [run_id for run_id in found if run_id is not None]


def _is_job_id(entry: bytes) -> bool:
    return JOB_ID_PATTERN.fullmatch(entry.decode("ascii", "replace")) is not None


def _data(item: WorkItem) -> bytes:
    """A job's function and its arguments, as RQ stores them."""
    name, arguments = ("jobs.notify", item[:1]) if item.is_run else ("jobs.notify_slice", item)
    return zlib.compress(json.dumps([name, None, arguments, {}]).encode())


_ENQUEUE_LUA = """
-- KEYS: names of queues, queue, its finished, failed, scheduled and started registry.
-- ARGV: push command or '', now, and for each job its id, data, description and retry intervals.
redis.call('SADD', KEYS[1], KEYS[2])
local waiting = 0
for at = 3, #ARGV, 4 do
    local key = '%(job)s' .. ARGV[at]
    redis.call('UNLINK', key, '%(results)s' .. ARGV[at])
    for registry = 3, 5 do
        redis.pcall('ZREM', KEYS[registry], ARGV[at])  -- pcall: a key of another type must not stop the jobs
    end
    local executions = redis.pcall('ZRANGE', '%(executions)s' .. ARGV[at], 0, -1)
    for _, execution in ipairs(executions.err and {} or executions) do  -- of workers that died
        redis.pcall('ZREM', KEYS[6], ARGV[at] .. ':' .. execution)
        redis.call('UNLINK', '%(execution)s' .. ARGV[at] .. ':' .. execution)
    end
    redis.call('UNLINK', '%(executions)s' .. ARGV[at])
    redis.call('HSET', key, 'created_at', ARGV[2], 'enqueued_at', ARGV[2], 'data', ARGV[at + 1],
        'description', ARGV[at + 2], 'retry_intervals', ARGV[at + 3], %(common)s)
    redis.call('EXPIRE', key, %(ttl)s)
    if ARGV[1] ~= '' then
        waiting = redis.call(ARGV[1], KEYS[2], ARGV[at])
    end
end
local retries = redis.pcall('ZCARD', KEYS[5])
return waiting + (type(retries) == 'number' and retries or 0)
"""


@cache
def _enqueue_script(name: str, timeout: int) -> Script:
    """Do what `Queue.enqueue_many` does, for jobs that differ only in their ids, in one command.

    RQ creates one of the jobs, from which the common fields are taken. It takes a third of the time: RQ creates an
    object for each job, and sends three commands with all fields of each.
    """
    job = queue(name).create_job(
        "jobs.notify",
        args=(0,),
        timeout=timeout,
        result_ttl=registries.RESULT_SECONDS,
        failure_ttl=registries.FAILURE_SECONDS,
        # At the front, because a run that is older than the head of the queue and due counts as lost.
        retry=Retry(max=RETRIES, interval=retry_intervals(), enqueue_at_front=True),
    )
    own = ("created_at", "enqueued_at", "data", "description", "retry_intervals")
    fields = job.to_dict() | {"status": JobStatus.QUEUED.value}
    common = [f"'{field}', '{value}'" for field, value in fields.items() if field not in own]
    parameters = {"common": ", ".join(common), "ttl": 2 * registries.FAILURE_SECONDS}
    return redis_connection().register_script(_ENQUEUE_LUA % (registries.PREFIXES | parameters))


def peek_head(name: str) -> WorkItem | None:
    """The work item whose job is first in a queue; None for an empty queue. Raises RedisError.

    Where the first job was not enqueued by Belfry, WorkItem(0, 0): no work item is before it, so none counts as lost.
    """
    waiting = queue(name)
    with suppress(UnicodeDecodeError):  # an id that RQ cannot have created
        ids = waiting.get_job_ids(0, 1)
        if not ids:
            return None
        if job := waiting.fetch_job(ids[0]):
            return WorkItem(*job.args)
    return WorkItem(0, 0)


def remove_rejected_retries() -> int:
    """Delete the due retries that BelfryJob rejects; how many others are due. Raises RedisError.

    RQ's scheduler reads due retries with RQ's own job class, and would fail at the same unreadable one each time.
    """
    accepted = 0
    for name in QUEUES:
        registry = queue(name).scheduled_job_registry
        number = tuning.enqueue_batch_size * 2
        due: Any = redis_connection().zrangebyscore(registry.key, 0, time.time(), start=0, num=number)
        ids = [entry for entry in due if _is_job_id(entry)]
        if unreadable := [entry for entry in due if not _is_job_id(entry)]:
            log.error("%s entries of %s are not job ids and are removed", len(unreadable), registry.key)
            redis_connection().zrem(registry.key, *unreadable)
        if ids:
            accepted += sum(map(bool, BelfryJob.fetch_many([entry.decode() for entry in ids], redis_connection())))
    return accepted
