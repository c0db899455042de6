"""Run a module that dies at failpoints: `python -m tools.chaos.process_under_test DIR MODULE ARGUMENT...`.

DIR is shared with the harness. A file `armed/FAILPOINT` in it says to the first process that reaches the failpoint what
to do; the process removes the file, so that only one does it. Progress of runs is appended to `life` and each death to
`deaths`, one line in one write, so that lines of several processes do not mix.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from belfry.core import failpoints

FAILED = "attempt.recorded"
SIGNS_OF_LIFE = ("run.claimed", "run.committed", "slice.claimed", "slice.committed", FAILED)
"""Failpoints which show that a run is being processed."""

KILL, KILL_WITH_PARENT, STOP = "kill", "kill with parent", "stop"


class Victim:
    """What this process, and every one that it forks, does at the points of the path."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._main = os.getpid()

    def reach(self, point: str, run_id: int | None, after: int | None) -> None:
        if point in SIGNS_OF_LIFE:
            self._write("life", f"{time.time():.3f} {run_id} {after} {point}")
        action = self._armed(point)
        if action is None:
            return
        self._write("deaths", f"{time.time():.3f} {os.getpid()} {run_id or 0} {after} {point} {action}")
        if action == KILL_WITH_PARENT and os.getppid() == self._main:
            os.kill(self._main, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if action == STOP else signal.SIGKILL)

    def _armed(self, point: str) -> str | None:
        order = self._directory / "armed" / point
        if not order.exists():
            return None
        mine = order.with_name(f".{point}-{os.getpid()}-{time.monotonic_ns()}")
        try:
            order.rename(mine)  # of several that come at once, one gets it
        except FileNotFoundError:
            return None
        action = mine.read_text()
        mine.unlink()
        return action

    def _write(self, name: str, line: str) -> None:
        descriptor = os.open(self._directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)


def go_on(arguments: list[str]) -> None:
    """Be `python -m ARGUMENTS` from here on, in this process as it is."""
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def main() -> None:
    directory, *arguments = sys.argv[1:]
    failpoints.on_failpoint = Victim(Path(directory)).reach
    go_on(arguments)


if __name__ == "__main__":
    main()
