"""The time until which the current job must end, shared by the process that runs it and its parent."""

import mmap
import struct
import time

KILL_GRACE_SECONDS = 10  # after JOB_TIMEOUT_SECONDS, before a process that cannot be broken off is killed


class Deadline:
    """Until when the job in hand has to be done; the work-horse writes it, and its parent reads it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    def set(self, seconds: float) -> None:
        self._shared[:] = struct.pack("d", time.monotonic() + seconds + KILL_GRACE_SECONDS)

    def clear(self) -> None:
        self._shared[:] = struct.pack("d", 0.0)

    def is_over(self) -> bool:
        when: float = struct.unpack("d", self._shared[:])[0]
        return 0.0 < when < time.monotonic()
