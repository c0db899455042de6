"""Run a module in which looking up one cursor fails: `python -m tests.faults.failing_cursor MODULE ARGUMENT...`."""

import sys

from belfry.stream import resuming
from tools.chaos.process_under_test import run_module

FAILING_SNAPSHOT = "7777:7777:"


def main() -> None:
    missed_updates = resuming.missed_updates

    def fail_for_snapshot(clients, here, most):
        if any(position.snapshot == FAILING_SNAPSHOT for _, position in clients):
            raise ZeroDivisionError("an injected fault")
        return missed_updates(clients, here, most)

    resuming.missed_updates = fail_for_snapshot
    run_module(sys.argv[1:])


if __name__ == "__main__":
    main()
