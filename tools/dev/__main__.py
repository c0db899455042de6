"""`python -m tools.dev COMMAND`: what the Makefile's targets run.

    demo                  the whole way once, on 10,000 members, and everything gone again
    run                   a web process and a worker, until Ctrl-C
    web, worker           each alone, for two terminals
    test [PYTEST OPTION]  the test suite on a PostgreSQL and a Redis of its own
    screenshots           docs/screenshots/ made anew
    flask COMMAND         one of Belfry's commands, on the data of `run`
    clean                 remove the data of `run`
"""

import os
import shutil
import sys
from collections.abc import Sequence

from tools.dev import DATA_DIR, CommandError, say, signals


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    os.umask(0o077)  # data, logs and passwords are for the user who runs this only
    if not arguments or arguments[0] not in ("demo", "run", "web", "worker", "test", "screenshots", "flask", "clean"):
        say(str(__doc__))
        return 2
    command, rest = arguments[0], arguments[1:]
    if rest and command not in ("test", "flask"):
        say(f"`{command}` takes no arguments.")
        return 2
    return signals.exit_status(lambda: _run(command, rest))


def _run(command: str, rest: Sequence[str]) -> int:
    # Imported only now: from `signals.exit_status` on, Ctrl-C is one sentence and not a traceback.
    if command == "demo":
        from tools.dev.demo import demo

        return demo()
    if command == "test":
        from tools.dev.testing import test

        return test(rest)
    if command == "screenshots":
        from tools.dev.screenshots import screenshots

        return screenshots()
    if command == "clean":
        return _clean()
    from tools.dev import serve
    from tools.dev.processes import in_foreground
    from tools.dev.stack import FLASK

    if command == "flask":
        with serve.prepared() as env:
            return in_foreground((*FLASK, *rest), env)
    return {"run": serve.run, "web": serve.web, "worker": serve.worker}[command]()


def _clean() -> int:
    from tools.dev.paths import sweep
    from tools.dev.servers import stop_unused

    if not DATA_DIR.exists():
        return 0
    sweep()
    if not stop_unused(DATA_DIR) or any(DATA_DIR.glob("tmp-*")):
        raise CommandError("Another command is using the data. End it first.")
    shutil.rmtree(DATA_DIR)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
