"""The time until which the current job must end, shared by the work-horse and its parent."""

import mmap
import struct
import time

KILL_GRACE_SECONDS = 10  # after JOB_TIMEOUT_SECONDS, before a process that RQ could not interrupt is killed


class Deadline:
    """The end of the current job's time, which the work-horse sets and its parent reads."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    def set(self, seconds: float) -> None:
        self._shared[:] = struct.pack("d", time.monotonic() + seconds + KILL_GRACE_SECONDS)

    def clear(self) -> None:
        self._shared[:] = struct.pack("d", 0.0)

    def has_passed(self) -> bool:
        when: float = struct.unpack("d", self._shared[:])[0]
        return 0.0 < when < time.monotonic()
