"""`test`: pytest, with a PostgreSQL and a Redis of its own."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tools.dev.paths import temporary_data_dir
from tools.dev.processes import in_foreground
from tools.dev.scratch_databases import private
from tools.dev.servers import named, servers

process_stack = ExitStack()
"""What one of several processes that run the suite has to give back at its end."""


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """While the block runs, there are an empty database and an empty Redis: yields DATABASE_URL and REDIS_URL, and
    BELFRY_TEST_EXTERNAL=1 where the caller has named a server: then no embedded one is to be started."""
    with ExitStack() as stage:
        data_dir = stage.enter_context(temporary_data_dir())
        urls = stage.enter_context(servers(data_dir, durable=False))
        own = stage.enter_context(private(urls, "test"))
        yield {**own, "BELFRY_TEST_EXTERNAL": "1"} if named() else own


@contextmanager
def databases_of_a_process() -> Iterator[None]:
    """`databases` for one of several processes that run the suite, whose environment is changed to them.

    Embedded servers are its own as well: transaction ids, and what a crash does, are a whole server's.
    """
    if "BELFRY_TEST_EXTERNAL" not in os.environ:
        del os.environ["DATABASE_URL"], os.environ["REDIS_URL"]
    with databases() as own:
        os.environ.update(own)
        yield


def test(arguments: Sequence[str]) -> int:
    """Run pytest with these arguments, on `databases` and with a SECRET_KEY; its exit status."""
    with databases() as own:
        env = {**os.environ, **own, "SECRET_KEY": secrets.token_hex(32)}
        return in_foreground(("-m", "pytest", *arguments), env)
