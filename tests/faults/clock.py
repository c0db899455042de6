"""Run a module with a wrong clock: `python -m tests.faults.clock SECONDS MODULE ARGUMENT...`.

The clock is SECONDS ahead, or behind where they are negative.
"""

import sys
from datetime import UTC, datetime, timedelta

import time_machine

from tools.chaos.process_under_test import run_module

if __name__ == "__main__":
    seconds, *arguments = sys.argv[1:]
    time_machine.travel(datetime.now(UTC) + timedelta(seconds=int(seconds))).start()
    run_module(arguments)
