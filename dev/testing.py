"""`test`: pytest, with a PostgreSQL and a Redis of its own."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dev.own import private
from dev.places import temporary_data_dir
from dev.processes import in_foreground
from dev.servers import named, servers

process_stack = ExitStack()
"""What one of several processes that run the suite has to give back at its end."""


@contextmanager
def own_databases() -> Iterator[None]:
    """While the block runs, DATABASE_URL and REDIS_URL of this process name databases of its own, empty, on the same
    servers as before."""
    with private(os.environ, "test") as own:
        os.environ.update(own)
        yield


def test(arguments: Sequence[str]) -> int:
    """Run pytest with these arguments; its exit status.

    It finds DATABASE_URL and REDIS_URL, both of databases made for this run and gone after it, SECRET_KEY,
    and BELFRY_TEST_EXTERNAL=1 where the caller has named a server: then no embedded one is to be started.
    """
    with ExitStack() as stage:
        data_dir = stage.enter_context(temporary_data_dir())
        urls = stage.enter_context(servers(data_dir, durable=False))
        own = stage.enter_context(private(urls, "test"))
        env = {**os.environ, **own, "SECRET_KEY": secrets.token_hex(32)}
        if named():
            env["BELFRY_TEST_EXTERNAL"] = "1"
        return in_foreground(("-m", "pytest", *arguments), env)
