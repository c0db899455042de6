"""What is new for those who are connected: exactly what they have not been sent, in whatever order it was committed.

Where somebody is, is one of PostgreSQL's snapshots: the transactions whose work they were sent. What is new was told
by a transaction outside of it. So nothing waits for a transaction that is still under way, nothing is passed over, and
a stream that broke off goes on in any other process.
"""

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from belfry import inbox
from belfry.accounts import IS_VALID
from belfry.recipients import ACTIVE_SUBSCRIPTION
from belfry.sql import Row, execute, row, rows, set_locally
from config import settings
from models import User, db

KEPT_HOURS = 24  # of what was told: for so long somebody may be away, and go on where they were
LOOKUPS_AT_MOST = 100_000  # messages times members in one look: some 20 µs for each that was told
TELLINGS_AT_MOST = 20_000  # read in one look, before anybody is looked up
_NUMBER = "[0-9]{1,18}"
_SNAPSHOT = f"{_NUMBER}:{_NUMBER}:(?:{_NUMBER}(?:,{_NUMBER})*)?"
_POSITION = re.compile(f"([0-9]{{1,11}})-({_SNAPSHOT})(?:-({_NUMBER})-({_SNAPSHOT}))?")
_LOOKS_UP = {
    "jit": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "statement_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",  # it locks nothing, and puts into words what it reads
}


@dataclass(frozen=True)
class Position:
    """Up to where somebody was sent everything: what `snapshot` shows. `taken` is when, in seconds since 1970.

    In the midst of what one look found: they were sent what `before` shows, and of the rest that `snapshot` shows the
    messages up to `up_to`.
    """

    taken: int
    snapshot: str
    before: str | None = None
    up_to: int = 0

    def __str__(self) -> str:
        midst = f"-{self.up_to}-{self.before}" if self.before else ""
        return f"{self.taken}-{self.snapshot}{midst}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Raises ValueError for what was never given out."""
        found = _POSITION.fullmatch(text)
        if not found or not all(_is_snapshot(part) for part in (found[2], found[4]) if part):
            raise ValueError(f"{text[:50]!r} is no position in the stream")
        return cls(int(found[1]), found[2], found[4], int(found[3] or 0))

    @property
    def next_transaction(self) -> int:
        """No transaction from this number on had begun."""
        return int(self.snapshot.split(":")[1])


def _is_snapshot(text: str) -> bool:
    """Whether PostgreSQL takes this for one: the least and the next transaction, and between them those under way."""
    least, following, under_way = text.split(":")
    numbers = [int(least), *map(int, filter(None, under_way.split(",")))]
    in_order = numbers == sorted(numbers) and (len(numbers) == 1 or numbers[-1] < int(following))
    return in_order and 0 < int(least) <= int(following)


@dataclass
class News:
    """What somebody has not been sent: by user id, each notification with the position that it brings them to.

    `recount`: of whom some may have been withdrawn or made unread again, too. `too_much`: it is more than can
    be sent one by one, or not known any longer; the inbox has it.
    """

    notifications: dict[int, list[tuple[Position, Row]]] = field(default_factory=dict)
    recount: set[int] = field(default_factory=set)
    too_much: bool = False


@contextmanager
def look() -> Iterator[Position]:
    """While the block runs, everything in it sees the same moment. Yields the position of who was sent all of it."""
    with db.connection_context(), db.atomic():
        execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        found = row(f"SELECT pg_current_snapshot()::text AS snapshot, {set_locally(_LOOKS_UP)}")
        assert found is not None
        yield Position(int(time.time()), found["snapshot"])


def news(since: Position, here: Position, user_ids: Collection[int]) -> News:
    """What these people have not been sent who are at `since`, of what is seen `here`, in a `look`."""
    if here.taken - since.taken > (KEPT_HOURS - 1) * 3_600 or since.next_transaction > here.next_transaction:
        return News(too_much=True)  # too long ago, or of another database
    found = News()
    if since.before:  # first the rest of what was under way
        whole = replace(since, before=None, up_to=0)
        _collect(found, Position(since.taken, since.before), whole, user_ids, above=since.up_to)
        since = whole
    _collect(found, since, here, user_ids)
    return found


def _collect(found: News, since: Position, here: Position, user_ids: Collection[int], above: int = 0) -> None:
    if not user_ids:
        return
    tellings = rows(
        """
        SELECT t.message_id, t.told_at, t.recount, c.server_id
        FROM (
            SELECT unnest(message_ids) AS message_id, told_at, recount
            FROM telling
            WHERE xid >= pg_snapshot_xmin(%(since)s::pg_snapshot)  -- any before that it shows
            AND NOT pg_visible_in_snapshot(xid, %(since)s::pg_snapshot)
            AND pg_visible_in_snapshot(xid, %(here)s::pg_snapshot)
            LIMIT %(limit)s
        ) t
        JOIN message g ON g.id = t.message_id
        JOIN channel c ON c.id = g.channel_id
        WHERE t.message_id > %(above)s
        """,
        {"since": since.snapshot, "here": here.snapshot, "above": above, "limit": TELLINGS_AT_MOST + 1},
    )
    if not tellings:
        return
    messages = Counter(server_id for _, server_id in {(one["message_id"], one["server_id"]) for one in tellings})
    members = _members(user_ids, list(messages))
    recounted = {telling["server_id"] for telling in tellings if telling["recount"]}
    found.recount |= {member["user_id"] for member in members if member["server_id"] in recounted}
    lookups = sum(messages[member["server_id"]] for member in members)
    if lookups > LOOKUPS_AT_MOST or len(tellings) > TELLINGS_AT_MOST:
        found.too_much = True
        return
    new: dict[int, list[Row]] = {}
    for notification in inbox.told_together(tellings, members) if members else []:
        new.setdefault(notification.pop("user_id"), []).append(notification)
    for user_id, notifications in new.items():
        sent = found.notifications.setdefault(user_id, [])
        for notification in notifications:
            last = notification is notifications[-1]
            midst = replace(here, before=since.snapshot, up_to=notification["message_id"])
            sent.append((here if last else midst, notification))


def _members(user_ids: Collection[int], server_ids: Collection[int]) -> list[Row]:
    """Who of these people may have been told in which of these servers: {"user_id", "server_id"} each.

    Members; and admins wherever they are, who see all even after they have left.
    """
    return rows(
        """
        SELECT m.user_id, m.server_id
        FROM member m
        JOIN user_account u ON u.id = m.user_id
        WHERE m.user_id = ANY(%(user_ids)s::bigint[])
        AND m.server_id = ANY(%(server_ids)s::bigint[])
        AND NOT u.is_admin
        UNION ALL
        SELECT u.id, s.server_id
        FROM user_account u
        CROSS JOIN unnest(%(server_ids)s::bigint[]) AS s (server_id)
        WHERE u.id = ANY(%(user_ids)s::bigint[])
        AND u.is_admin
        """,
        {"user_ids": list(user_ids), "server_ids": list(server_ids)},
    )


def listeners(token_hashes: Collection[bytes]) -> dict[bytes, tuple[User, frozenset[int]]]:
    """Of these tokens those whose person may listen, with them and the servers that they are in.

    Whose token counts, who is an admin, or an active subscriber and somebody's member: those who may be told.
    """
    found = rows(
        f"""
        SELECT t.token_hash, u.id, u.username, u.name, u.email, u.is_admin, u.created_at,
            ARRAY(SELECT m.server_id FROM member m WHERE m.user_id = u.id) AS servers
        FROM api_token t
        JOIN user_account u ON u.id = t.user_id
        WHERE t.token_hash = ANY(%(token_hashes)s::bytea[])
        AND {IS_VALID}
        AND (u.is_admin OR (
            EXISTS (SELECT FROM subscription s WHERE s.user_id = u.id AND {ACTIVE_SUBSCRIPTION})
            AND EXISTS (SELECT FROM member m WHERE m.user_id = u.id)))
        """,
        {"token_hashes": list(token_hashes), "grace_days": settings.past_due_grace_days},
    )
    return {
        bytes(one.pop("token_hash")): (User(**one), frozenset(servers))
        for one in found
        for servers in [one.pop("servers")]
    }


def told_of(message_id: int, user_ids: Collection[int]) -> set[int]:
    """Who of these people was told of a message."""
    found = rows(
        "SELECT user_id FROM notification"
        " WHERE user_id = ANY(%(user_ids)s::bigint[]) AND message_id = %(message_id)s",
        {"user_ids": list(user_ids), "message_id": message_id},
    )
    return {one["user_id"] for one in found}


def forget_old_tellings() -> int:
    """Drop what is older than anybody can have been away, and what came with a copy of another database, whose numbers
    are ahead of ours; how many transactions that were."""
    copied = execute("DELETE FROM telling WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())")
    return copied + execute(
        """
        DELETE FROM telling WHERE xid IN (
            SELECT xid
            FROM (SELECT xid, told_at FROM telling ORDER BY xid LIMIT 1000) oldest  -- and no look at all the others
            WHERE told_at < now() - make_interval(hours => %(hours)s)
        )
        """,
        {"hours": KEPT_HOURS},
    )
