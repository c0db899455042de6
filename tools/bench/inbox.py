"""A part of `make bench`: the inbox of a user with 100,000 notifications, in a table of 10,000,000.

The user is one of RECIPIENTS of each of 100,000 messages, in several channels and by several authors; the other
recipients are all members in turn. So each row of the user is on a different page, as in production. Each HTTP request
is compared with the same request of a user with FEW notifications in a table that has no others.

The last partition is in use, and half full.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from belfry.cli import seeding
from belfry.core import partitions
from belfry.core.db import execute, fetch_all
from belfry.identity import users
from config import tuning
from tools.bench.harness import BenchHarness
from tools.bench.measuring import fill_partition, maintain_partitions, time_requests
from tools.dev import say

RECIPIENTS = 100
MEMBERS, CHANNELS, AUTHORS = 10_000, 10, 50
FEW = 10
PER_PARTITION = tuning.partition_min_rows * 9 // 10 // RECIPIENTS  # messages; a fuller partition might be closed
WARM_UP = 24  # requests, after which each database connection has its plans, as in production
FIRST, DEEP, UNREAD_PAGE = "first page", "page in the middle", "page of the unread"
COUNT, MARK = "unread count", "mark all"


def measure(harness: BenchHarness, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"rows", "own", "ms": {situation: {request: {"p50", "p95"}}}}."""
    inbox = _Inbox(harness, arguments.inbox_rows)
    ms: dict[str, dict[str, dict[str, float]]] = {}
    with harness.web():
        say(f"an inbox of {FEW} notifications, with no others in the table")
        inbox.fill_few()
        ms[f"{FEW} of {FEW} unread"] = inbox.reads(200, inbox.first_page) | {MARK: inbox.marking(FEW, 30)}
        say(f"inserting {inbox.messages * RECIPIENTS:,} notifications …")
        inbox.fill()
        middle = inbox.request_of_middle_page()
        for unread, times in ((inbox.messages, 30), (100, 40), (0, 40)):
            say(f"an inbox of {inbox.messages:,} notifications, {unread:,} of them unread")
            inbox.set_unread(unread)
            found = inbox.reads(times, middle)
            if unread:
                found[MARK] = inbox.marking(unread, 6 if unread > 1_000 else 20)
            ms[f"{unread:,} of {inbox.messages:,} unread"] = found
    rows, number = harness.count_notifications(), len(partitions.list_partitions())
    harness.delete_messages()
    return {"rows": rows, "own": inbox.messages, "few": FEW, "partitions": number, "ms": ms}


class _Inbox:
    """A user, their server, and the requests."""

    def __init__(self, harness: BenchHarness, all_rows: int) -> None:
        self.harness, self.messages = harness, max(1_000, all_rows // RECIPIENTS)
        made = seeding.seed(MEMBERS, CHANNELS)
        self.channel_ids = made["channel_ids"][:1] + made["channel_ids"][3:]  # that all members can read
        found = fetch_all(
            "SELECT m.user_id, p.user_id IS NULL AND s.status = 'active' AS wants_all"
            " FROM member m"
            " LEFT JOIN preference p ON p.user_id = m.user_id"
            " LEFT JOIN subscription s ON s.user_id = m.user_id"
            " WHERE m.server_id = %(server_id)s"
            " ORDER BY m.user_id",
            made,
        )
        self.user_id = next(one["user_id"] for one in found if one["wants_all"])
        self.others = [one["user_id"] for one in found if one["user_id"] != self.user_id]
        self.client = harness.client_of(users.find_user(self.user_id))

    def get(self, what: str) -> Callable[[], Any]:
        return lambda: self.client.get(f"/api/notifications{what}")

    @property
    def first_page(self) -> Callable[[], Any]:
        return self.get("")

    def fill_few(self) -> None:
        self.harness.delete_notifications()
        ids = self.harness.insert_messages(self.channel_ids[:1], FEW)
        execute(
            "INSERT INTO notification (user_id, message_id, reason)"
            " SELECT %(user_id)s, message_id, 'message' FROM unnest(%(ids)s::bigint[]) AS message_id",
            {"user_id": self.user_id, "ids": ids},
        )
        execute("VACUUM (ANALYZE) notification")

    def fill(self) -> None:
        execute("TRUNCATE notification")
        partitions.maintain()
        first = partitions.list_partitions()[-1].upper  # after the existing ones
        number = -(-self.messages // PER_PARTITION)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: self._fill_one(first, one), range(number)))
        following = first + (number - 1) * partitions.PARTITION_SPAN + PER_PARTITION
        execute(f"ALTER SEQUENCE message_id_seq RESTART WITH {following}")
        maintain_partitions()
        execute("VACUUM (ANALYZE)")
        execute("CHECKPOINT")

    def _fill_one(self, first: int, number: int) -> None:
        lower = first + number * partitions.PARTITION_SPAN
        here = {
            "lower": lower,
            "upper": lower + min(PER_PARTITION, self.messages - number * PER_PARTITION) - 1,
            "channel_ids": self.channel_ids,
            "author_ids": self.others[:AUTHORS],
            "others": self.others,
            "user_id": self.user_id,
            "recipients": RECIPIENTS - 1,
        }
        self._execute(
            "INSERT INTO message (id, channel_id, author_id, content)"
            " SELECT n, (%(channel_ids)s::bigint[])[1 + n %% cardinality(%(channel_ids)s::bigint[])],"
            "  (%(author_ids)s::bigint[])[1 + (n / 7) %% cardinality(%(author_ids)s::bigint[])],"
            "  repeat('gold breaks out ', 5)"
            " FROM generate_series(%(lower)s::bigint, %(upper)s::bigint) AS n",
            here,
        )
        fill_partition(
            self.harness.env["DATABASE_URL"],
            lower,
            "SELECT CASE notified WHEN 0 THEN %(user_id)s::bigint"
            "  ELSE (%(others)s::bigint[])[1 + (n * %(recipients)s + notified) %% cardinality(%(others)s::bigint[])]"
            "  END AS user_id,"
            "  n AS message_id, CASE WHEN notified > 0 THEN now() END AS read_at"
            " FROM generate_series(%(lower)s::bigint, %(upper)s::bigint) AS n,"
            " generate_series(0, %(recipients)s) AS notified",
            here,
        )

    def _execute(self, statement: str, parameters: dict[str, Any]) -> None:
        with psycopg.connect(self.harness.env["DATABASE_URL"], autocommit=True) as connection:
            connection.execute(statement, parameters)

    def request_of_middle_page(self) -> Callable[[], Any]:
        """Go from page to page to the middle; returns the request for that page."""
        page = self.client.get("/api/notifications?limit=100")
        for _ in range(self.messages // 200):
            page = self.client.get(f"/api/notifications?limit=100&cursor={page['next']}")
        return self.get(f"?cursor={page['next']}")

    def set_unread(self, newest: int, *, vacuum: bool = True) -> None:
        """Make the newest notifications of the user unread, and the others read; then `vacuum` the table."""
        execute(
            "WITH newest AS ("
            "  SELECT message_id FROM notification WHERE user_id = %(user_id)s ORDER BY 1 DESC LIMIT %(newest)s)"
            " UPDATE notification n SET read_at = CASE WHEN unread THEN NULL ELSE now() END"
            " FROM (SELECT message_id, message_id IN (SELECT message_id FROM newest) AS unread"
            "  FROM notification WHERE user_id = %(user_id)s) o"
            " WHERE n.user_id = %(user_id)s AND n.message_id = o.message_id AND (n.read_at IS NULL) <> unread",
            {"user_id": self.user_id, "newest": newest},
        )
        if vacuum:
            execute("VACUUM notification")
        assert self.client.get("/api/notifications/unread-count")["unread"] == newest

    def reads(self, times: int, middle: Callable[[], Any]) -> dict[str, dict[str, float]]:
        requests = {
            "own user": lambda: self.client.get("/api/me"),  # a request without notifications, for comparison
            FIRST: self.first_page,
            DEEP: middle,
            UNREAD_PAGE: self.get("?unread=1"),
            COUNT: self.get("/unread-count"),
        }
        return {name: time_requests(request, times, warm_up=WARM_UP) for name, request in requests.items()}

    def marking(self, unread: int, times: int) -> dict[str, float]:
        """Mark all as read, with that number of unread ones each time."""

        def mark() -> None:
            assert self.client.post("/api/notifications/read", {"all": True}) == {"marked": unread, "unread": 0}

        return time_requests(mark, times, warm_up=2, before=lambda: self.set_unread(unread, vacuum=unread > 1_000))


def table(results: dict[str, Any]) -> str:
    """Format the results."""
    few, *many = results["ms"].items()
    lines = [
        f"The inbox of a user with {results['own']:,} notifications, of {results['rows']:,} in"
        f" {results['partitions']} partitions; ms, and the p50 divided by that with only {few[0]} in the table",
        f"  {'':20} {few[0]:>19}" + "".join(f"{name:>27}" for name, _ in many),
    ]
    for name, alone in few[1].items():
        line = f"  {name:20} {alone['p50']:9.2f} {alone['p95']:9.2f}"
        for _, found in many:
            one = found.get(name)
            line += f"{one['p50']:10.2f} {one['p95']:9.2f} {one['p50'] / alone['p50']:5.1f}x" if one else " " * 27
        lines.append(line)
    return "\n".join(lines)
