"""The harness of `make chaos`: a web process and two workers that are restarted when they end, as a platform does."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

import psutil

from tools.chaos.process_under_test import KILL
from tools.dev import harness, stack
from tools.dev.processes import Child

WEB, WORKERS = "web", ("worker-1", "worker-2")
ARMED_SECONDS = 3.0  # for which a failpoint waits for a process
GUNICORN_OPTIONS = ("--graceful-timeout=5", "--timeout=15", "--threads=4", "--workers=2", "--log-level=warning")
SETTINGS = harness.UNDER_LOAD | {"RATE_LIMIT_ANONYMOUS": "1000000 per minute", "FANOUT_SLICE_SIZE": "200"}


class FailpointHit(NamedTuple):
    """A process killed or stopped itself at a failpoint, perhaps with a current work item: `run_id`, and `after` as in
    a ProgressEvent."""

    when: float
    pid: int
    run_id: int | None
    after: str
    point: str
    action: str


class ProgressEvent(NamedTuple):
    """A process claimed or committed a work item: the run itself ("None"), or its slice after a user id."""

    when: float
    run_id: int
    after: str
    point: str


class ChaosHarness(harness.Harness):
    """A harness whose processes have failpoints and are restarted. `logs` has their logs."""

    def __init__(self, data_dir: Path, env: dict[str, str], listening: socket.socket) -> None:
        super().__init__(data_dir, env, listening)
        self.logs = data_dir / "chaos"
        (self.logs / "armed").mkdir(parents=True)
        self._running: dict[str, tuple[Child, ExitStack]] = {}
        self.restarts = 0

    @classmethod
    @contextmanager
    def create(cls) -> Iterator[Self]:
        """Yield a harness without processes; those that run when the block ends are ended."""
        with cls.start("chaos", SETTINGS, stops_servers=True) as created:
            try:
                yield created
            finally:
                for _, resources in created._running.values():
                    resources.close()

    # Processes --------------------------------------------------------------------------------------------

    def keep_running(self) -> None:
        """Start every process that does not run."""
        for name in (WEB, *WORKERS):
            if name in self._running:
                child, resources = self._running[name]
                if child.process.poll() is None:
                    continue
                resources.close()
                self.restarts += 1
            self._running[name] = self._start(name)

    def _start(self, name: str) -> tuple[Child, ExitStack]:
        log, through = self.logs / f"{name}.log", ("tools.chaos.process_under_test", str(self.logs))
        resources = ExitStack()
        process = (
            stack.web_process(self.env, self.listening, log, through=through, options=GUNICORN_OPTIONS)
            if name == WEB
            else stack.worker(self.env, log, through=through)
        )
        return resources.enter_context(process), resources

    def wait_until_ready(self) -> None:
        """Wait for the web process. Raises CommandError when it does not answer within a minute."""
        stack.wait_until_ready(self.address, self.keep_running)

    def main_pid(self, name: str) -> int:
        return self._running[name][0].process.pid

    def children_of(self, name: str) -> list[int]:
        """Return the pids of a worker's work-horse, or of the web process's workers."""
        with suppress(psutil.Error):
            return [child.pid for child in psutil.Process(self.main_pid(name)).children()]
        return []

    def send_signal(self, pid: int, signum: signal.Signals) -> bool:
        """Send a signal to one of the processes; returns whether it existed."""
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
            return True
        return False

    # Failpoints -------------------------------------------------------------------------------------------

    def arm(self, point: str, action: str = KILL) -> bool:
        """Make the first process that reaches the failpoint do that to itself; returns whether one did."""
        order = self.logs / "armed" / point
        unfinished = order.with_name(f".{point}")
        unfinished.write_text(action)
        unfinished.rename(order)
        deadline = time.monotonic() + ARMED_SECONDS
        while order.exists():
            self.keep_running()
            if time.monotonic() > deadline:
                with suppress(FileNotFoundError):
                    order.unlink()
                    return False
                break
            time.sleep(0.02)
        return True

    def failpoint_hits(self) -> list[FailpointHit]:
        """Return everything that processes did to themselves at failpoints."""
        found = (line.split(" ", 5) for line in self._lines("hits"))
        return [
            FailpointHit(float(when), int(pid), int(run_id) or None, after, point, action)
            for when, pid, run_id, after, point, action in found
        ]

    def progress_events(self) -> list[ProgressEvent]:
        """Return every claim and commit of a work item."""
        found = (line.split() for line in self._lines("progress"))
        return [ProgressEvent(float(when), int(run_id), after, point) for when, run_id, after, point in found]

    def _lines(self, name: str) -> list[str]:
        path = self.logs / name
        return path.read_text().splitlines() if path.exists() else []
