"""`python -m tests.poisoned MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which to look for one position is
more than the live streams can bear."""

import runpy
import sys

from belfry import live

POISON = "7777:7777:"


def main() -> None:
    real = live.news

    def news(since, here, user_ids):
        if since.snapshot == POISON:
            raise ZeroDivisionError("a fault of our own")
        return real(since, here, user_ids)

    live.news = news
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
