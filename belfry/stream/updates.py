"""What is new for those who are connected: exactly what they have not been sent, in whatever order it was committed.

Where somebody is, is one of PostgreSQL's snapshots: the transactions whose work they were sent. What is new was told
by a transaction outside of it. So nothing waits for a transaction that is still under way, nothing is passed over, and
a stream that broke off goes on in any other process.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from belfry.core.db import Row, db, execute, fetch_all, fetch_one, set_config_sql
from belfry.identity.sessions import SESSION_IS_OPEN_SQL
from belfry.identity.subscriptions import ACTIVE_SUBSCRIPTION_SQL
from belfry.identity.tokens import TOKEN_IS_VALID_SQL
from belfry.inbox import inbox
from belfry.stream.cursor import StreamCursor
from config import settings, tuning
from models import User

LOG_RETENTION_HOURS = 24  # of what was told: for so long somebody may be away, and go on where they were
_LOOKUP_SETTINGS = {
    "jit": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "statement_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",  # it locks nothing, and puts into words what it reads
}


@dataclass
class Updates:
    """What somebody has not been sent: by user id, each notification with the position that it brings them to.

    `counts_changed`: of whom some may have been withdrawn or made unread again, too. `overflow`: it is more than can
    be sent one by one, or not known any longer; the inbox has it.
    """

    notifications: dict[int, list[tuple[StreamCursor, Row]]] = field(default_factory=dict)
    counts_changed: set[int] = field(default_factory=set)
    overflow: bool = False


@contextmanager
def take_snapshot() -> Iterator[StreamCursor]:
    """While the block runs, everything in it sees the same moment. Yields the position of who was sent all of it.

    On a standby, where unlogged tables cannot be read, the epoch is "": its positions are good on standbys alone.
    """
    with db.connection_context():
        while True:
            with db.atomic():
                execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                found = fetch_one(
                    "SELECT pg_current_snapshot()::text AS snapshot, pg_is_in_recovery() AS is_standby,"
                    f" {set_config_sql(_LOOKUP_SETTINGS)}"
                )
                assert found is not None
                epoch = "" if found["is_standby"] else _epoch()
                if epoch is not None:
                    yield StreamCursor(int(time.time()), found["snapshot"], epoch=epoch)
                    return
            execute("INSERT INTO stream_epoch DEFAULT VALUES ON CONFLICT DO NOTHING")


def _epoch() -> str | None:
    """The database's epoch. None where it has none: after a crash, a promotion, or a restore without unlogged data.

    The system identifier is part of it, because a dump that is restored elsewhere brings the table's row along.
    """
    found = fetch_one(
        "SELECT epoch::text || (SELECT system_identifier FROM pg_control_system()) AS epoch FROM stream_epoch"
    )
    return str(found["epoch"]) if found else None


def updates_since(since: StreamCursor, here: StreamCursor, user_ids: Collection[int]) -> Updates:
    """Find what these connected users, all at `since`, have not been sent, of what `here` sees.

    `here` is a snapshot that `take_snapshot` gave.
    """
    found = Updates()
    if since.epoch != here.epoch or not is_resumable(since, here):
        return Updates(overflow=True)
    if not user_ids:
        return found
    log_rows = fetch_all(
        """
        SELECT t.xid::text::bigint AS xid, t.message_id, t.notified_at, t.counts_changed, c.server_id
        FROM (
            SELECT xid, unnest(message_ids) AS message_id, notified_at, counts_changed
            FROM notification_log
            WHERE xid >= pg_snapshot_xmin(%(since)s::pg_snapshot)  -- any before that it shows
            AND NOT pg_visible_in_snapshot(xid, %(since)s::pg_snapshot)
            AND pg_visible_in_snapshot(xid, %(here)s::pg_snapshot)
            LIMIT %(limit)s
        ) t
        JOIN message g ON g.id = t.message_id
        JOIN channel c ON c.id = g.channel_id
        """,
        {"since": since.snapshot, "here": here.snapshot, "limit": tuning.stream_max_log_rows + 1},
    )
    if not log_rows:
        return found
    messages = Counter(server_id for _, server_id in {(one["message_id"], one["server_id"]) for one in log_rows})
    members = possible_recipients(user_ids, list(messages))
    recounted = {logged["server_id"] for logged in log_rows if logged["counts_changed"]}
    found.counts_changed |= {member["user_id"] for member in members if member["server_id"] in recounted}
    lookups = sum(messages[member["server_id"]] for member in members)
    if lookups > tuning.stream_max_lookups or len(log_rows) > tuning.stream_max_log_rows:
        found.overflow = True
        return found
    new: dict[int, list[Row]] = {}
    for notification in inbox.notifications_for(log_rows, members) if members else []:
        new.setdefault(notification.pop("user_id"), []).append(notification)
    for user_id, notifications in new.items():
        found.notifications[user_id] = with_cursors(notifications, since.snapshot, here)
    return found


def is_resumable(since: StreamCursor, here: StreamCursor) -> bool:
    """Return whether it is known what a client at `since` was not sent: not after a day, nor of another database."""
    too_long = here.taken - since.taken > (LOG_RETENTION_HOURS - 1) * 3_600
    return not too_long and since.next_transaction <= here.next_transaction


def with_cursors(notifications: list[Row], before: str, to: StreamCursor) -> list[tuple[StreamCursor, Row]]:
    """Each notification with the position it brings a client to, who was sent what `before` shows; the last one: `to`.

    They are in the order of their messages.
    """
    last = len(notifications) - 1
    return [
        (to if number == last else replace(to, before=before, up_to=notification["message_id"]), notification)
        for number, notification in enumerate(notifications)
    ]


def possible_recipients(user_ids: Collection[int], server_ids: Collection[int]) -> list[Row]:
    """Who of these people may have been told in which of these servers: {"user_id", "server_id"} each.

    Members; and admins wherever they are, who see all even after they have left.
    """
    return fetch_all(
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


def authorized_clients(token_hashes: Collection[bytes]) -> dict[bytes, tuple[User, frozenset[int]]]:
    """Of these tokens those whose person may listen, with them and the servers that they are in.

    A session's hash stands for itself, not for its token: it is looked for among both.

    Whose token counts, who is an admin, or an active subscriber and somebody's member: those who may be told.
    """
    which: bytes | list[bytes] = list(token_hashes)
    is_asked = "= ANY(%(which)s::bytea[])"
    if len(which) == 1:  # PostgreSQL plans a comparison with an array each time, which takes longer than all the rest
        [which], is_asked = token_hashes, "= %(which)s"
    found = fetch_all(
        f"""
        SELECT valid.token_hash, u.id, u.username, u.name, u.email, u.is_admin, u.created_at,
            ARRAY(SELECT m.server_id FROM member m WHERE m.user_id = u.id) AS servers
        FROM (
            SELECT t.token_hash, t.user_id
            FROM api_token t
            WHERE t.token_hash {is_asked}
            AND {TOKEN_IS_VALID_SQL}
            UNION ALL
            SELECT session.session_hash, t.user_id
            FROM session
            JOIN api_token t ON t.id = session.token_id
            WHERE session.session_hash {is_asked}
            AND {SESSION_IS_OPEN_SQL}
            AND {TOKEN_IS_VALID_SQL}
        ) valid
        JOIN user_account u ON u.id = valid.user_id
        WHERE (u.is_admin OR (
            EXISTS (SELECT FROM subscription sub WHERE sub.user_id = u.id AND {ACTIVE_SUBSCRIPTION_SQL})
            AND EXISTS (SELECT FROM member m WHERE m.user_id = u.id)))
        """,
        {"which": which, "grace_days": settings.past_due_grace_days},
    )
    return {
        bytes(one.pop("token_hash")): (User(**one), frozenset(servers))
        for one in found
        for servers in [one.pop("servers")]
    }


def notified_among(message_id: int, user_ids: Collection[int]) -> set[int]:
    """Who of these people was told of a message."""
    found = fetch_all(
        "SELECT user_id FROM notification"
        " WHERE user_id = ANY(%(user_ids)s::bigint[]) AND message_id = %(message_id)s",
        {"user_ids": list(user_ids), "message_id": message_id},
    )
    return {one["user_id"] for one in found}


def purge_log(limit: int) -> int:
    """Delete at most `limit` transactions of each kind, the oldest first; returns how many.

    Those that are older than anybody can have been away, and those that came with a copy of another database, whose
    numbers are ahead of ours.
    """
    copied = execute(
        """
        DELETE FROM notification_log WHERE xid IN (
            SELECT xid
            FROM notification_log
            WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())
            ORDER BY xid
            LIMIT %(limit)s
        )
        """,
        {"limit": limit},
    )
    return copied + execute(
        """
        DELETE FROM notification_log WHERE xid IN (
            SELECT xid
            FROM (  -- the oldest only: the others are not read
                SELECT xid, notified_at FROM notification_log ORDER BY xid LIMIT %(limit)s
            ) oldest
            WHERE notified_at < now() - make_interval(hours => %(hours)s)
        )
        """,
        {"hours": LOG_RETENTION_HOURS, "limit": limit},
    )
