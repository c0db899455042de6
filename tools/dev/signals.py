"""When to stop: Ctrl-C, SIGTERM and a closed terminal are noted when they come, and obeyed where it is safe.

The handler raises nothing. An exception out of a signal can strike between starting a process and writing
down that it was started, or half-way through cleaning up; either would leave something running.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from tools.dev import CommandError, say

Result = TypeVar("Result")


class Stopped(Exception):
    """Somebody asked this command to end. `signum` is how they asked."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


_received: int | None = None


def _note(signum: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signum


def listen() -> None:
    """From here on those signals only make `check_dependencies` and `sleep` raise; code that waits has to use them."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _note)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored: that is what nohup is for
        signal.signal(signal.SIGHUP, _note)


def requested() -> int | None:
    """The signal that asked this command to end; None while nobody has."""
    return _received


def check() -> None:
    """Raises Stopped once somebody has asked this command to end."""
    if _received is not None:
        raise Stopped(_received)


def sleep(seconds: float) -> None:
    """Wait, for at most a tenth of a second longer than somebody's wish to stop. Raises Stopped."""
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        check()


def wait_until(
    condition: Callable[[], Result | None], what: str, seconds: float, interval: float = 0.05
) -> Result:
    """Call `condition` until its result is true, and return that. Raises Stopped, and CommandError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise CommandError(f"Waited {seconds:.0f} s for {what}.")
        sleep(interval)
    return result


def exit_status(command: Callable[[], int]) -> int:
    """Run a command; returns its exit status, 1 after a CommandError, or 128 and the number of the signal."""
    listen()
    try:
        return command()
    except Stopped as stopped:
        say("\nStopped.")
        return 128 + stopped.signum
    except CommandError as error:
        say(f"\n{error}")
        return 1
