"""Failpoints: named points of the code at which `make chaos` kills a process and tests interfere.

Without a listener (`on_failpoint`), as in production, a failpoint costs one comparison.
"""

from collections.abc import Callable

FAILPOINTS = {
    "post.written": "the message and its run are written and not committed",
    "post.committed": "they are committed and not in Redis",
    "run.enqueued": "the run's job is in the queue and the request is not answered",
    "edit.written": "an edit and its run are written and not committed",
    "edit.committed": "they are committed and not in Redis",
    "delete.written": "a deletion is written and not committed",
    "read.written": "notifications are marked read and not committed",
    "preference.written": "a preference is written and the request is not answered",
    "replay.committed": "a replay's run is committed and not in Redis",
    "worker.dequeued": "the worker has removed a job from the queue and not begun it",
    "worker.forked": "the work-horse runs",
    "job.begun": "the job has begun and executed no statement",
    "run.claimed": "an attempt of a run is counted and nothing is locked",
    "run.locked": "the run is locked and nothing is written",
    "run.planned": "the slices of a large run are written and not committed",
    "run.notified": "notifications are written and the run is not updated",
    "run.counted": "everything of the run's first work item is written and not committed",
    "run.committed": "the run's first work item is committed; its slices are not in the queue",
    "slice.claimed": "an attempt of a slice is counted and nothing is locked",
    "slice.locked": "the slice is locked and nothing is written",
    "slice.notified": "its notifications are written and the run is not updated",
    "slice.counted": "everything of the slice is written and not committed",
    "slice.committed": "the slice is committed and RQ has not recorded it",
    "job.done": "the job has finished and RQ has not recorded it",
    "attempt.failed": "an attempt has failed and nothing is recorded",
    "attempt.recorded": "the failure is recorded on the run and not by RQ",
    "sweep.locked": "the sweeper has its lock and has found nothing",
    "sweep.marked": "work items are marked as queued and not committed",
    "sweep.committed": "they are committed and not in the queue",
    "sweep.enqueued": "it is in the queue",
}

TEST_POINTS = {
    "user.read": "a user to be changed is read and not changed",
    "message.locked": "a message to be changed is locked and not read again",
}
"""Tests interfere at these; `make chaos` does not kill there."""

on_failpoint: Callable[[str, int | None, int | None], None] | None = None


def failpoint(name: str, run_id: int | None = None, after_user_id: int | None = None) -> None:
    """Report that the process has reached a failpoint, with the run, or the slice of it, that it processes."""
    if on_failpoint is not None:
        on_failpoint(name, run_id, after_user_id)
