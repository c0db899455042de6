"""The job class of Belfry's workers: it accepts only calls of the entry points of jobs.py with ids.

RQ imports and calls any function that a job in Redis names, as the job or as one of its callbacks. This class checks
every stored field before RQ reads it. A job that fails the check is logged, deleted and treated as missing, so RQ skips
it. Belfry's worker uses the class; for RQ's own worker it is an option:

    rq worker -S json --job-class belfry.queue.job_class.BelfryJob notifications bulk deliveries
"""

import json
import logging
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus, parse_job_id
from rq.serializers import JSONSerializer

from belfry.core.db import LARGEST_ID

log = logging.getLogger(__name__)

ENTRY_POINTS = {"jobs.notify": 1, "jobs.notify_slice": 2}  # {function: number of ids}
MAX_CALL_BYTES = 200  # of JSON: an entry point's name and its ids
MAX_LOGGED_CHARACTERS = 100  # of an id

_FLAG, _SECONDS = rb"[01]", rb"-?[0-9]{1,9}"
_TIME = rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,6})?Z"
# The fields of a job that may have a value, and which. All others must be empty, because RQ could act on them:
# callbacks, webhooks, dependencies, groups, repeats, rate limits, or features of a later version.
_FIELDS = {
    name.encode(): re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "created_at": _TIME,
        "enqueued_at": _TIME,
        "started_at": _TIME,
        "ended_at": _TIME,
        "last_heartbeat": _TIME,
        "status": "|".join(status.value for status in JobStatus).encode(),
        "origin": rb"notifications|bulk|deliveries",
        "description": rb"[ -~]{0,200}",  # RQ's own worker logs it unescaped
        "worker_name": rb".{0,200}",
        "timeout": rb"[1-9][0-9]{0,4}",  # JOB_TIMEOUT_SECONDS is at most one day
        "ttl": _SECONDS,
        "result_ttl": _SECONDS,
        "failure_ttl": _SECONDS,
        "retries_left": rb"[0-9]{1,2}",
        "number_of_retries": rb"[0-9]{1,4}",
        "retry_intervals": rb"\[[0-9]{1,7}(, [0-9]{1,7}){0,19}\]",
        "enqueue_at_front": _FLAG,
        "enqueue_at_front_on_retry": _FLAG,
    }.items()
}
_IGNORED = b"exc_info"  # compressed text of any length, which Belfry does not read


class RejectedJobError(NoSuchJobError):  # type: ignore[misc]
    """The stored job is not a call of an entry point with ids. The message says why."""


class BelfryJob(Job):  # type: ignore[misc]
    """A call of one of ENTRY_POINTS. Any other job is logged, deleted and treated as missing when it is read."""

    def __init__(self, id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:
        # Always JSON: RQ's default is pickle, which executes what it reads.
        super().__init__(id, connection, JSONSerializer)

    def use_attempt(self, attempt: int) -> None:
        """Make the job use an attempt that is claimed already. This is not stored in Redis."""
        self._kwargs: dict[str, Any] = {"attempt": attempt}

    @classmethod
    def fetch(cls, id: str, connection: Redis, serializer: Any = None) -> "BelfryJob":
        """Read one job. Raises NoSuchJobError where it is missing or rejected."""
        job_id = parse_job_id(id)
        try:
            stored: Any = connection.hgetall(cls.key_for(job_id))
        except ResponseError as error:
            stored = error
        job = cls._accepted(job_id, stored, connection)
        if job is None:
            raise NoSuchJobError(f"There is no job {job_id[:MAX_LOGGED_CHARACTERS]!a}, or it was rejected")
        return job

    @classmethod
    def fetch_many(
        cls, job_ids: Iterable[str], connection: Redis, serializer: Any = None
    ) -> "list[BelfryJob | None]":
        """Read several jobs in one round trip; None in place of each that is missing or rejected."""
        parsed_ids = [parse_job_id(job_id) for job_id in job_ids]
        with connection.pipeline(transaction=False) as pipeline:
            for job_id in parsed_ids:
                pipeline.hgetall(cls.key_for(job_id))
            found = pipeline.execute(raise_on_error=False)
        return [cls._accepted(job_id, stored, connection) for job_id, stored in zip(parsed_ids, found, strict=True)]

    @classmethod
    def _accepted(cls, job_id: str, stored: Any, connection: Redis) -> "BelfryJob | None":
        """The job of a stored hash; None where the hash is empty, or the job is rejected, which deletes it."""
        try:
            if isinstance(stored, RedisError):
                if not str(stored).startswith("WRONGTYPE"):
                    raise stored
                raise RejectedJobError("it is not stored as a hash")
            if not stored:
                return None
            job = cls(job_id, connection)
            job.restore(stored)
        except (RejectedJobError, ValueError) as error:  # RQ raises ValueError for an id that it cannot have created
            # In ASCII, because RQ's own worker logs control characters unescaped.
            log.error("job %a is rejected and deleted: %s", job_id[:MAX_LOGGED_CHARACTERS], str(error)[:200])
            connection.unlink(cls.key_for(job_id))
            return None
        return job

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Read the stored fields. Raises RejectedJobError where Belfry would not write one of them."""
        fields = dict(raw_data)
        fields.pop(_IGNORED, None)
        data = _decompressed(fields.pop(b"data", b""))
        for name, value in fields.items():
            if value and not ((pattern := _FIELDS.get(name)) and pattern.fullmatch(value)):
                raise RejectedJobError(f"its field {name[:MAX_LOGGED_CHARACTERS]!a} must be empty or different")
        function, arguments = _call(data)
        try:
            super().restore({**fields, b"data": data})
        except ValueError as error:  # a date that does not exist, or a name that is not UTF-8
            raise RejectedJobError(f"it cannot be read: {str(error)!a}") from None
        # RQ would parse the data again; what was checked is what runs.
        self._func_name, self._instance, self._args = function, None, arguments
        self._kwargs = {}


def _decompressed(stored: bytes) -> bytes:
    """Decompress the call, at most MAX_CALL_BYTES of it. Raises RejectedJobError where it is longer."""
    reader = zlib.decompressobj()
    try:
        data = reader.decompress(stored, MAX_CALL_BYTES + 1)
    except zlib.error:
        data = stored  # RQ accepts uncompressed data
    if len(data) > MAX_CALL_BYTES:
        raise RejectedJobError("its data is too long")
    return data


def _call(data: bytes) -> tuple[str, list[int]]:
    """Parse the call: (entry point, ids). Raises RejectedJobError where it is anything else."""
    try:
        function, instance, arguments, options = json.loads(data)
    except (ValueError, TypeError, RecursionError):
        raise RejectedJobError("its data is not a call in JSON") from None
    if not isinstance(function, str) or function not in ENTRY_POINTS:
        raise RejectedJobError("its function is not an entry point")
    if instance is not None or options != {}:
        raise RejectedJobError("it has an instance or keyword arguments")
    if not isinstance(arguments, list) or len(arguments) != ENTRY_POINTS[function]:
        raise RejectedJobError("its number of arguments is wrong")
    if not all(type(number) is int and 0 <= number <= LARGEST_ID for number in arguments):
        raise RejectedJobError("an argument is not an id")
    return function, arguments
