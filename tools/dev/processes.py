"""Start, recognise and end the processes of a development command.

The kernel gives the pid in an old pid file to another process later, in a container soon. So a process counts as ours
only if one argument of its command line is a path of ours. No process is ever selected by its name.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil  # type: ignore[import-untyped]

from tools.dev import ROOT, CommandError, last_lines, signals

RETRY_GRACE_SECONDS = 15  # after SIGTERM: enough for a job to end, short enough to wait for
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Child:
    """A process of ours. `log` is where it writes; None where that is the terminal."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path | None

    def check(self) -> None:
        """Raises CommandError, with the end of its log, once it has ended: it should not have."""
        status = self.process.poll()
        if status is None:
            return
        by_signal = f"was ended by {signal.Signals(-status).name}" if status < 0 else None
        how = by_signal or f"has ended with status {status}"
        lines = f" Its last lines, of {self.log}:\n{last_lines(self.log)}" if self.log else ""
        raise CommandError(f"The {self.name} {how}.{lines}")


@contextmanager
def running(
    name: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    *,
    log: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Child]:
    """While the block runs, `python ARGUMENTS` does, with its output in `log` or on the terminal.

    At the end it gets SIGTERM, and what is left of it after RETRY_GRACE_SECONDS gets SIGKILL, with its children.
    """
    output = _private_log(log) if log else None
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            pass_fds=pass_fds,
            start_new_session=True,  # Ctrl-C reaches this command alone, which then ends them in order
            preexec_fn=_end_with_parent(),
        )
    finally:
        if output:
            output.close()
    try:
        yield Child(name, process, log)
    finally:
        finish(process)


def _private_log(path: Path) -> BinaryIO:
    """The log, to append to it, for its owner alone: what goes wrong may be in it with what it went wrong on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.fchmod(descriptor, 0o600)  # one that is there already may be readable by all
    return open(descriptor, "ab")


def finish(process: "subprocess.Popen[bytes]", signum: signal.Signals = signal.SIGTERM) -> None:
    """Ask the process to end, wait, and end it and its children by their ids if it did not."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid)
    process.send_signal(signum)
    try:
        process.wait(RETRY_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        # Asked only now: a child that it started meanwhile would be missing from an older list.
        for member in (*family.children(recursive=True), family):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def output_of(
    arguments: Sequence[str], env: Mapping[str, str], *, seconds: float = 120, show_errors: bool = False
) -> str:
    """What `python ARGUMENTS` prints. With `show_errors` its standard error goes to the terminal.

    Raises CommandError where it fails or takes longer than `seconds`, Stopped when that is asked for; the
    process has ended in any case.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if show_errors else errors,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + seconds
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise CommandError(f"`{' '.join(arguments)}` took longer than {seconds:.0f} seconds.")
                signals.sleep(0.02)
        finally:
            finish(process)
        if process.returncode != 0:
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip()
            raise CommandError(f"`{' '.join(arguments)}` failed with status {process.returncode}.\n{text}")
        output.seek(0)
        return output.read().decode()


def in_foreground(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `python ARGUMENTS` with the terminal as its own; returns its exit status.

    Ctrl-C reaches it from the terminal, and what follows is its own affair (a debugger goes on). Asked to
    stop in any other way, it gets SIGINT, on which Python cleans up, and SIGKILL when it does not end.
    """
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env)
    try:
        while process.poll() is None:
            signum = signals.requested()
            if signum is not None and not (signum == signal.SIGINT and sys.stdin.isatty()):
                finish(process, signal.SIGINT)
            else:
                time.sleep(0.05)
    finally:
        finish(process, signal.SIGINT)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end_with_parent() -> Callable[[], None] | None:
    """What a child does first, so that not even a killed parent leaves it behind; None where nothing can."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: nothing should be loaded between fork and exec
    parent = os.getpid()

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec


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
