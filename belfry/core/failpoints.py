"""Named points of the path at which a process may come to its end: `make chaos` kills there.

In production nobody listens, and a point costs one comparison.
"""

from collections.abc import Callable

FAILPOINTS = {
    "post.written": "the message and its run are written, and not committed",
    "post.committed": "they are committed, and Redis knows nothing of it",
    "run.enqueued": "a run's job is in the queue, and whoever caused it has no answer yet",
    "edit.written": "an edit and its run are written, and not committed",
    "edit.committed": "they are committed, and Redis knows nothing of it",
    "delete.written": "a deletion is written, and not committed",
    "read.written": "notifications are marked read, and not committed",
    "preference.written": "a preference is written, and not answered",
    "replay.committed": "a replay's run is committed, and Redis knows nothing of it",
    "worker.dequeued": "the worker has taken a job out of the queue, and nobody has begun it",
    "worker.forked": "the work-horse runs",
    "job.begun": "the job has begun, and has asked for nothing",
    "run.claimed": "an attempt at a run is counted, and nothing is locked",
    "run.locked": "the run is locked, and nothing is written",
    "run.planned": "a large run's slices are written, and not committed",
    "run.notified": "notifications are written, and not counted",
    "run.counted": "everything of the run's own part is written, and not committed",
    "run.committed": "the run's own part is committed; its slices, if any, are not in the queue",
    "slice.claimed": "an attempt at a slice is counted, and nothing is locked",
    "slice.locked": "the slice is locked, and nothing is written",
    "slice.notified": "its notifications are written, and not counted",
    "slice.counted": "everything of the slice is written, and not committed",
    "slice.committed": "the slice is committed, and RQ does not know that the job is done",
    "job.done": "the job has done all that it has to, and RQ does not know",
    "attempt.failed": "an attempt has failed, and nothing is recorded",
    "attempt.recorded": "the failure is recorded on the run, and RQ does not know",
    "sweep.locked": "the sweeper has its lock, and has found nothing yet",
    "sweep.marked": "what is to be enqueued again is marked so, and not committed",
    "sweep.committed": "it is marked so, and not in the queue",
    "sweep.enqueued": "it is in the queue",
}

TEST_POINTS = {
    "user.read": "a user to be changed is read, and not changed",
    "message.locked": "a message to be changed is locked, and not read again",
}
"""At these, tests change something meanwhile; `make chaos` does not kill there."""

listener: Callable[[str, int | None, int | None], None] | None = None


def failpoint(name: str, run_id: int | None = None, after: int | None = None) -> None:
    """Say that the process has come to one of FAILPOINTS, with a run, or the slice of one after a user id, in hand."""
    if listener is not None:
        listener(name, run_id, after)
