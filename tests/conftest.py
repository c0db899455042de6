"""What every test stands on: a real PostgreSQL and a real Redis of its own, and a named cast.

`make test` sets both up and puts their addresses into DATABASE_URL and REDIS_URL. Everything in them is
deleted before each test.
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
    pytest.exit("Run the tests by `make test`: it sets up the database and the Redis that they empty.", returncode=2)
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes run the suite: each has servers of its own
    testing.process_stack.enter_context(testing.databases_of_a_process())
os.environ.setdefault("SECRET_KEY", "a key for the tests, of no use to anybody else")
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
from config import settings
from tests.fanout_helpers import empty
from tests.overrides import overridden
from tests.people import Api, Cast, make_cast

NO_REDIS_URL = "unix:///nowhere/redis.sock"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(scope="session", autouse=True)
def _schema() -> Iterator[None]:
    with testing.process_stack:
        migrations.migrate()
        yield
        db.close_all()


@pytest.fixture(autouse=True)
def _clean(_schema: None) -> Iterator[None]:
    db.connect(reuse_if_open=True)
    empty()
    yield
    if not db.is_closed():
        db.close()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Of one test nothing is remembered in the next one."""
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
    """`command("runs", "list", code=0)`: one of the commands, which ends with that code; what it printed."""

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
    """A small community; see tests/people.py for who is who."""
    return make_cast()


@pytest.fixture
def api(app: Flask) -> Callable[..., Api]:
    """`api(cast.admin).post("/api/messages", json={...})`: the API as one person; `api()` as nobody."""

    def as_person(person: SimpleNamespace | None = None) -> Api:
        return Api(app.test_client(), person.token if person else None)

    return as_person


@pytest.fixture
def run_jobs() -> Callable[[], int]:
    """Run what is queued, in this process; how many jobs were left in the queue after it (0)."""

    def run() -> int:
        # Its own connection: RQ lengthens the time-outs of the one that it gets.
        with Redis.from_url(settings.redis_url) as connection:
            SimpleWorker(queues.QUEUES, connection=connection, serializer="json").work(
                burst=True, logging_level="WARNING"
            )
        return sum(queues.queue(name).count for name in queues.QUEUES)

    return run


@pytest.fixture
def override() -> Iterator[Callable[..., None]]:
    """`override(fanout_slice_size=7)`: another value of a setting, or of `tuning`, from here on, in this process."""
    with ExitStack() as overrides:
        yield lambda **values: overrides.enter_context(overridden(**values))


@pytest.fixture
def redis_away() -> Callable[[], AbstractContextManager[None]]:
    """`with redis_away():` Redis is unavailable."""
    return lambda: overridden(redis_url=NO_REDIS_URL)


@pytest.fixture
def database_away(monkeypatch) -> Callable[[], AbstractContextManager[None]]:
    """`with database_away():` the database is unavailable: nothing answers where it should be."""

    @contextmanager
    def away() -> Iterator[None]:
        with monkeypatch.context() as patched, socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            db.close_all()
            patched.setitem(db.connect_params, "host", "127.0.0.1")
            patched.setitem(db.connect_params, "port", silent.getsockname()[1])
            yield

    return away


@pytest.fixture
def at_failpoint(monkeypatch) -> Callable[[str, Callable[[], None]], None]:
    """`at_failpoint("run.counted", action)`: call `action` whenever this process comes to that failpoint."""
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
def slices_of(override) -> Callable[[int], None]:
    """`slices_of(7)`: slices of seven members from here on."""
    return lambda members: override(fanout_slice_size=members)


@pytest.fixture
def in_another_session() -> Callable[[str], AbstractContextManager[None]]:
    """`with in_another_session("SELECT …"):` somebody else has done that, and not committed."""

    @contextmanager
    def open_session(statement: str) -> Iterator[None]:
        with psycopg.connect(settings.database_url) as session:
            session.execute(statement)
            yield
            session.rollback()

    return open_session
