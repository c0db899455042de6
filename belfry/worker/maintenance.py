"""The sweep: recover lost work, enqueue due retries, maintain partitions, delete old rows."""

import logging
import threading
import time
from collections.abc import Callable
from functools import cache, partial

from peewee import InterfaceError, OperationalError
from redis import Redis
from redis.exceptions import RedisError
from rq.scheduler import RQScheduler

from belfry.core import partitions, redis
from belfry.core.db import ROUND_TRIPS, database_connection, transaction, try_xact_lock
from belfry.core.failpoints import failpoint
from belfry.core.locks import SWEEP_LOCK
from belfry.fanout import recovery
from belfry.queue import queues, sweep_status
from belfry.worker.cleanup import CLEANUPS, clean_up
from config import settings, tuning

log = logging.getLogger(__name__)
_partitions_looked_at = 0.0  # `time.monotonic()`
_indexing: threading.Thread | None = None  # at the index of a partition that was left


def sweep() -> int:
    """Run each of SWEEP_PARTS by itself; how many parts of runs were enqueued again. 0 too where another worker sweeps.

    Recovery comes first. A part that fails is logged and recorded (`queues.record_sweep`), and stops no other. Raises
    peewee's errors where no connection can be opened, since the other parts would wait for one in vain as well.
    """
    swept = 0
    failures: dict[str, bool] = {}
    try:
        for name, part in SWEEP_PARTS.items():
            failures[name] = True  # unless it gets to its end
            with database_connection():
                try:
                    found = part()
                    if found is None:
                        del failures[name]
                    else:
                        failures[name] = False
                    if name == sweep_status.RECOVERY:
                        swept = found or 0
                except (RedisError, OperationalError, InterfaceError) as error:
                    log.warning("%s has to wait for the next sweep: %s", name, error)
                except Exception:
                    log.exception("%s failed", name)
    finally:
        sweep_status.record_sweep(failures)
    return swept


def _recover() -> int | None:
    """Enqueue again what nobody takes care of; how many parts that were. None while another worker does it.

    One sweeper at a time, by an advisory lock that ends with its transaction. Raises RedisError while Redis is away.
    """
    oldest = {name: queues.peek_head(name) for name in (queues.NOTIFICATIONS, queues.BULK)}
    room = tuning.max_queue_length - queues.queue().count
    with transaction(statement_timeout="20s") as round_trip:
        if not try_xact_lock(SWEEP_LOCK):
            return None
        failpoint("sweep.locked")
        # Where PostgreSQL answers slowly, whoever claimed a part is as slow to lock it, and lives.
        grace = min(ROUND_TRIPS * round_trip, settings.job_timeout_seconds)
        if given_up := recovery.fail_exhausted(grace):
            log.error("%s run(s) or slice(s) gave up: each attempt ended without a word", given_up)
        lost = recovery.requeue_lost_runs(oldest[queues.NOTIFICATIONS], grace)
        lost += recovery.requeue_lost_slices(oldest[queues.BULK], grace)
        pending = recovery.queue_pending_runs(room - len(lost))
        failpoint("sweep.marked")
    failpoint("sweep.committed")
    swept = len(lost) if queues.enqueue(lost, lost=True) else 0
    swept += len(pending) if queues.enqueue(pending) else 0
    failpoint("sweep.enqueued")
    if swept:
        log.info("swept: %s part(s) that nobody took care of, %s that were pending", len(lost), len(pending))
    return swept


def _maintain_partitions() -> bool | None:
    """Make, leave and drop partitions, from time to time, and at once where one is missing; None in between.

    Raises OperationalError where somebody who reads for long stands in the way.
    """
    global _partitions_looked_at, _indexing
    gaps = partitions.missing_ranges()
    for gap in gaps:
        log.error("message ids from %s to below %s have no partition: their runs fail until it is made",
                  gap.after_or_at or "the lowest", gap.below)  # fmt: skip
    if not gaps and time.monotonic() - _partitions_looked_at < tuning.partition_check_seconds:
        return None
    _partitions_looked_at = time.monotonic()
    partitions.maintain()
    if _indexing is None or not _indexing.is_alive():
        for name in partitions.partitions_missing_unread_index()[:1]:
            _indexing = threading.Thread(target=partitions.create_unread_index, args=(name,), daemon=True)
            _indexing.start()  # it may take minutes, in which others wait for the next sweep
    return True


@cache
def _scheduler(connection: Redis) -> RQScheduler:
    """RQ's scheduler, without its process: that outlives a worker that is killed, and nobody ends it."""
    scheduler = RQScheduler(queues.QUEUES, connection=connection, serializer="json")
    scheduler.prepare_registries(queues.QUEUES)
    return scheduler


def _enqueue_retries() -> bool:
    """Put the retries whose time has come into their queues. One that does not come is found by recovery."""
    queues.remove_rejected_retries()
    _scheduler(redis.redis_connection()).enqueue_scheduled_jobs()
    return True


SWEEP_PARTS: dict[str, Callable[[], int | None]] = {
    sweep_status.RECOVERY: _recover,
    "scheduled_retries": _enqueue_retries,
    "partitions": _maintain_partitions,
    **{name: partial(clean_up, name) for name in CLEANUPS},
}
"""{part of the sweep: what does it}, in their order. None is returned where it was another's turn, or not yet time."""
