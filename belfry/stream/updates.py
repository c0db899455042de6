"""Find what connected clients have not been sent, exactly, in whatever order it was committed.

A client's cursor is one of PostgreSQL's snapshots: the transactions whose work it was sent. New is what a transaction
outside of the snapshot wrote. So nothing waits for a transaction in progress, nothing is skipped, and a stream that is
interrupted resumes in any process.
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
from belfry.servers.visibility import can_see_channel_sql
from belfry.stream.cursor import StreamCursor
from config import settings, tuning
from models import User

LOG_RETENTION_HOURS = 24  # how long a client may be away and resume
_LOOKUP_SETTINGS = {
    "jit": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "statement_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",  # it locks nothing, and serializes what it reads
}


@dataclass
class Updates:
    """What has not been sent: {user id: [(cursor after it, notification)]}.

    `counts_changed`: users whose notifications may have been retracted or made unread again as well. `overflow`: it is
    more than can be sent one by one, or is not known any more; the client reads the inbox instead.
    """

    notifications: dict[int, list[tuple[StreamCursor, Row]]] = field(default_factory=dict)
    counts_changed: set[int] = field(default_factory=set)
    overflow: bool = False


@contextmanager
def take_snapshot() -> Iterator[StreamCursor]:
    """Read everything within the block from one snapshot. Yields the cursor of a client that was sent all of it.

    On a standby, where unlogged tables cannot be read, the epoch is "": its cursors are valid only on standbys.
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
    """The database's epoch; None where it has none, after a crash, a promotion, or a restore without unlogged data.

    It includes the system identifier, because a dump that is restored elsewhere contains the table's row.
    """
    found = fetch_one(
        "SELECT epoch::text || (SELECT system_identifier FROM pg_control_system()) AS epoch FROM stream_epoch"
    )
    return str(found["epoch"]) if found else None


def updates_since(since: StreamCursor, here: StreamCursor, user_ids: Collection[int]) -> Updates:
    """Find what the clients of these users, all at `since`, have not been sent, within `here` of `take_snapshot`."""
    found = Updates()
    if since.epoch != here.epoch or not is_resumable(since, here):
        return Updates(overflow=True)
    if not user_ids:
        return found
    log_rows = fetch_all(
        """
        SELECT log.xid::text::bigint AS xid, log.message_id, log.notified_at, log.counts_changed, chan.server_id
        FROM (
            SELECT xid, unnest(message_ids) AS message_id, notified_at, counts_changed
            FROM notification_log
            WHERE xid >= pg_snapshot_xmin(%(since)s::pg_snapshot)  -- it shows all before
            AND NOT pg_visible_in_snapshot(xid, %(since)s::pg_snapshot)
            AND pg_visible_in_snapshot(xid, %(here)s::pg_snapshot)
            LIMIT %(limit)s
        ) log
        JOIN message msg ON msg.id = log.message_id
        JOIN channel chan ON chan.id = msg.channel_id
        """,
        {"since": since.snapshot, "here": here.snapshot, "limit": tuning.stream_max_log_rows + 1},
    )
    if not log_rows:
        return found
    messages = Counter(server_id for _, server_id in {(one["message_id"], one["server_id"]) for one in log_rows})
    members = possible_recipients(user_ids, list(messages))
    changed_servers = {logged["server_id"] for logged in log_rows if logged["counts_changed"]}
    found.counts_changed |= {member["user_id"] for member in members if member["server_id"] in changed_servers}
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
    """Whether the log still has what a client at `since` was not sent: not after a day, nor from another database."""
    too_long = here.created_at - since.created_at > (LOG_RETENTION_HOURS - 1) * 3_600
    return not too_long and since.next_transaction <= here.next_transaction


def with_cursors(notifications: list[Row], before: str, to: StreamCursor) -> list[tuple[StreamCursor, Row]]:
    """Pair each notification with the cursor after it, for a client that was sent what `before` shows.

    They are in the order of their messages; the last cursor is `to`.
    """
    last = len(notifications) - 1
    return [
        (to if number == last else replace(to, before=before, up_to=notification["message_id"]), notification)
        for number, notification in enumerate(notifications)
    ]


def possible_recipients(user_ids: Collection[int], server_ids: Collection[int]) -> list[Row]:
    """Which users may have been notified in which servers: rows of {"user_id", "server_id"}.

    Members, and admins in every server, because they see all servers even after they have left.
    """
    return fetch_all(
        """
        SELECT member.user_id, member.server_id
        FROM member
        JOIN user_account usr ON usr.id = member.user_id
        WHERE member.user_id = ANY(%(user_ids)s::bigint[])
        AND member.server_id = ANY(%(server_ids)s::bigint[])
        AND NOT usr.is_admin
        UNION ALL
        SELECT usr.id, srv.server_id
        FROM user_account usr
        CROSS JOIN unnest(%(server_ids)s::bigint[]) AS srv (server_id)
        WHERE usr.id = ANY(%(user_ids)s::bigint[])
        AND usr.is_admin
        """,
        {"user_ids": list(user_ids), "server_ids": list(server_ids)},
    )


def authorized_clients(token_hashes: Collection[bytes]) -> dict[bytes, tuple[User, frozenset[int]]]:
    """Which tokens or sessions may use the stream: {hash: (user, ids of the user's servers)}.

    They must be valid, and their user an admin, or an active subscriber who is a member of a server: users who can be
    notified. A session's hash stands for itself, not for its token, so both tables are read.
    """
    hashes: bytes | list[bytes] = list(token_hashes)
    matches = "= ANY(%(hashes)s::bytea[])"
    if len(hashes) == 1:  # a comparison with an array is planned each time, which takes longer than the query
        [hashes], matches = token_hashes, "= %(hashes)s"
    found = fetch_all(
        f"""
        SELECT valid.token_hash, usr.id, usr.username, usr.name, usr.email, usr.is_admin, usr.created_at,
            ARRAY(SELECT server_id FROM member WHERE user_id = usr.id) AS servers
        FROM (
            SELECT token.token_hash, token.user_id
            FROM api_token token
            WHERE token.token_hash {matches}
            AND {TOKEN_IS_VALID_SQL}
            UNION ALL
            SELECT session.session_hash, token.user_id
            FROM session
            JOIN api_token token ON token.id = session.token_id
            WHERE session.session_hash {matches}
            AND {SESSION_IS_OPEN_SQL}
            AND {TOKEN_IS_VALID_SQL}
        ) valid
        JOIN user_account usr ON usr.id = valid.user_id
        WHERE (usr.is_admin OR (
            EXISTS (SELECT FROM subscription sub WHERE sub.user_id = usr.id AND {ACTIVE_SUBSCRIPTION_SQL})
            AND EXISTS (SELECT FROM member WHERE member.user_id = usr.id)))
        """,
        {"hashes": hashes, "grace_days": settings.past_due_grace_days},
    )
    return {
        bytes(one.pop("token_hash")): (User(**one), frozenset(servers))
        for one in found
        for servers in [one.pop("servers")]
    }


def notified_among(message_id: int, user_ids: Collection[int]) -> set[int]:
    """Which of these users have a notification of a message."""
    found = fetch_all(
        "SELECT user_id FROM notification"
        " WHERE user_id = ANY(%(user_ids)s::bigint[]) AND message_id = %(message_id)s",
        {"user_ids": list(user_ids), "message_id": message_id},
    )
    return {one["user_id"] for one in found}


def messages_by_channel(message_ids: Collection[int], channel_ids: Collection[int]) -> dict[int, list[int]]:
    """The ids of the messages in some channels: {channel id: message ids, sorted}. Deleted ones are included."""
    found: dict[int, list[int]] = {}
    for row in fetch_all(
        "SELECT id, channel_id FROM message"
        " WHERE id = ANY(%(message_ids)s::bigint[]) AND channel_id = ANY(%(channel_ids)s::bigint[])"
        " ORDER BY id",
        {"message_ids": list(message_ids), "channel_ids": list(channel_ids)},
    ):
        found.setdefault(row["channel_id"], []).append(row["id"])
    return found


def oldest_unfinished_seconds() -> float:
    """The age of the oldest unfinished run; 0 without one."""
    found = fetch_one(
        "SELECT EXTRACT(epoch FROM now() - min(created_at))::float AS seconds"
        " FROM run"
        " WHERE state IN ('pending', 'queued', 'running')"
    )
    return float(found["seconds"] or 0) if found else 0.0


def visible_views(views: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those of some (user id, channel id) whose user can see the channel."""
    found = fetch_all(
        f"""
        SELECT usr.id AS user_id, chan.id AS channel_id
        FROM unnest(%(user_ids)s::bigint[], %(channel_ids)s::bigint[]) AS viewed (user_id, channel_id)
        JOIN user_account usr ON usr.id = viewed.user_id
        JOIN channel chan ON chan.id = viewed.channel_id
        WHERE {can_see_channel_sql("usr.id", "usr.is_admin")}
        """,
        {"user_ids": [user_id for user_id, _ in views], "channel_ids": [channel_id for _, channel_id in views]},
    )
    return {(one["user_id"], one["channel_id"]) for one in found}


def purge_log(limit: int) -> int:
    """Delete at most `limit` rows of each kind from the log, the oldest first; how many.

    Rows older than LOG_RETENTION_HOURS, and rows of a restored copy of another database, whose transaction ids are in
    the future.
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
