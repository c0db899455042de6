"""`python -m tests.deaf MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which telling hangs, and hears no
signal but SIGKILL."""

import runpy
import signal
import sys
import time

from belfry import fanout


def main() -> None:
    tell_together = fanout.tell_together

    def hang(run_ids: list[int]) -> list[int]:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        time.sleep(600)
        return tell_together(run_ids)

    fanout.tell_together = hang
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
