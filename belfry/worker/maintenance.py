"""The sweep: recover lost work, enqueue due retries, maintain partitions, delete old rows."""

import logging
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.context import ForkProcess

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq.exceptions import NoSuchJobError
from rq.scheduler import RQScheduler

from belfry.core import partitions, redis
from belfry.core.db import ROUND_TRIPS, database_connection, transaction, try_xact_lock
from belfry.core.failpoints import failpoint
from belfry.core.locks import SWEEP_LOCK
from belfry.fanout import recovery
from belfry.fanout.claims import WorkItem
from belfry.queue import queues, sweep_status
from belfry.worker.cleanup import CLEANUPS, clean_up
from config import settings, tuning

log = logging.getLogger(__name__)
RETRIES = "scheduled_retries"  # the name of a step
_partitions_checked_at = 0.0  # `time.monotonic()`
_indexing: ForkProcess | None = None
_unrecorded: list[tuple[WorkItem, str]] = []  # failed by this sweeper, each with its error; not yet in RQ's registry


def sweep(is_stopping: Callable[[], bool] = lambda: False) -> int:
    """Run each step of SWEEP_STEPS until `is_stopping`; how many work items and retries were enqueued.

    0 as well where another worker sweeps.

    Recovery comes first. A step that fails is logged and recorded (`sweep_status.record_sweep`), and the next one runs.
    Raises peewee's errors where no connection can be opened, because the other steps could not open one either.
    """
    swept = 0
    failures: dict[str, bool] = {}
    try:
        for name, step in SWEEP_STEPS.items():
            if is_stopping():
                break
            failures[name] = True  # until it has succeeded
            with database_connection():
                try:
                    found = step()
                    if found is None:
                        del failures[name]
                    else:
                        failures[name] = False
                    if name in (sweep_status.RECOVERY, RETRIES):
                        swept += found or 0
                except (RedisError, OperationalError, InterfaceError) as error:
                    log.warning("%s is delayed until the next sweep: %s", name, error)
                except Exception:
                    log.exception("%s failed", name)
    finally:
        sweep_status.record_sweep(failures)
    return swept


def _recover() -> int | None:
    """Enqueue lost and pending work items; how many. None while another worker does it. Raises RedisError.

    An advisory lock that ends with its transaction keeps other sweepers out.
    """
    oldest = {name: queues.peek_head(name) for name in (queues.NOTIFICATIONS, queues.BULK)}
    room = tuning.max_queue_length - queues.waiting_jobs(queues.NOTIFICATIONS)
    with transaction(statement_timeout="20s") as round_trip:
        if not try_xact_lock(SWEEP_LOCK):
            return None
        failpoint("sweep.locked")
        # Where PostgreSQL answers slowly, a live worker needs as long to lock what it has claimed.
        grace = min(ROUND_TRIPS * round_trip, settings.job_timeout_seconds)
        failed = recovery.fail_exhausted(grace)
        lost = recovery.requeue_lost_runs(oldest[queues.NOTIFICATIONS], grace)
        pending = recovery.queue_pending_runs(room - len(lost))
        lost += recovery.requeue_lost_slices(oldest[queues.BULK], grace)
        failpoint("sweep.marked")
    failpoint("sweep.committed")
    swept = len(lost) if queues.enqueue(lost, lost=True) else 0
    swept += len(pending) if queues.enqueue(pending) else 0
    failpoint("sweep.enqueued")
    if swept:
        log.info("swept: enqueued %s lost and %s pending work items", len(lost), len(pending))
    for item, error in failed:
        log.error("%s %s", item, error)
    _unrecorded.extend(failed)
    _record_failed()
    return swept


def _record_failed() -> None:
    """Record the failures that RQ does not show yet. Raises RedisError; the next sweep then continues."""
    while _unrecorded:
        try:
            queues.record_failed(*_unrecorded[0])
        except (ResponseError, NoSuchJobError) as error:
            log.warning("RQ does not show that %s failed: %s", _unrecorded[0][0], error)
        del _unrecorded[0]


def _maintain_partitions() -> bool | None:
    """Create, roll over and drop partitions every `partition_check_seconds`, and at once where one is missing.

    None in between. Raises OperationalError where a long read blocks it.
    """
    global _partitions_checked_at, _indexing
    gaps = partitions.missing_ranges()
    for gap in gaps:
        log.error("message ids from %s to below %s have no partition: their runs fail until it is created",
                  gap.lower or "the lowest", gap.upper)  # fmt: skip
    if not gaps and time.monotonic() - _partitions_checked_at < tuning.partition_check_seconds:
        return None
    _partitions_checked_at = time.monotonic()
    partitions.maintain()
    if _indexing is None or not _indexing.is_alive():
        for name in partitions.partitions_missing_unread_index()[:1]:
            # It may take minutes. In a process, because this one forks, and a thread could hold a lock at that moment.
            _indexing = get_context("fork").Process(target=_create_unread_index, args=(name,), daemon=True)
            _indexing.start()
    return True


def _create_unread_index(name: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    partitions.create_unread_index(name)


@cache
def _scheduler(connection: Redis) -> RQScheduler:
    """RQ's scheduler without its own process, which would outlive a worker that is killed."""
    scheduler = RQScheduler(queues.QUEUES, connection=connection, serializer="json")
    scheduler.prepare_registries(queues.QUEUES)
    return scheduler


def _enqueue_retries() -> int | None:
    """Move due retries into their queues; how many. None while another worker does it. Raises RedisError.

    RQ's scheduler reads the retries before it moves them, so two at the same time would enqueue each twice. A retry
    that is lost is found by recovery.
    """
    with transaction():
        if not try_xact_lock(SWEEP_LOCK):
            return None
        due = queues.remove_rejected_retries()
        _scheduler(redis.redis_connection()).enqueue_scheduled_jobs()
        return due


SWEEP_STEPS: dict[str, Callable[[], int | None]] = {
    sweep_status.RECOVERY: _recover,
    RETRIES: _enqueue_retries,
    "partitions": _maintain_partitions,
    **{name: partial(clean_up, name) for name in CLEANUPS},
}
"""{step: function}, in order. A function returns None where another worker runs the step, or it is not due."""
