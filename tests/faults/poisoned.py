"""Run a module in which looking up one cursor fails: `python -m tests.faults.poisoned MODULE ARGUMENT...`."""

import sys

from belfry.stream import resuming
from tools.chaos.process_under_test import run_module

POISON = "7777:7777:"


def main() -> None:
    real = resuming.missed_updates

    def missed(clients, here, most):
        if any(position.snapshot == POISON for _, position in clients):
            raise ZeroDivisionError("an injected fault")
        return real(clients, here, most)

    resuming.missed_updates = missed
    run_module(sys.argv[1:])


if __name__ == "__main__":
    main()
