"""`python -m tests.deaf MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which telling hangs, and hears no
signal but SIGKILL."""

import signal
import sys
import time

from belfry.fanout import fanout
from chaos.victim import go_on


def main() -> None:
    tell_together = fanout.process_batch

    def hang(run_ids: list[int]) -> list[int]:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        time.sleep(600)
        return tell_together(run_ids)

    fanout.process_batch = hang
    go_on(sys.argv[1:])


if __name__ == "__main__":
    main()
