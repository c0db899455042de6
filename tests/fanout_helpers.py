"""Runs done part by part in the test's own process, as a worker does them, without a queue; and what came of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

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


class Killed(BaseException):
    """What ends a process without a word; nothing in the product may catch it."""


def parts_of(run_id: int) -> list[WorkItem]:
    """What is left of a run, in order: its own part, or its slices; [] when it is done or there is none."""
    run = fetch_one("SELECT state, slices_left FROM run WHERE id = %(run_id)s", {"run_id": run_id})
    if run is None or run["state"] == "succeeded":
        return []
    slices = fetch_all(
        "SELECT after_user_id FROM slice WHERE run_id = %(run_id)s ORDER BY after_user_id", {"run_id": run_id}
    )
    assert len(slices) == run["slices_left"]
    return [WorkItem(run_id, one["after_user_id"]) for one in slices] or [WorkItem(run_id)]


def do(part: WorkItem) -> None:
    """One attempt at a part, which must be there to be taken."""
    attempt = claims.claim(part)
    assert attempt is not None, f"{part} cannot be taken"
    fanout.process_work_item(part, attempt)


def advance(run_id: int) -> None:
    """Do the next part of a run."""
    do(parts_of(run_id)[0])


def run_to_end(run_id: int) -> str:
    """Do all that is left of a run; its state then, or `missing`."""
    while parts := parts_of(run_id):
        for part in parts:
            do(part)
    found = fetch_one("SELECT state FROM run WHERE id = %(run_id)s", {"run_id": run_id})
    return str(found["state"]) if found else "missing"


def generic_plans(ask: Callable[[], object], statement: str) -> list[int]:
    """How often of twenty PostgreSQL went by its plan for everybody: for each statement with these words."""
    db.connection().execute("DEALLOCATE ALL")
    for _ in range(20):  # five to be prepared, and five by which PostgreSQL decides
        ask()
    found = fetch_all(
        "SELECT generic_plans FROM pg_prepared_statements WHERE statement ~ %(statement)s", {"statement": statement}
    )
    return [one["generic_plans"] for one in found]


def crowd(server_id: int, number: int) -> list[int]:
    """So many more members with an active subscription; their ids."""
    return [
        found["user_id"]
        for found in fetch_all(
            """
            WITH people AS (
                INSERT INTO user_account (username, name)
                SELECT 'crowd-' || n, 'One of many' FROM generate_series(1, %(number)s) AS n
                RETURNING id
            ),
            paying AS (INSERT INTO subscription (user_id, status) SELECT id, 'active' FROM people)
            INSERT INTO member (server_id, user_id) SELECT %(server_id)s, id FROM people RETURNING user_id
            """,
            {"server_id": server_id, "number": number},
        )
    ]


def post(author: Person, channel_id: int, content: str = "gold breaks out") -> tuple[int, int]:
    """A message and its run, which nobody has begun: their ids."""
    posted = messages.post_message(author.user, channel_id, content)
    return posted.message["id"], posted.run_id


def post_and_notify(author: Person, channel_id: int, content: str) -> int:
    message_id, run_id = post(author, channel_id, content)
    assert run_to_end(run_id) == "succeeded"
    return message_id


def edit(author: Person, message_id: int, content: str) -> dict[str, Any]:
    """Edit, and run what that takes; the statistics of that run."""
    run_id = messages.edit_message(author.user, message_id, content).run_id
    assert run_to_end(run_id) == "succeeded"
    return stats(run_id)


def stats(run_id: int) -> dict[str, Any]:
    """{"audience", "notified", "inserted", "retracted"} and the decisions that somebody got."""
    counted = runs.statistics(run_of(run_id))
    decisions = counted.pop("decisions")
    assert set(decisions) == set(DECISIONS)
    assert sum(decisions.values()) == counted["audience"]
    return counted | {decision: members for decision, members in decisions.items() if members}


def run_of(run_id: int) -> dict[str, Any]:
    return runs.find_run(run_id)


def notified(message_id: int) -> dict[int, str]:
    """Who has a notification of a message, and for what reason."""
    return {found.user_id: found.reason for found in Notification.select().where(Notification.message_id == message_id)}


def unread(person: Person) -> int:
    return int(unread_count(person.user)["unread"])


def read_everything(person: Person) -> None:
    mark_all_read(person.user)


def empty() -> None:
    """Nothing is left, in the database and in Redis."""
    tables = ", ".join(f'"{table._meta.table_name}"' for table in TABLES)
    execute(f"TRUNCATE {tables} RESTART IDENTITY")
    redis.redis_connection().flushdb()


def contents() -> dict[str, list[str]]:
    """All that is in the database."""
    return {
        name: sorted(found["line"] for found in fetch_all(f'SELECT t::text AS line FROM "{name}" t'))
        for name in (table._meta.table_name for table in TABLES)
    }


@contextmanager
def statements() -> Iterator[list[str]]:
    """A list of the SQL statements that are executed meanwhile."""
    seen: list[str] = []
    real = db.execute_sql

    def execute_sql(sql: str, *arguments: Any, **named: Any) -> Any:
        seen.append(sql)
        return real(sql, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "execute_sql", execute_sql)
        yield seen


def is_slice(sql: str) -> bool:
    return "INSERT INTO notification" in sql


def fail_at_slice(monkeypatch, number: int, error: BaseException) -> None:
    """The so-manyth slice from here on fails after it has written its notifications, before it commits."""
    real, begun = db.execute_sql, [0]

    def execute_sql(sql: str, *arguments: Any, **named: Any) -> Any:
        done = real(sql, *arguments, **named)
        begun[0] += is_slice(sql)
        if is_slice(sql) and begun[0] == number:
            raise error
        return done

    monkeypatch.setattr(db, "execute_sql", execute_sql)


def fail_always(monkeypatch) -> None:
    """Every fan-out of a message fails, together with others or alone."""
    for statement in ("INSERT_NOTIFICATIONS_SQL", "INSERT_BATCH_SQL"):
        monkeypatch.setattr(fanout, statement, "SELECT 1 / 0 AS decision")


EVERYBODY = {
    "audience": 5, "notified": 3, "inserted": 3, "retracted": 0, "message": 3, "author": 1, "no_subscription": 1
}  # fmt: skip
"""What a plain message of the subscriber's to general comes to in the cast."""


def wants_mentions_only(person: Person, channel_id: int) -> None:
    set_preference(person.user, channel_id, "mentions", None)


@contextmanager
def notifications_that(body: str) -> Iterator[None]:
    """Every statement that inserts notifications first does `body`, as PL/pgSQL."""
    execute(
        f"CREATE FUNCTION test_fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NULL; END $$;"
        "CREATE TRIGGER test_fault BEFORE INSERT ON notification FOR EACH STATEMENT EXECUTE FUNCTION test_fault()"
    )
    try:
        yield
    finally:
        execute("DROP FUNCTION test_fault CASCADE")
