"""File locks that the kernel drops when their holder dies, so that nothing stale can stand in the way."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.dev import CommandError


def open_lock(path: Path) -> int:
    """A descriptor to lock. Its directory is made again where somebody removed it under us."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_exclusive(descriptor: int) -> bool:
    """Whether the lock is now ours alone. It is not waited for."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share(descriptor: int) -> None:
    """Hold the lock along with others."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def let_go(descriptor: int) -> None:
    """Unlock, and not just close: a forked child would keep the lock with its copy of the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def exclusive(
    path: Path, *, seconds: float = 300, pause: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Hold the lock alone. Raises CommandError where another process has it for all those seconds.

    `pause` is called between two tries, and may raise.
    """
    descriptor = open_lock(path)
    try:
        end = time.monotonic() + seconds
        while not try_exclusive(descriptor):
            if time.monotonic() > end:
                raise CommandError(f"Another process has held {path} for {seconds:.0f} seconds.")
            pause(0.05)
        try:
            yield
        finally:
            let_go(descriptor)
    finally:
        os.close(descriptor)
