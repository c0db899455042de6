"""`python -m tests.clock SECONDS MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...` on a machine whose clock is so
many seconds ahead, or behind (-60)."""

import sys
from datetime import UTC, datetime, timedelta

import time_machine

from chaos.victim import go_on

if __name__ == "__main__":
    seconds, *arguments = sys.argv[1:]
    time_machine.travel(datetime.now(UTC) + timedelta(seconds=int(seconds))).start()
    go_on(arguments)
