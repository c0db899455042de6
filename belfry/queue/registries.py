"""Write RQ's records for jobs that are processed in one batch, and for runs that the sweeper fails.

RQ's own life cycle takes six round trips for each job, which is longer than notifying the audience of a small message.
So two scripts write the same keys for a whole batch, one before it and one after it. Every reader of RQ's keys
(rq-dashboard, `rq info`, /metrics) sees each job started and then finished, as with RQ's own worker. Jobs that are not
processed in a batch, and jobs that fail, go through RQ's life cycle.
"""

import json
import logging
import uuid
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from redis import ConnectionPool, Redis
from redis.commands.core import Script
from redis.exceptions import NoScriptError, RedisError
from rq import Queue
from rq.job import Job, JobStatus
from rq.results import Result
from rq.utils import current_timestamp, now, utcformat
from rq.worker.base import BaseWorker

from config import tuning

log = logging.getLogger(__name__)

RESULT_SECONDS = 86_400
"""How long a finished job and its result are kept."""
FAILURE_SECONDS = 7 * 86_400
"""How long a failed job is kept."""

PREFIXES: dict[str, Any] = {
    "job": Job.key_for(""),
    "execution": "rq:execution:",
    "executions": "rq:executions:",
    "results": Result.get_key(""),
    "successful": Result.Type.SUCCESSFUL.value,
}
"""Parts of RQ's keys and values, for the scripts."""

_START_LUA = """
-- KEYS: queue, started registry, the worker's executions, the worker.
-- ARGV: now as text, now, ttl, worker, execution, job ids.
local at, time, ttl, worker, execution = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
for number = 6, #ARGV do
    local id = ARGV[number]
    local entry = id .. ':' .. execution
    redis.call('LREM', KEYS[1], 1, id)
    if redis.call('EXISTS', '%(job)s' .. id) == 1 then
        redis.call('HSET', '%(job)s' .. id, 'status', 'started', 'started_at', at, 'last_heartbeat', at,
            'worker_name', worker)
    end
    redis.call('HSET', '%(execution)s' .. entry, 'id', execution, 'job_id', id, 'created_at', time,
        'last_heartbeat', time, 'worker_name', worker)
    redis.call('EXPIRE', '%(execution)s' .. entry, ttl)
    redis.call('ZADD', '%(executions)s' .. id, time + ttl + 60, execution)
    redis.call('EXPIRE', '%(executions)s' .. id, ttl + 60)
    redis.call('ZADD', KEYS[2], time + ttl, entry)
    redis.call('SADD', KEYS[3], entry)
end
redis.call('EXPIRE', KEYS[3], ttl + 60)
redis.call('HSET', KEYS[4], 'state', 'busy', 'last_heartbeat', at)
redis.call('EXPIRE', KEYS[4], ttl)
"""

_END_LUA = """
-- KEYS: finished registry, started registry, the worker's executions, the worker.
-- ARGV: now as text, now, seconds that a result is kept, worker, execution, begin of the batch, its duration,
-- and for each job its id and its result, which is empty where the job did not finish.
local at, time, ttl, worker, execution = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local jobs = 0
for number = 8, #ARGV, 2 do
    local id = ARGV[number]
    local entry = id .. ':' .. execution
    redis.call('ZREM', KEYS[2], entry)
    redis.call('SREM', KEYS[3], entry)
    redis.call('UNLINK', '%(execution)s' .. entry)
    redis.call('ZREM', '%(executions)s' .. id, execution)
    if ARGV[number + 1] ~= '' then
        jobs = jobs + 1
    end
    -- A job may be gone: Redis was emptied, or an operator deleted it.
    if ARGV[number + 1] ~= '' and redis.call('EXISTS', '%(job)s' .. id) == 1 then
        redis.call('HSET', '%(job)s' .. id, 'status', 'finished', 'ended_at', at)
        redis.call('EXPIRE', '%(job)s' .. id, ttl)
        redis.call('XADD', '%(results)s' .. id, 'MAXLEN', 10, '*', 'type', '%(successful)s', 'worker_name', worker,
            'return_value', ARGV[number + 1], 'execution_id', execution, 'execution_started_at', ARGV[6],
            'execution_ended_at', time)
        redis.call('EXPIRE', '%(results)s' .. id, ttl)
        redis.call('ZADD', KEYS[1], time + ttl, id)
    end
end
redis.call('HINCRBY', KEYS[4], 'successful_job_count', jobs)
redis.call('HINCRBYFLOAT', KEYS[4], 'total_working_time', ARGV[7])
"""

_TRIM_LUA = """
-- KEYS: registries. ARGV: number of jobs that are kept in each.
for _, key in ipairs(KEYS) do
    local surplus = redis.call('ZCARD', key) - ARGV[1]
    if surplus > 0 then
        for _, id in ipairs(redis.call('ZRANGE', key, 0, surplus - 1)) do
            redis.call('UNLINK', '%(job)s' .. id, '%(results)s' .. id)
        end
        redis.call('ZREMRANGEBYRANK', key, 0, surplus - 1)
    end
end
"""


@cache
def _script(connection: Redis, text: str) -> Script:
    return connection.register_script(text % PREFIXES)


def load_scripts(connection: Redis) -> None:
    """Load the script that records the start of a batch, whose response is read too late to load it then."""
    connection.script_load(_script(connection, _START_LUA).script)


class BatchRecord:
    """RQ's records of one batch of a worker. Its methods raise RedisError while Redis is unavailable."""

    def __init__(self, worker: BaseWorker, queue: Queue) -> None:
        self._worker, self._queue = worker, queue
        self._execution_id = uuid.uuid4().hex
        self._started_at = current_timestamp()
        self._finish_start: Callable[[], None] | None = None

    def start(self, job_ids: Sequence[str], ttl: int) -> None:
        """Move jobs from the queue into the started registry, where RQ takes them for abandoned after `ttl` seconds.

        The response is read in `end`, so that a lone message does not wait for it.
        """
        worker = self._worker
        keys = [self._queue.key, self._queue.started_job_registry.key, worker.executions_key, worker.key]
        arguments = [utcformat(now()), self._started_at, ttl, worker.name, self._execution_id, *job_ids]
        script, pool = _script(worker.connection, _START_LUA), worker.connection.connection_pool
        sent: Any = pool.get_connection()
        try:
            sent.send_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except BaseException:
            sent.disconnect()
            pool.release(sent)
            raise
        self._finish_start = partial(_read_response, sent, pool, partial(script, keys, arguments))

    def end(self, results: Mapping[str, Any]) -> None:
        """Move jobs into the finished registry with their results, which are stored as JSON.

        A job whose result is None did not finish, and is only removed from the started registry.
        """
        if self._finish_start:
            try:
                self._finish_start()
            except RedisError as error:
                log.warning("the start of a batch could not be recorded: %s", error)
        worker, moment = self._worker, current_timestamp()
        finished = self._queue.finished_job_registry.key
        keys = [finished, self._queue.started_job_registry.key, worker.executions_key, worker.key]
        arguments: list[Any] = [utcformat(now()), moment, RESULT_SECONDS, worker.name, self._execution_id]
        arguments += [self._started_at, max(0.0, moment - self._started_at)]
        for job_id, result in results.items():
            arguments += [job_id, "" if result is None else b64encode(json.dumps(result).encode())]
        _script(worker.connection, _END_LUA)(keys, arguments)


def _read_response(sent: Any, pool: ConnectionPool, call_again: Callable[[], Any]) -> None:
    """Read the response to a script that was sent, and send it again where Redis does not know the script."""
    try:
        sent.read_response()
    except NoScriptError:
        call_again()
    except BaseException:
        sent.disconnect()
        raise
    finally:
        pool.release(sent)


def trim(connection: Redis, queue: Queue) -> None:
    """Delete the oldest finished and failed jobs of a queue beyond `tuning.max_ended_jobs` each. Raises RedisError."""
    keys = [queue.finished_job_registry.key, queue.failed_job_registry.key]
    _script(connection, _TRIM_LUA)(keys, [tuning.max_ended_jobs])


def record_failed(job: Job, queue: Queue, error: str) -> None:
    """Add a job to the failed registry, for a failure that no worker could report. Raises RedisError."""
    job.ended_at = now()
    with queue.connection.pipeline() as pipeline:
        queue.remove(job.id, pipeline)
        job.set_status(JobStatus.FAILED, pipeline=pipeline)
        queue.failed_job_registry.add(job, FAILURE_SECONDS, pipeline=pipeline)
        Result.create_failure(job, FAILURE_SECONDS, error, pipeline=pipeline)
        pipeline.execute()
