"""`python -m tests.clock SECONDS MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...` on a machine whose clock is so
many seconds ahead, or behind (-60)."""

import runpy
import sys
from datetime import UTC, datetime, timedelta

import time_machine

if __name__ == "__main__":
    seconds, module, *arguments = sys.argv[1:]
    time_machine.travel(datetime.now(UTC) + timedelta(seconds=int(seconds))).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
