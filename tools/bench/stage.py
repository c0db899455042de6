"""What every part of `make bench` stands on: a database with communities of all sizes, an administrator who writes, the
web process and workers as they are in production.

Nothing of Belfry is imported before the environment names the database: so the parts are imported later than this.
"""

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from peewee import ProgrammingError
from psycopg.rows import dict_row
from rq import Worker

from tools.dev import CommandError, ports, say, stack
from tools.dev.client import Client
from tools.dev.processes import Child

PATIENCE = 120.0  # seconds without any progress
POLL_SECONDS = 0.002
SMALL = 57  # members of a small community, of whom 50 are notified
SERVERS = 100  # small communities
WARM = 10  # messages that a worker has done before it is measured


@contextmanager
def _unchecked() -> Iterator[None]:
    """While the block runs, PostgreSQL looks no foreign key up, where we may say so.

    What is seeded fits together, and looking takes nearly as long as the rest of the seeding.
    """
    from belfry.core.db import db, execute

    db.connect(reuse_if_open=True)
    try:
        execute("SET session_replication_role = replica")
    except ProgrammingError:  # we are no superuser, and wait
        yield
        return
    try:
        yield
    finally:
        execute("SET session_replication_role = DEFAULT")


class Stage:
    """What all parts use.

    `communities` has each one's channel by its number of members, `small` the channels of SERVERS of SMALL members.
    `client` speaks as `admin` over HTTP; `reader` is a database connection of its own, in autocommit.
    """

    def __init__(self, env: dict[str, str], listening: socket.socket, data_dir: Path) -> None:
        from belfry.identity import tokens, users

        self.env, self.listening, self.data_dir = env, listening, data_dir
        self.admin = users.create_user("bench", is_admin=True)
        self.client = Client(ports.address_of(listening), tokens.create_token(self.admin)[1])
        self.reader = psycopg.connect(env["DATABASE_URL"], autocommit=True, row_factory=dict_row)
        self.small: list[int] = []
        self.communities: dict[int, int] = {}

    def populate(self, sizes: Iterable[int]) -> None:
        """Make all communities, the small ones first: each takes seconds beside a million people."""
        from belfry.cli import seeding
        from belfry.core.db import execute

        with _unchecked():
            self.small = [seeding.seed(SMALL, 1)["channel_ids"][0] for _ in range(SERVERS)]
            for size in sorted(set(sizes)):
                say(f"making a community of {size:,} …")
                self.communities[size] = seeding.seed(size, 1)["channel_ids"][0]
        execute("VACUUM (ANALYZE)")  # now, and not by itself in the midst of a measurement
        # Of a table that was found empty PostgreSQL takes it that it stays so: to look a message up for a foreign key
        # it would read all of them, until autovacuum has been there. Of one that nobody looked at it does not.
        execute("TRUNCATE message CASCADE")

    @property
    def warming(self) -> int:
        """The channel of the largest community of at most 100,000: a message to it sets every worker to work."""
        return self.communities[max(size for size in self.communities if size <= 100_000)]

    def empty(self) -> None:
        """Nobody is notified of anything, and no write of earlier stands out."""
        self.reader.execute("TRUNCATE notification")
        self.reader.execute("CHECKPOINT")

    def without_messages(self) -> None:
        """As it was before the first message, in the partitions that there were then."""
        from belfry.core import migrations
        from belfry.core.db import execute

        execute("TRUNCATE message, notification RESTART IDENTITY CASCADE")
        runner = migrations._runner()
        runner.down("0003_partitions")
        runner.up()

    def new_messages(self, channel_ids: Iterable[int], each: int = 1) -> list[int]:
        """Messages that nobody has been notified of, and that have no run."""
        from belfry.core.db import fetch_all

        made = fetch_all(
            "INSERT INTO message (channel_id, author_id, content)"
            " SELECT channel_id, %(author_id)s, 'gold ' || n"
            " FROM generate_series(1, %(each)s) AS n, unnest(%(channel_ids)s::bigint[]) AS channel_id"
            " ORDER BY n, channel_id RETURNING id",
            {"channel_ids": list(channel_ids), "author_id": self.admin.id, "each": each},
        )
        return [one["id"] for one in made]

    def post(self, channel_id: int) -> int:
        """Post a message over HTTP; its id."""
        return int(self.client.post("/api/messages", {"channel_id": channel_id, "content": "gold breaks out"})["id"])

    def wait(self, message_id: int) -> dict[str, Any]:
        """The message's run, once it is finished and committed as another connection sees it."""
        give_up = time.monotonic() + PATIENCE
        question = "SELECT state, finished_at, started_at, notifications_inserted, error FROM run WHERE message_id = %s"
        while (run := self.reader.execute(question, (message_id,)).fetchone()) is None or not run["finished_at"]:
            give_up_after(give_up)
            time.sleep(POLL_SECONDS)
        assert run["state"] == "succeeded", run["error"]
        return run

    def count(self, message_id: int | None = None) -> int:
        """How many notifications there are: of one message, or all."""
        question = "SELECT count(*) AS there FROM notification WHERE %(id)s::bigint IS NULL OR message_id = %(id)s"
        found = self.reader.execute(question, {"id": message_id}).fetchone()
        assert found is not None
        return int(found["there"])

    @contextmanager
    def web(self) -> Iterator[Child]:
        with stack.web(self.env, self.listening, self.data_dir / "web.log") as child:
            yield child

    @contextmanager
    def workers(self, number: int, *, large: bool = True) -> Iterator[list[Child]]:
        """So many workers, each of which has done some messages, and with `large` its share of one to the warming
        community. `web` has to run."""
        with ExitStack() as running:
            children = []
            for one in range(number):
                log = self.data_dir / f"worker-{one}.log"
                children.append(running.enter_context(stack.worker(self.env, log)))
                self._wait_for_workers(one + 1)
                for _ in range(WARM):  # warm up the connections
                    self.wait(self.post(self.small[0]))
            if large:
                self.wait(self.post(self.warming))
            yield children

    def _wait_for_workers(self, number: int) -> None:
        from belfry.core import redis

        give_up = time.monotonic() + PATIENCE
        while Worker.count(redis.redis_connection()) < number:
            give_up_after(give_up)
            time.sleep(POLL_SECONDS)


def give_up_after(when: float) -> None:
    if time.monotonic() > when:
        raise CommandError(f"Nothing came for {PATIENCE:.0f} s.")

def reached(value: float, target: float, *, at_most: bool = False) -> str:
    """A figure, and whether it is what it is to be."""
    good = value <= target if at_most else value >= target
    return f"{value:.2f} {'reached' if good else 'MISSED'}"
