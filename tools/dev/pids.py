"""Which process wrote this pid file, if it still runs, and how to end it.

A pid is a number that the kernel gives to somebody else later on, soon in a container. So a process counts
as ours only if one argument of its command line is a path of ours. Nothing is ever signalled for its name.
"""

import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def process_of(pid_files: Iterable[Path], argument: Path) -> psutil.Process | None:
    """The running process whose pid begins one of the files, and which was started with `argument`."""
    for pid_file in pid_files:
        process, command_line = _named_in(pid_file)
        if str(argument) in command_line:
            return process
    return None


def pid_is_somebody_elses(pid_file: Path, argument: Path) -> bool:
    """Whether the file's pid now belongs to a process that was not started with `argument`."""
    _, command_line = _named_in(pid_file)
    return bool(command_line) and str(argument) not in command_line


def _named_in(pid_file: Path) -> tuple[psutil.Process | None, list[str]]:
    """The process whose pid begins the file, and its command line; None and [] where there is none to be had."""
    try:
        process = psutil.Process(int(pid_file.read_text().split("\n", 1)[0]))
        return process, process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return None, []


def end(process: psutil.Process, *steps: tuple[signal.Signals, float]) -> None:
    """Send one signal after the other, each with its seconds to take effect, until the process has ended."""
    for signum, seconds in steps:
        with suppress(psutil.NoSuchProcess):  # psutil's word for a pid that is another's by now, as well
            process.send_signal(signum)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if has_ended(process):
                return
            time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more. One that nobody has asked how it ended counts: in a container nobody may."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
