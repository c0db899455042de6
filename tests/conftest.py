"""Fixtures of all tests: a separate PostgreSQL and Redis, and a named cast.

`make test` starts both servers and sets DATABASE_URL and REDIS_URL. Their contents are deleted before each test.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace

import psycopg
import pytest

from tools.dev import testing

if "DATABASE_URL" not in os.environ or "REDIS_URL" not in os.environ:
    pytest.exit("Run the tests with `make test`, which starts the servers that they empty.", returncode=2)
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes run the suite: each has its own servers
    testing.process_stack.enter_context(testing.databases_of_a_process())
os.environ.setdefault("SECRET_KEY", "a key that only the tests use")
os.environ.setdefault("SESSION_COOKIE_SECURE", "0")

from click.testing import Result
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from rq import SimpleWorker

from app import create_app
from belfry.core import failpoints, migrations
from belfry.core.db import db
from belfry.core.redis import redis_connection
from belfry.queue import queues
from belfry.worker import maintenance
from config import settings
from tests.fanout_helpers import delete_all_data
from tests.overrides import overridden
from tests.people import Api, Cast, make_cast

UNREACHABLE_REDIS_URL = "unix:///nowhere/redis.sock"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files in tests/golden again")


@pytest.fixture(scope="session", autouse=True)
def _schema() -> Iterator[None]:
    with testing.process_stack:
        migrations.migrate()
        yield
        db.close_all()


@pytest.fixture(autouse=True)
def _clean(_schema: None) -> Iterator[None]:
    db.connect(reuse_if_open=True)
    delete_all_data()
    yield
    if maintenance._indexing:  # it would wait for the next test's locks, and that test for its
        maintenance._indexing.join()
    if not db.is_closed():
        db.close()


@pytest.fixture(autouse=True)
def _caches_disabled() -> Iterator[None]:
    """Disable caches that would carry results of one test over to the next."""
    with overridden(readiness_cache_seconds=0, queue_full_recheck_seconds=0):
        yield


@pytest.fixture(scope="session")
def app() -> Flask:
    return create_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def command(app: Flask) -> Callable[..., Result]:
    """`command("runs", "list", code=0)`: run a command, assert its exit code, and return its result."""

    def run(*arguments: str, code: int = 0) -> Result:
        result = app.test_cli_runner().invoke(args=list(arguments))
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def redis() -> Redis:
    return redis_connection()


@pytest.fixture
def cast() -> Cast:
    """The users, channels and roles of a small server; tests/people.py describes them."""
    return make_cast()


@pytest.fixture
def api(app: Flask) -> Callable[..., Api]:
    """`api(cast.admin).post("/api/messages", json={...})`: the API as one user; `api()` sends no token."""

    def client_of(person: SimpleNamespace | None = None) -> Api:
        return Api(app.test_client(), person.token if person else None)

    return client_of


@pytest.fixture
def run_jobs() -> Callable[[], int]:
    """Run all queued jobs in this process; return the number of jobs left in the queues, normally 0."""

    def run() -> int:
        # A separate connection, because RQ increases the time-outs of the connection that it gets.
        with Redis.from_url(settings.redis_url) as connection:
            SimpleWorker(queues.QUEUES, connection=connection, serializer="json").work(
                burst=True, logging_level="WARNING"
            )
        return sum(queues.queue(name).count for name in queues.QUEUES)

    return run


@pytest.fixture
def override() -> Iterator[Callable[..., None]]:
    """`override(fanout_slice_size=7)`: change a setting or a value of `tuning` in this process until the test ends."""
    with ExitStack() as overrides:
        yield lambda **values: overrides.enter_context(overridden(**values))


@pytest.fixture
def redis_unavailable() -> Callable[[], AbstractContextManager[None]]:
    """`with redis_unavailable():` Redis is unavailable in the block."""
    return lambda: overridden(redis_url=UNREACHABLE_REDIS_URL)


@pytest.fixture
def database_unavailable(monkeypatch) -> Callable[[], AbstractContextManager[None]]:
    """`with database_unavailable():` the database is unavailable: nothing listens at its address."""

    @contextmanager
    def unavailable() -> Iterator[None]:
        with monkeypatch.context() as patched, socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            db.close_all()
            patched.setitem(db.connect_params, "host", "127.0.0.1")
            patched.setitem(db.connect_params, "port", unused.getsockname()[1])
            yield

    return unavailable


@pytest.fixture
def at_failpoint(monkeypatch) -> Callable[[str, Callable[[], None]], None]:
    """`at_failpoint("run.counted", action)`: call `action` whenever this process reaches that failpoint."""
    actions: dict[str, Callable[[], None]] = {}

    def listener(name: str, run_id: int | None, after: int | None) -> None:
        if name in actions:
            actions[name]()

    def add(name: str, action: Callable[[], None]) -> None:
        assert name in failpoints.FAILPOINTS | failpoints.TEST_POINTS
        actions[name] = action
        monkeypatch.setattr(failpoints, "on_failpoint", listener)

    return add


@pytest.fixture
def set_slice_size(override) -> Callable[[int], None]:
    """`set_slice_size(7)`: set the slice size to seven members for the rest of the test."""
    return lambda members: override(fanout_slice_size=members)


@pytest.fixture
def in_another_session() -> Callable[[str], AbstractContextManager[None]]:
    """`with in_another_session("SELECT …"):` another session has executed the statement and has not committed it."""

    @contextmanager
    def open_session(statement: str) -> Iterator[None]:
        with psycopg.connect(settings.database_url) as session:
            session.execute(statement)
            yield
            session.rollback()

    return open_session
