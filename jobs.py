"""Every function that RQ may run, and the sweep. What runs later.

A job takes ids, reloads everything, and may run twice. RQ's own worker runs them as well:
`rq worker -S json --job-class job_class.BelfryJob notifications bulk deliveries`. Without that class it would run
whatever function a job in Redis names.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peewee import InterfaceError, OperationalError
from rq import get_current_job
from rq.job import Job
from rq.timeouts import JobTimeoutException

from belfry.core import logging_setup
from belfry.core.db import database_connection
from belfry.core.failpoints import failpoint
from belfry.fanout import claims, fanout
from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from belfry.stream import publish
from config import settings, tuning

log = logging.getLogger(__name__)


RETRY_GRACE_SECONDS = 5  # after a retry should have begun, before the sweeper takes it for lost
_at_once: Job | None = None  # the job that `do_at_once` does
_failed: tuple[str, Exception] | None = None  # the id of the one that failed there, and why


def notify(run_id: int) -> None:
    """Fan out one run; of one with a large audience, share it out and tell the mentioned. Queue `notifications`.

    The small ones that wait behind it are done in the same transaction: a commit, a statement and a job for all of
    them. Retried with growing intervals; what failed is on the run.
    """
    part = WorkItem(run_id)
    with job_context(part):
        taken = claims.claim_batch(run_id, queues.peek_runs(tuning.max_batch_runs), settings.slice_members)
        left = _run_batch(taken, run_id) if taken else []
        if run_id not in taken:
            _claim_and_run(part)
        elif run_id in left:
            _run(part, 1)
        failpoint("job.done", run_id)


def notify_slice(run_id: int, after: int) -> None:
    """Fan out the slice of a large run that begins after a user id. Queue `bulk`; otherwise as `notify`."""
    part = WorkItem(run_id, after)
    with job_context(part):
        _claim_and_run(part)
        failpoint("job.done", run_id, after)


ENTRY_POINTS: dict[str, Callable[..., None]] = {"jobs.notify": notify, "jobs.notify_slice": notify_slice}


def do_at_once(job: Job) -> bool:
    """Do a job without RQ's accounts of it, which take longer than to tell 50 people; False where it is none of ours.

    Whatever goes wrong is written down as ever, and goes up to the caller: RQ is to meet it, by `fail_as_before`.
    """
    global _at_once, _failed
    entry_point = ENTRY_POINTS.get(job.func_name)
    if entry_point is None:
        return False
    _at_once, _failed = job, None
    try:
        entry_point(*job.args)
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
def job_context(part: WorkItem) -> Iterator[None]:
    global _failed
    job, failed = _this_job(), _failed
    _failed = None
    if failed and job and job.id == failed[0]:
        raise failed[1]
    with logging_setup.context(run_id=part.run_id, job_id=job.id if job else None), database_connection():
        failpoint("job.begun", part.run_id, part.after)
        yield


def _run_batch(taken: list[int], first: int) -> list[int]:
    """Fan out runs that were taken together; those that are not done: of the others the failure is on the run."""
    for run_id in taken:
        failpoint("run.taken", run_id)
    others = [run_id for run_id in taken if run_id != first]
    if others:
        queues.remove_jobs(others)
    try:
        done = fanout.process_batch(taken)
    except (JobTimeoutException, OperationalError, InterfaceError):
        raise  # no fault of any of them: their leases end, and the sweeper goes on
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("%s runs together failed, and are tried one by one: %s", len(taken), reason)
        done = []
    for run_id in done:
        failpoint("run.committed", run_id)
    if done:
        publish.publish(told=True)
        log.info("%s: done%s", WorkItem(done[0]), f", with {len(done) - 1} others" if len(done) > 1 else "")
    left = sorted(set(taken) - set(done))
    for run_id in left:
        if run_id != first:
            try:
                _run(WorkItem(run_id), 1)
            except (JobTimeoutException, OperationalError, InterfaceError):
                raise  # the job's time is up, or the database away: the leases end, and the sweeper goes on
            except Exception:
                log.info("%s: its failure is on it, and the sweeper begins it again", WorkItem(run_id))
    return left


def _claim_and_run(part: WorkItem) -> None:
    attempt = claims.claim(part)
    if attempt is None:
        log.info("%s: nothing to do: it is done, has failed (`flask runs retry`), or is in other hands", part)
        return
    failpoint("run.taken" if part.after is None else "slice.taken", part.run_id, part.after)
    _run(part, attempt)


def _run(part: WorkItem, attempt: int) -> None:
    try:
        slices = fanout.process_work_item(part, attempt)
    except Exception as error:
        failpoint("failure.met", part.run_id, part.after)
        log.warning("%s failed: %s: %s", part, type(error).__name__, error)
        # Written down, and up it goes: RQ's retry must see it. Where the connection broke this fails as well,
        # and rightly so: that is no fault of the message's, its lease has ended, and the sweeper goes on.
        claims.record_failure(part, attempt, f"{type(error).__name__}: {error}", _retry_deadline(_this_job()))
        failpoint("failure.written", part.run_id, part.after)
        raise
    if slices is None:
        log.info("%s: attempt %s was overtaken by a later one, wrote nothing, and does not count", part, attempt)
        claims.release(part)
        return
    failpoint("run.committed" if part.after is None else "slice.committed", part.run_id, part.after)
    publish.publish(told=True)
    if slices:
        queues.enqueue(slices)
    log.info("%s: done%s", part, f", {len(slices)} slices to go" if slices else "")


def _retry_deadline(job: Any) -> float | None:
    """Seconds until the sweeper takes the retry of a job that fails now for lost; None where there will be none."""
    return job.get_retry_interval() + RETRY_GRACE_SECONDS if job and job.retries_left else None
