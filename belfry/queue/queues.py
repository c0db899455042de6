"""The queues: what is wished for in them, and how full they are; and Redis, which they are in.

A job names a part of a run by its ids, as JSON. That alone does not stop whoever can write to Redis from running code
here: RQ calls any function that a job names. So every job is read by job_class.py, which accepts the entry points
of jobs.py only.
Redis may be away at any time: what is not enqueued waits in PostgreSQL, and the sweeper finds it.
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

from belfry.core.failpoints import failpoint
from belfry.core.redis import redis_connection
from belfry.fanout import recovery
from belfry.fanout.claims import WorkItem
from belfry.queue.job_class import BelfryJob
from belfry.queue.registries import PREFIXES, RESULT_SECONDS
from config import settings, tuning
from models import LARGEST_ID, MAX_ATTEMPTS

log = logging.getLogger(__name__)

NOTIFICATIONS = "notifications"  # one job a run; always served first
BULK = "bulk"  # one job a slice of a large run, served after `notifications`, but for one job in four
DELIVERIES = "deliveries"  # other transports
QUEUES = (NOTIFICATIONS, BULK, DELIVERIES)

RETRIES = MAX_ATTEMPTS - 1
_full_until: dict[str, float] = {}  # by queue, in `time.monotonic()`: asking each time would be a round trip more


def retry_intervals() -> list[int]:
    """Seconds before each retry: growing threefold, each up to half longer by chance.

    The chance keeps the runs that failed together (a database that restarted) from coming back together.
    """
    return [
        round(settings.retry_base_delay_seconds * 3**attempt * random.uniform(1.0, 1.0 + tuning.retry_jitter))  # noqa: S311
        for attempt in range(RETRIES)
    ]


def queue(name: str = NOTIFICATIONS, connection: Redis | None = None) -> Queue:
    """One of QUEUES, with the JSON serializer, and jobs that were checked."""
    return _queue(name, connection or redis_connection())


@cache  # RQ looks its serializer over each time, for longer than Redis takes to answer
def _queue(name: str, connection: Redis) -> Queue:
    return Queue(name, connection=connection, serializer="json", job_class=BelfryJob)


def enqueue_run(run_id: int) -> bool:
    """As `enqueue`, of a new run. Call it after the commit that made it."""
    enqueued = enqueue([WorkItem(run_id)])
    failpoint("run.enqueued", run_id)
    return enqueued


def enqueue(parts: Sequence[WorkItem], *, lost: bool = False) -> bool:
    """Wish that somebody look at these parts soon: a job for each, in its queue.

    False when Redis is out of reach, or a queue is full: runs are `pending` then, and the sweeper enqueues what is
    left as soon as there is room. `lost` parts go before all that wait, for their turn has been: and the oldest
    first, so that a queue stays in the order of its parts.
    """
    own = [part for part in parts if part.is_run]
    slices = [part for part in parts if not part.is_run]
    all_in = _enqueue(BULK, slices, lost)
    if not _enqueue(NOTIFICATIONS, own, lost):
        all_in = False
        try:
            recovery.mark_pending([part.run_id for part in own])
        except (OperationalError, InterfaceError) as error:
            # They are committed: whoever waits for an answer must not get an error for this.
            log.warning("run(s) could not be marked pending: %s", error)
    return all_in


def _enqueue(name: str, parts: list[WorkItem], lost: bool) -> bool:
    in_order, keys = parts[::-1] if lost else parts, _keys(name)
    try:
        if parts and not lost and _is_full(name):
            return False
        for first in range(0, len(parts), tuning.enqueue_batch_size):
            some = in_order[first : first + tuning.enqueue_batch_size]
            arguments = ["LPUSH" if lost else "RPUSH", utcformat(now())]
            for part in some:
                arguments += _job_id(part), _data(part), str(part), json.dumps(retry_intervals())
            waiting = _enqueue_script(name, settings.job_timeout_seconds)(keys, arguments, client=redis_connection())
            if waiting >= tuning.max_queue_length:
                _full_until[name] = time.monotonic() + tuning.queue_full_recheck_seconds
    except RedisError as error:
        log.warning("Redis is out of reach, %s job(s) are not enqueued: %s", len(parts), error)
        return False
    return True


def _keys(name: str) -> list[str]:
    """The keys of a queue, and of the registries in which a job that is enqueued again may stand."""
    one = queue(name)
    registries = (one.finished_job_registry, one.failed_job_registry, one.scheduled_job_registry)
    keys = [registry.key for registry in (*registries, one.started_job_registry)]
    return [Queue.redis_queues_keys, one.key, *keys]


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
    if queue(name).count >= tuning.max_queue_length:
        _full_until[name] = time.monotonic() + tuning.queue_full_recheck_seconds
        return True
    _full_until.pop(name, None)  # two threads may come to this at once
    return False


def _job_id(part: WorkItem) -> str:
    return f"run-{part.run_id}" if part.is_run else f"slice-{part.run_id}-{part.after_user_id}"


def run_job_id(run_id: int) -> str:
    """The id of the job of a run as a whole."""
    return _job_id(WorkItem(run_id))


def run_of_job_id(job_id: str) -> int | None:
    """The run to which a job belongs by its id, as a whole or as a slice; None where the id is no job's of a run."""
    found = re.fullmatch(r"(?:run|slice)-([0-9]{1,19})(?:-[0-9]{1,19})?", job_id)
    return int(found[1]) if found and int(found[1]) <= LARGEST_ID else None


def _run_of(job_id: bytes) -> int | None:
    """Whose job it is, as far as the id alone says so: of a run as a whole."""
    kind, _, number = job_id.partition(b"-")
    if kind != b"run" or not number.isdigit() or len(number) > len(str(LARGEST_ID)):  # int() refuses very long ones
        return None
    return int(number) if int(number) <= LARGEST_ID else None


def peek_runs(at_most: int) -> list[int]:
    """The runs whose jobs come next; [] where Redis is out of reach."""
    if not at_most:
        return []
    try:
        ids: list[Any] = redis_connection().lrange(queue().key, 0, at_most - 1)
    except RedisError:
        return []
    return [run_id for job_id in ids if (run_id := _run_of(job_id)) is not None]


def _is_job_id(entry: bytes) -> bool:
    return JOB_ID_PATTERN.fullmatch(entry.decode("ascii", "replace")) is not None


def _data(part: WorkItem) -> bytes:
    """A job's function and its arguments, as RQ stores them."""
    name, arguments = ("jobs.notify", part[:1]) if part.is_run else ("jobs.notify_slice", part)
    return zlib.compress(json.dumps([name, None, arguments, {}]).encode())


_ENQUEUE_LUA = """
redis.call('SADD', KEYS[1], KEYS[2])
local waiting = 0
for at = 3, #ARGV, 4 do
    local key = '%(job)s' .. ARGV[at]
    redis.call('UNLINK', key, '%(results)s' .. ARGV[at])  -- of an earlier time, or whatever stands there
    for registry = 3, 5 do
        redis.pcall('ZREM', KEYS[registry], ARGV[at])  -- by pcall: a key of another type must not stop the jobs
    end
    local executions = redis.pcall('ZRANGE', '%(executions)s' .. ARGV[at], 0, -1)
    for _, execution in ipairs(executions.err and {} or executions) do  -- its worker died
        redis.pcall('ZREM', KEYS[6], ARGV[at] .. ':' .. execution)
        redis.call('UNLINK', '%(execution)s' .. ARGV[at] .. ':' .. execution)
    end
    redis.call('UNLINK', '%(executions)s' .. ARGV[at])
    redis.call('HSET', key, 'created_at', ARGV[2], 'enqueued_at', ARGV[2], 'data', ARGV[at + 1],
        'description', ARGV[at + 2], 'retry_intervals', ARGV[at + 3], %(alike)s)
    waiting = redis.call(ARGV[1], KEYS[2], ARGV[at])
end
return waiting
"""


@cache
def _enqueue_script(name: str, timeout: int) -> Script:
    """What `Queue.enqueue_many` does, for jobs that are alike, in one command: how many wait then.

    RQ makes one of them, and what does not differ from job to job is taken from that. It takes a third of the time: RQ
    makes an object of each job, and three commands with each of its fields.
    """
    job = queue(name).create_job(
        "jobs.notify",
        args=(0,),
        timeout=timeout,
        result_ttl=RESULT_SECONDS,
        failure_ttl=7 * 86_400,
        retry=Retry(max=RETRIES, interval=retry_intervals()),
    )
    fields = job.to_dict() | {"status": JobStatus.QUEUED.value}
    alike = [
        f"'{word}'"
        for field, value in fields.items()
        if field not in ("created_at", "enqueued_at", "data", "description", "retry_intervals")
        for word in (field, value)
    ]
    return redis_connection().register_script(_ENQUEUE_LUA % {**PREFIXES, "alike": ", ".join(alike)})


def peek_head(name: str) -> WorkItem | None:
    """The part whose job has waited longest in a queue; None where none waits. Raises RedisError.

    What is no job of ours tells nothing: then it is a part before all others.
    """
    waiting = queue(name)
    with suppress(UnicodeDecodeError):  # an id that RQ could not have made
        ids = waiting.get_job_ids(0, 1)
        if not ids:
            return None
        if job := waiting.fetch_job(ids[0]):
            return WorkItem(*job.args)
    return WorkItem(0, 0)


def remove_rejected_retries() -> None:
    """Delete the due retries that BelfryJob rejects, before RQ's scheduler reads them with its own class.

    It would end at the first one that it cannot read, each time. Raises RedisError.
    """
    for name in QUEUES:
        registry = queue(name).scheduled_job_registry
        number = tuning.enqueue_batch_size * 2
        due: Any = redis_connection().zrangebyscore(registry.key, 0, time.time(), start=0, num=number)
        ids = [entry for entry in due if _is_job_id(entry)]
        if unreadable := [entry for entry in due if not _is_job_id(entry)]:
            log.error("%s entries of %s are not ids of jobs, and are removed", len(unreadable), registry.key)
            redis_connection().zrem(registry.key, *unreadable)
        if ids:
            BelfryJob.fetch_many([entry.decode() for entry in ids], redis_connection())
