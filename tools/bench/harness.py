"""The harness of `make bench`: servers of all sizes in the database, and workers that are warmed up."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import psycopg
from peewee import ProgrammingError
from psycopg.rows import dict_row
from rq import Worker

from tools.dev import harness, signals, stack
from tools.dev.harness import TIMEOUT_SECONDS
from tools.dev.processes import Child

POLL_SECONDS = 0.002
SMALL = 57  # members of a small server, of whom 50 are notified
SERVERS = 100  # small servers
WARM_UP = 10  # messages that a worker processes before it is measured


@contextmanager
def _foreign_keys_unchecked() -> Iterator[None]:
    """Insert without foreign key checks where the database's role may: they take nearly as long as all the rest."""
    from belfry.core.db import db, execute

    db.connect(reuse_if_open=True)
    try:
        execute("SET session_replication_role = replica")
    except ProgrammingError:  # only a superuser may
        yield
        return
    try:
        yield
    finally:
        execute("SET session_replication_role = DEFAULT")


class BenchHarness(harness.Harness):
    """The harness of all benchmarks. `large_channels` has the channel of each large server by its number of members,
    `small_channels` those of SERVERS small servers."""

    small_channels: list[int]
    large_channels: dict[int, int]

    @cached_property
    def reader(self) -> psycopg.Connection[Any]:
        """A database connection in autocommit mode: it sees what others have committed."""
        return psycopg.connect(self.env["DATABASE_URL"], autocommit=True, row_factory=dict_row)

    def create_servers(self, sizes: Iterable[int]) -> None:
        """Create all servers, the small ones first: each takes seconds when there are a million users."""
        from belfry.core.db import execute

        with _foreign_keys_unchecked():
            self.small_channels = [self.create_server(SMALL)["channel_ids"][0] for _ in range(SERVERS)]
            self.large_channels = {size: self.create_server(size)["channel_ids"][0] for size in sorted(set(sizes))}
        execute("VACUUM (ANALYZE)")  # otherwise autovacuum does it during a measurement
        # VACUUM records that `message` has no rows. With that statistic PostgreSQL checks foreign keys by sequential
        # scans until autovacuum corrects it. TRUNCATE removes the statistic.
        execute("TRUNCATE message CASCADE")

    @property
    def warm_up_channel(self) -> int:
        """The channel of the largest server of at most 100,000: every worker takes part in a message to it."""
        return self.large_channels[max(size for size in self.large_channels if size <= 100_000)]

    def delete_notifications(self) -> None:
        """Empty the table, and write earlier changes to disk so that they do not slow down the next measurement."""
        self.reader.execute("TRUNCATE notification")
        self.reader.execute("CHECKPOINT")

    def delete_messages(self) -> None:
        """Restore the state before the first message, with the partitions of that time."""
        from belfry.core import migrations
        from belfry.core.db import execute

        execute("TRUNCATE message, notification RESTART IDENTITY CASCADE")
        runner = migrations._runner()
        runner.down("0003_partitions")
        runner.up()

    def insert_messages(self, channel_ids: Iterable[int], each: int = 1) -> list[int]:
        """Insert messages without a run or notifications; returns their ids."""
        from belfry.core.db import fetch_all

        inserted = fetch_all(
            "INSERT INTO message (channel_id, author_id, content)"
            " SELECT channel_id, %(author_id)s, 'gold ' || n"
            " FROM generate_series(1, %(each)s) AS n, unnest(%(channel_ids)s::bigint[]) AS channel_id"
            " ORDER BY n, channel_id RETURNING id",
            {"channel_ids": list(channel_ids), "author_id": self.admin.id, "each": each},
        )
        return [row["id"] for row in inserted]

    def wait_for_commit(self, message_id: int) -> dict[str, Any]:
        """Wait until the message's run is finished and committed; returns it. Polls more often than `wait_for_run`."""
        query = "SELECT state, finished_at, started_at, notifications_inserted, error FROM run WHERE message_id = %s"

        def read() -> dict[str, Any] | None:
            run: dict[str, Any] | None = self.reader.execute(query, (message_id,)).fetchone()
            return run if run and run["finished_at"] else None

        run = signals.wait_until(read, f"the run of message {message_id}", TIMEOUT_SECONDS, POLL_SECONDS)
        assert run["state"] == "succeeded", run["error"]
        return run

    def count_notifications(self, message_id: int | None = None) -> int:
        """Return the number of notifications of one message, or of all."""
        query = "SELECT count(*) AS number FROM notification WHERE %(id)s::bigint IS NULL OR message_id = %(id)s"
        row = self.reader.execute(query, {"id": message_id}).fetchone()
        assert row is not None
        return int(row["number"])

    @contextmanager
    def workers(self, number: int, *, large: bool = True) -> Iterator[list[Child]]:
        """Run that many workers, which have processed some messages, and with `large` parts of one large message.

        The web process must run.
        """
        from belfry.core import redis

        with ExitStack() as running:
            children = []
            for index in range(number):
                log = self.data_dir / f"worker-{index}.log"
                children.append(running.enter_context(stack.worker(self.env, log)))
                signals.wait_until(
                    lambda: Worker.count(redis.redis_connection()) >= len(children),
                    "the worker to start",
                    TIMEOUT_SECONDS,
                    POLL_SECONDS,
                )
                for _ in range(WARM_UP):
                    self.wait_for_commit(self.post(self.small_channels[0])["id"])
            if large:
                self.wait_for_commit(self.post(self.warm_up_channel)["id"])
            yield children
