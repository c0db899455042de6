"""`python -m tests.poisoned MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which to look for one position is
more than the live streams can bear."""

import sys

from belfry import live
from chaos.victim import go_on

POISON = "7777:7777:"


def main() -> None:
    real = live.news

    def news(since, here, user_ids):
        if since.snapshot == POISON:
            raise ZeroDivisionError("a fault of our own")
        return real(since, here, user_ids)

    live.news = news
    go_on(sys.argv[1:])


if __name__ == "__main__":
    main()
