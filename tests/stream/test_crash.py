"""After a crash PostgreSQL may assign transaction ids again: the stream sends `reset` and skips no notification."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from belfry.core import migrations
from belfry.core.db import ISOLATION, db
from belfry.stream import resuming, updates
from belfry.stream.cursor import StreamCursor
from config import settings
from tests.fanout_helpers import post_and_notify
from tests.people import make_cast
from tests.processes import wait_until, web_process
from tests.sse_client import StreamClient
from tools.dev import postgres
from tools.dev.paths import temporary_data_dir

pytestmark = pytest.mark.slow


class Database:
    """A separate PostgreSQL server that can crash; `db` is connected to it during the test."""

    def __init__(self, data_dir: Path, sockets: Path) -> None:
        self._directories = (data_dir, sockets)
        self.url = postgres.start(*self._directories)

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.url, autocommit=True)

    def crash_a_backend(self) -> None:
        """Kill one backend: PostgreSQL ends the other backends and recovers; the postmaster keeps running."""
        victim = self.connect()
        db.close_all()
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        victim.close()
        self._wait_for_recovery()

    def crash_the_server(self) -> None:
        """Stop the postmaster without a checkpoint and start it again."""
        postmaster = postgres._postmaster(*self._directories)
        db.close_all()
        postmaster.send_signal(signal.SIGQUIT)
        postmaster.wait(60)
        postgres.start(*self._directories)
        self._wait_for_recovery()

    def _wait_for_recovery(self) -> None:
        def is_available() -> bool:
            try:
                with self.connect() as session:
                    session.execute("SELECT pg_current_xact_id()")
            except psycopg.OperationalError:
                return False
            return True

        time.sleep(0.2)
        wait_until(is_available, "PostgreSQL to recover")

    def use_up(self, transactions: int) -> None:
        """Assign transaction ids without logging a notification."""
        with self.connect() as session:
            for _ in range(transactions):
                session.execute("SELECT pg_current_xact_id()")

    def next_transaction(self) -> int:
        with self.connect() as session:
            [(following,)] = session.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").fetchall()
        return following


def _connect_to(url: str) -> None:
    db.close_all()
    parameters = conninfo_to_dict(url) | {"connect_timeout": 5, "application_name": "belfry"}
    db.init(parameters.pop("dbname"), prefer_psycopg3=True, isolation_level=ISOLATION, **parameters)
    db.connect()


@pytest.fixture
def database() -> Iterator[Database]:
    with temporary_data_dir() as data_dir:
        sockets = data_dir / "s"
        sockets.mkdir(mode=0o711)
        server = Database(data_dir, sockets)
        try:
            _connect_to(server.url)
            migrations.migrate()
            yield server
        finally:
            _connect_to(settings.database_url)
            postgres.stop(data_dir, sockets)


CRASHES: tuple[Callable[[Database], None], ...] = (Database.crash_a_backend, Database.crash_the_server)


@pytest.mark.parametrize("crash", CRASHES)
def test_a_cursor_from_before_a_crash_is_reset(database, crash):
    cast = make_cast()
    for _ in range(5):  # PostgreSQL logs the next transaction id every 15 s, perhaps just before the crash
        with database.connect() as session:
            session.execute("CHECKPOINT")
        database.use_up(50)
        with updates.take_snapshot() as here:
            client = (cast.vip.id, StreamCursor.parse(str(here)))
        crash(database)
        db.connect(reuse_if_open=True)
        if database.next_transaction() < here.next_transaction:
            break
    else:
        pytest.fail("no transaction id was assigned again")
    post_and_notify(cast.subscriber, cast.general, "gold")
    database.use_up(100)
    with updates.take_snapshot() as now:
        assert now.next_transaction > here.next_transaction
        connected = updates.updates_since(here, now, [cast.vip.id])
        resumed = resuming.missed_updates([client], now)[client]
    assert connected.overflow
    assert resumed.overflow


def test_a_running_web_process_detects_a_crash_and_resets_its_clients(database):
    cast = make_cast()
    with web_process(DATABASE_URL=database.url) as web, StreamClient(web, cast.vip.token) as listener:
        wait_until(lambda: "unread" in listener.kinds(), "the stream to begin")
        database.crash_a_backend()
        db.connect(reuse_if_open=True)
        wait_until(lambda: "reset" in listener.kinds(), "the reset")
        message_id = post_and_notify(cast.subscriber, cast.general, "gold")
        wait_until(lambda: listener.messages() == [message_id], "the notification after the reset")
