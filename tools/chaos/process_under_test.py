"""Run a module with failpoints: `python -m tools.chaos.process_under_test DIR MODULE ARGUMENT...`.

DIR is shared with the harness. A file `armed/FAILPOINT` in it contains the action for the first process that reaches
the failpoint; the process removes the file, so that only one does it. Progress of runs is appended to `progress`, each
action to `hits`, one line in one write, so that lines of several processes do not mix.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from belfry.core import failpoints

ATTEMPT_FAILED = "attempt.recorded"
PROGRESS = ("run.claimed", "run.committed", "slice.claimed", "slice.committed", ATTEMPT_FAILED)
"""Failpoints which show that a run is being processed."""

KILL, KILL_WITH_PARENT, STOP = "kill", "kill with parent", "stop"


class ArmedProcess:
    """This process and its forks, which execute the actions of armed failpoints."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._main = os.getpid()

    def on_failpoint(self, point: str, run_id: int | None, after: int | None) -> None:
        if point in PROGRESS:
            self._append("progress", f"{time.time():.3f} {run_id} {after} {point}")
        action = self._action_for(point)
        if action is None:
            return
        self._append("hits", f"{time.time():.3f} {os.getpid()} {run_id or 0} {after} {point} {action}")
        if action == KILL_WITH_PARENT and os.getppid() == self._main:
            os.kill(self._main, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if action == STOP else signal.SIGKILL)

    def _action_for(self, point: str) -> str | None:
        order = self._directory / "armed" / point
        if not order.exists():
            return None
        claimed = order.with_name(f".{point}-{os.getpid()}-{time.monotonic_ns()}")
        try:
            order.rename(claimed)  # succeeds in only one of several processes
        except FileNotFoundError:
            return None
        action = claimed.read_text()
        claimed.unlink()
        return action

    def _append(self, name: str, line: str) -> None:
        descriptor = os.open(self._directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)


def run_module(arguments: list[str]) -> None:
    """Continue as `python -m ARGUMENTS` in this process, with everything that was changed in it."""
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def main() -> None:
    directory, *arguments = sys.argv[1:]
    failpoints.on_failpoint = ArmedProcess(Path(directory)).on_failpoint
    run_module(arguments)


if __name__ == "__main__":
    main()
