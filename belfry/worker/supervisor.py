"""The parent process of a worker: it sweeps, and keeps one child process that runs the jobs, the work-horse."""

import contextlib
import ctypes
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable

from peewee import InterfaceError, OperationalError
from playhouse.pool import MaxConnectionsExceeded

from belfry.core.failpoints import failpoint
from belfry.worker import maintenance
from belfry.worker.deadline import KILL_GRACE_SECONDS, Deadline
from belfry.worker.worker import run_jobs
from config import settings

log = logging.getLogger(__name__)
POLL_INTERVAL_SECONDS = 0.05  # of the parent: how soon a work-horse that died is replaced, except during a sweep
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Supervisor:
    """The parent: it keeps a work-horse running, and sweeps every SWEEP_INTERVAL_SECONDS. It runs no jobs itself."""

    def __init__(self) -> None:
        self._stopping = False
        self._horse = 0
        self._deadline = Deadline()

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, and then until the current job ends."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._stop)
        swept = 0.0
        while not self._stopping:
            if not self._horse:
                self._start_horse()
            if time.monotonic() - swept >= settings.sweep_interval_seconds:
                sweep_once(lambda: self._stopping)
                swept = time.monotonic()
            self._reap_horse()
            time.sleep(POLL_INTERVAL_SECONDS)
        while self._horse:
            self._signal_horse(signal.SIGTERM)
            self._reap_horse()
            time.sleep(POLL_INTERVAL_SECONDS)

    def _stop(self, signum: int, frame: object) -> None:
        self._stopping = True
        self._signal_horse(signal.SIGTERM)

    def _signal_horse(self, signum: signal.Signals) -> None:
        if self._horse:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._horse, signum)

    def _start_horse(self) -> None:
        self._deadline.clear()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._horse = pid
            return
        status = 1
        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, signal.SIG_DFL)  # until RQ sets its own: no job has begun
            _set_parent_death_signal(parent)
            random.seed()
            failpoint("worker.forked")
            run_jobs(self._deadline)
            status = 0
        except Exception:
            log.exception("the work-horse failed")
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap_horse(self) -> None:
        if not self._horse:
            return
        pid, status = os.waitpid(self._horse, os.WNOHANG)
        if pid:
            self._horse = 0
            if status and not self._stopping:
                log.error("the work-horse ended with %s and is replaced", _exit_reason(status))
        elif self._deadline.has_passed():
            log.error("a job exceeds its time-out by %s s: its process is killed", KILL_GRACE_SECONDS)
            self._signal_horse(signal.SIGKILL)
            self._deadline.clear()


def _exit_reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"code {code}"


def _set_parent_death_signal(parent: int) -> None:
    """On Linux, stop the work-horse when its parent dies. Elsewhere it continues, which is harmless."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


def sweep_once(is_stopping: Callable[[], bool] = lambda: False) -> int:
    """Sweep as `maintenance.sweep` does; how many jobs were enqueued. Errors are logged; the next sweep tries again."""
    try:
        return maintenance.sweep(is_stopping)
    except (OperationalError, InterfaceError, MaxConnectionsExceeded) as error:
        log.warning("the database is unavailable, nothing is swept: %s", error)
    except Exception:
        # Without a sweeper lost runs would stay lost: log the error and continue.
        log.exception("the sweep failed")
    return 0


def work(burst: bool = False) -> None:
    """Run jobs until SIGTERM or SIGINT; with `burst`, until the queues are empty and nothing is left to enqueue.

    Waits for Redis where it is unavailable.
    """
    if burst:
        while run_jobs(burst=True) and sweep_once():
            pass
    else:
        Supervisor().run()
