"""The functions that RQ may run.

A job takes ids, reloads its rows, and may run twice. Belfry's worker processes many small runs in one batch
(`claim_batch`, `run_batch`). RQ's own worker runs the same jobs one by one:
`rq worker -S json --job-class belfry.queue.job_class.BelfryJob notifications bulk deliveries`. Without that class it
would run any function that a job in Redis names.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rq import get_current_job
from rq.job import Job

from belfry.core import logging_setup
from belfry.core.db import Row, database_connection, fetch_one
from belfry.core.failpoints import failpoint
from belfry.fanout import claims, fanout
from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from belfry.stream import publish
from config import settings, tuning

log = logging.getLogger(__name__)

Result = dict[str, Any]
"""What RQ stores for a finished job: {"run", "state", "summary"}; the summary is one line."""


def notify(run_id: int, attempt: int | None = None) -> Result:
    """Process one run: notify a small audience; for a large one, plan the slices and notify the mentioned members.

    Queue `notifications`. `attempt` is the number of an attempt that the worker has claimed already. Errors are
    recorded on the run and raised, so that RQ retries the job. FailedRunError is raised for a run that failed before.
    """
    return _work_on(WorkItem(run_id), attempt)


def notify_slice(run_id: int, after_user_id: int) -> Result:
    """Process the slice of a large run that begins after a user id. Queue `bulk`; errors as in `notify`."""
    return _work_on(WorkItem(run_id, after_user_id))


def claim_batch(run_id: int) -> list[int]:
    """Claim a run and the small runs behind it in the queue, to be processed in one transaction; their ids.

    [] where none can be claimed. The run itself is missing where it is large or was tried before.
    """
    with _batch_context(run_id):
        failpoint("job.begun", run_id)
        claimed = claims.claim_batch(run_id, queues.peek_runs(tuning.max_batch_runs), settings.fanout_slice_size)
        for one in claimed:
            failpoint("run.claimed", one)
    return claimed


def run_batch(run_ids: Sequence[int]) -> dict[int, Result]:
    """Process claimed runs in one transaction; {run id: result} of those that were processed.

    A run whose message is being changed is left out. Errors are raised, and then nothing has changed.
    """
    with _batch_context(run_ids[0]):
        processed = fanout.process_batch(run_ids)
        for run in processed:
            failpoint("run.committed", run["run_id"])
        if processed:
            publish.publish(notified=True, messages=[run["message_id"] for run in processed])
            others = f", with {len(processed) - 1} others" if len(processed) > 1 else ""
            log.info("%s: done%s", WorkItem(processed[0]["run_id"]), others)
            failpoint("job.done", run_ids[0])
    return {run["run_id"]: _result(run["run_id"], "succeeded", run) for run in processed}


def claim_run(run_id: int) -> tuple[int | None, bool]:
    """Claim a run that is processed alone: (number of the attempt, whether another worker has the run).

    The attempt is None where the run cannot be claimed: another worker has it, it has ended, or its slices follow.
    """
    with _batch_context(run_id):
        attempt = claims.claim(WorkItem(run_id))
        if attempt is not None:
            failpoint("run.claimed", run_id)
        return attempt, attempt is None and fetch_one(_IS_CLAIMED_SQL, {"run_id": run_id}) is not None


@contextmanager
def _batch_context(first: int) -> Iterator[None]:
    with logging_setup.context(run_id=first, job_id=queues.run_job_id(first)), database_connection():
        yield


_IS_CLAIMED_SQL = """
    SELECT
    FROM run
    WHERE id = %(run_id)s
    AND state NOT IN ('succeeded', 'failed')
    AND slices_left = 0
"""

_RESULT_SQL = """
    SELECT state, error, notifications_inserted, COALESCE(members_total, members_processed) AS members_total
    FROM run
    WHERE id = %(run_id)s
"""


def _result(run_id: int, state: str, run: Row) -> Result:
    summary = f"{run['notifications_inserted']} notifications inserted for {run['members_total']} members"
    return {"run": run_id, "state": state, "summary": summary}


class FailedRunError(Exception):
    """The run of a job has failed before, and is not tried again. The message is the run's error."""


@contextmanager
def job_context(item: WorkItem) -> Iterator[Job | None]:
    """Open a database connection and add the ids to the log; yields RQ's current job, None outside RQ."""
    job = get_current_job()
    with logging_setup.context(run_id=item.run_id, job_id=job.id if job else None), database_connection():
        failpoint("job.begun", *item)
        yield job


def _work_on(item: WorkItem, attempt: int | None = None) -> Result:
    with job_context(item) as job:
        if attempt is None:
            attempt = claims.claim(item)
            if attempt is not None:
                failpoint("run.claimed" if item.is_run else "slice.claimed", *item)
        if attempt is None:
            log.info("%s: nothing to do: it is done, has failed (`flask runs retry`), or another worker has it", item)
        else:
            _run(item, attempt, job)
        failpoint("job.done", *item)
        run = fetch_one(_RESULT_SQL, item._asdict())
        if run and run["state"] == "failed" and attempt is None:
            if job:
                job.retries_left = 0
            raise FailedRunError(run["error"])
        return _result(item.run_id, run["state"], run) if run else {"run": item.run_id, "state": "gone", "summary": ""}


def _run(item: WorkItem, attempt: int, job: Job | None) -> None:
    try:
        processed = fanout.process_work_item(item, attempt)
    except Exception as error:
        failpoint("attempt.failed", *item)
        log.warning("%s failed: %s: %s", item, type(error).__name__, error)
        # Raised again after recording, so that RQ retries. Where the connection broke, recording fails too; then the
        # lock has ended with the connection, and the sweeper enqueues the work item again.
        failed = claims.record_failure(item, attempt, f"{type(error).__name__}: {error}", _retry_deadline(job))
        if failed and job:
            job.retries_left = 0  # attempts of killed processes count too, and RQ does not know of them
        failpoint("attempt.recorded", *item)
        raise
    if processed is None:
        log.info("%s: attempt %s was overtaken by a newer one and wrote nothing; it is not counted", item, attempt)
        claims.release(item)
        return
    failpoint("run.committed" if item.is_run else "slice.committed", *item)
    publish.publish(notified=True, messages=[processed.message_id] if item.is_run else [])
    if processed.slices:
        queues.enqueue(processed.slices)
    log.info("%s: done%s", item, f", {len(processed.slices)} slices follow" if processed.slices else "")


def _retry_deadline(job: Job | None) -> float | None:
    """Seconds after which the sweeper takes the retry of a job that fails now for lost; None without a retry."""
    return job.get_retry_interval() + claims.RETRY_GRACE_SECONDS if job and job.retries_left else None
