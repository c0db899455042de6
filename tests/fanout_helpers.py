"""Process runs in the process of the test, work item by work item, without a queue; and read the results."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from belfry.core import redis
from belfry.core.db import db, execute, fetch_all, fetch_one
from belfry.fanout import claims, fanout, runs
from belfry.fanout.claims import WorkItem
from belfry.fanout.decision import DECISIONS
from belfry.inbox.inbox import mark_all_read, unread_count
from belfry.messages import messages
from belfry.servers.preferences import set_preference
from models import TABLES, Notification
from tests.people import Person

AtFailpoint = Callable[[str, Callable[[], None]], None]
"""The fixture `at_failpoint`."""


class Killed(BaseException):
    """Simulates the sudden end of a process. The product must not catch it."""


def remaining_work_items(run_id: int) -> list[WorkItem]:
    """The work items left of a run, in order: the run itself or its slices; [] if it is done or does not exist."""
    run = fetch_one("SELECT state, slices_left FROM run WHERE id = %(run_id)s", {"run_id": run_id})
    if run is None or run["state"] == "succeeded":
        return []
    slices = fetch_all(
        "SELECT after_user_id FROM slice WHERE run_id = %(run_id)s ORDER BY after_user_id", {"run_id": run_id}
    )
    assert len(slices) == run["slices_left"]
    return [WorkItem(run_id, one["after_user_id"]) for one in slices] or [WorkItem(run_id)]


def claim_and_process(item: WorkItem) -> None:
    """Claim and process a work item; fail if it cannot be claimed."""
    attempt = claims.claim(item)
    assert attempt is not None, f"{item} cannot be claimed"
    fanout.process_work_item(item, attempt)


def process_next(run_id: int) -> None:
    """Process the next work item of a run."""
    claim_and_process(remaining_work_items(run_id)[0])


def run_to_end(run_id: int) -> str:
    """Process all work items left of a run; return its state, or `missing` if it does not exist."""
    while items := remaining_work_items(run_id):
        for item in items:
            claim_and_process(item)
    found = fetch_one("SELECT state FROM run WHERE id = %(run_id)s", {"run_id": run_id})
    return str(found["state"]) if found else "missing"


def generic_plans(call: Callable[[], object], statement: str) -> list[int]:
    """Run `call` twenty times; return how often PostgreSQL used a generic plan, for each matching statement."""
    db.connection().execute("DEALLOCATE ALL")
    for _ in range(20):  # psycopg prepares after five executions, and PostgreSQL chooses a plan after five more
        call()
    found = fetch_all(
        "SELECT generic_plans FROM pg_prepared_statements WHERE statement ~ %(statement)s", {"statement": statement}
    )
    return [one["generic_plans"] for one in found]


def add_members(server_id: int, number: int) -> list[int]:
    """Insert this number of members with an active subscription, named crowd-1 and so on; return their ids."""
    return [
        found["user_id"]
        for found in fetch_all(
            """
            WITH created AS (
                INSERT INTO user_account (username, name)
                SELECT 'crowd-' || n, 'One of many' FROM generate_series(1, %(number)s) AS n
                RETURNING id
            ),
            subscribed AS (INSERT INTO subscription (user_id, status) SELECT id, 'active' FROM created)
            INSERT INTO member (server_id, user_id) SELECT %(server_id)s, id FROM created RETURNING user_id
            """,
            {"server_id": server_id, "number": number},
        )
    ]


def post(author: Person, channel_id: int, content: str = "gold breaks out") -> tuple[int, int]:
    """Post a message without processing its run; return the ids of message and run."""
    posted = messages.post_message(author.user, channel_id, content)
    return posted.message["id"], posted.run_id


def post_and_notify(author: Person, channel_id: int, content: str) -> int:
    message_id, run_id = post(author, channel_id, content)
    assert run_to_end(run_id) == "succeeded"
    return message_id


def edit(author: Person, message_id: int, content: str) -> dict[str, Any]:
    """Edit a message and process the run of the edit; return the run's statistics."""
    run_id = messages.edit_message(author.user, message_id, content).run_id
    assert run_to_end(run_id) == "succeeded"
    return stats(run_id)


def stats(run_id: int) -> dict[str, Any]:
    """{"audience", "notified", "inserted", "retracted"} and the number of members for each decision that occurred."""
    counted = runs.statistics(run_of(run_id))
    decisions = counted.pop("decisions")
    assert set(decisions) == set(DECISIONS)
    assert sum(decisions.values()) == counted["audience"]
    return counted | {decision: members for decision, members in decisions.items() if members}


def run_of(run_id: int) -> dict[str, Any]:
    return runs.find_run(run_id)


def notified(message_id: int) -> dict[int, str]:
    """{user id: reason} of the notifications of a message."""
    return {found.user_id: found.reason for found in Notification.select().where(Notification.message_id == message_id)}


def unread(person: Person) -> int:
    return int(unread_count(person.user)["unread"])


def mark_everything_read(person: Person) -> None:
    mark_all_read(person.user)


def delete_all_data() -> None:
    """Delete everything in the database and in Redis."""
    tables = ", ".join(f'"{table._meta.table_name}"' for table in TABLES)
    execute(f"TRUNCATE {tables} RESTART IDENTITY")
    redis.redis_connection().flushdb()


def all_rows() -> dict[str, list[str]]:
    """{table: all its rows as text}."""
    return {
        name: sorted(found["line"] for found in fetch_all(f'SELECT t::text AS line FROM "{name}" t'))
        for name in (table._meta.table_name for table in TABLES)
    }


class _Recorder(logging.Handler):
    """A log handler that records the (statement, parameters) that peewee logs at DEBUG."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: list[tuple[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, tuple):
            self.executed.append(record.msg)


@contextmanager
def executed_statements() -> Iterator[list[tuple[str, Any]]]:
    """Yield a list, to which each (SQL statement, parameters) that peewee executes in the block is added."""
    logger, recorder = logging.getLogger("peewee"), _Recorder()
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(recorder)
    try:
        yield recorder.executed
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(level)
        logger.propagate = propagates


class _Statements(Sequence[str]):
    """The statements of `executed_statements`, without their parameters."""

    def __init__(self, executed: list[tuple[str, Any]]) -> None:
        self._executed = executed

    def __getitem__(self, index: Any) -> Any:
        return [sql for sql, _ in self._executed][index]

    def __len__(self) -> int:
        return len(self._executed)


@contextmanager
def statements() -> Iterator[Sequence[str]]:
    """Yield the SQL statements that are executed in the block."""
    with executed_statements() as executed:
        yield _Statements(executed)


def inserts_notifications(sql: str) -> bool:
    return "INSERT INTO notification" in sql


def fail_at_work_item(at_failpoint: AtFailpoint, number: int, error: BaseException) -> None:
    """Make the work item with this number, counted from 1, fail after it has inserted its notifications."""
    count = 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == number:
            raise error

    at_failpoint("run.notified", fail)
    at_failpoint("slice.notified", fail)


PLAIN_MESSAGE_STATS = {
    "audience": 5, "notified": 3, "inserted": 3, "retracted": 0, "message": 3, "author": 1, "no_subscription": 1
}  # fmt: skip
"""The statistics of the run of a plain message by the subscriber in general, with the cast as members."""


def set_mentions_only(person: Person, channel_id: int) -> None:
    set_preference(person.user, channel_id, "mentions", None)


@contextmanager
def fault_on_insert(body: str = "PERFORM 1 / 0;") -> Iterator[None]:
    """Execute `body`, in PL/pgSQL, before each statement that inserts notifications. The default raises an error."""
    execute(
        f"CREATE FUNCTION test_fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NULL; END $$;"
        "CREATE TRIGGER test_fault BEFORE INSERT ON notification FOR EACH STATEMENT EXECUTE FUNCTION test_fault()"
    )
    try:
        yield
    finally:
        execute("DROP FUNCTION test_fault CASCADE")
