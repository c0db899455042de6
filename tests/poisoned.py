"""`python -m tests.poisoned MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which to look for one position is
more than the live streams can bear."""

import sys

from belfry.stream import resuming
from chaos.victim import go_on

POISON = "7777:7777:"


def main() -> None:
    real = resuming.missed_updates

    def missed(clients, here, most):
        if any(position.snapshot == POISON for _, position in clients):
            raise ZeroDivisionError("a fault of our own")
        return real(clients, here, most)

    resuming.missed_updates = missed
    go_on(sys.argv[1:])


if __name__ == "__main__":
    main()
