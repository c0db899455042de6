"""Run a module in which the fan-out hangs: `python -m tests.faults.hanging_fanout MODULE ARGUMENT...`.

While it hangs, it ignores every signal but SIGKILL.
"""

import signal
import sys
import time

from belfry.fanout import fanout
from tools.chaos.process_under_test import run_module


def main() -> None:
    process_batch = fanout.process_batch

    def hang(run_ids: list[int]) -> list[int]:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        time.sleep(600)
        return process_batch(run_ids)

    fanout.process_batch = hang
    run_module(sys.argv[1:])


if __name__ == "__main__":
    main()
