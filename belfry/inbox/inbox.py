"""The inbox: a user's notifications as they are now.

- Notifications are listed newest message first, in the order of the key, so that a page reads only its own rows.
- Title and body are made from the message when they are read, so an edit shows at once.
- Notifications of deleted messages, of channels that the user can no longer see, and of authors who may no longer post
  there are neither shown nor counted while that is so. Nothing is removed.
- Every statement is restricted to one user: notifications of other users do not exist.
"""

from collections.abc import Collection, Sequence
from typing import Any

from belfry.core.db import LARGEST_ID, Row, execute, fetch_all, fetch_one, transaction
from belfry.core.errors import Invalid, NotFound
from belfry.core.failpoints import failpoint
from belfry.core.plain_text import SOURCE_CHARACTERS, excerpt
from belfry.servers.visibility import (
    AUTHOR_CAN_POST_SQL,
    VIEWER_CTE_SQL,
    can_see_channel_sql,
    get_visible_channel,
    visible_channels,
)
from models import User

BODY_CHARACTERS = 100

_AUTHOR_CAN_POST_SQL = f"""
    SELECT chan.id
    FROM channel chan
    JOIN user_account author ON author.id = msg.author_id
    WHERE chan.id = msg.channel_id
    AND {AUTHOR_CAN_POST_SQL}
    OFFSET 0  -- by their keys, whatever the estimates are: there are millions of accounts
"""
"""One row where the author of `msg` may still post there. `msg` is a message, or all of an author's in a channel."""

_VISIBLE_SQL = """msg.deleted_at IS NULL
    AND msg.channel_id = ANY(%(channel_ids)s::bigint[])"""
_OWN_SQL = "note.user_id = %(user_id)s AND note.dismissed_at IS NULL"
_UNREAD_SQL = "note.read_at IS NULL"
"""A constant and never a parameter, so that the index of unread notifications is used."""


def notification_id(user_id: int, message_id: int) -> str:
    """The id of a notification in the API, which contains both parts of the key."""
    return f"{user_id}-{message_id}"


def parse_notification_id(text: str) -> tuple[int, int]:
    """Parse a notification's id: (user id, message id). Raises ValueError for any other text."""
    user_id, _, message_id = text.partition("-")
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in (user_id, message_id)):
        raise ValueError("Must be the id of a notification, like 12-345.")
    if int(user_id) >= 2**63 or int(message_id) >= 2**63:
        raise ValueError("Must be the id of a notification, like 12-345.")
    return int(user_id), int(message_id)


def _channels_of(user: User, channel_id: int | None) -> dict[int, Row]:
    return {
        channel["id"]: channel
        for channel in visible_channels(user)
        if channel_id is None or channel["id"] == channel_id
    }


def list_notifications(
    user: User,
    *,
    before: int | None,
    limit: int,
    unread: bool = False,
    mentions: bool = False,
    channel_id: int | None = None,
) -> list[Row]:
    """List the user's notifications of messages with an id below `before`, newest message first.

    `unread` and `mentions` list only those. Raises NotFound for a channel that the user cannot see.
    """
    if channel_id is not None:
        get_visible_channel(user, channel_id)
    channels = _channels_of(user, channel_id)
    # PostgreSQL takes a bound and a limit that are parameters for a third and a tenth of all rows. A generic plan then
    # looks expensive, and each page is planned again, which takes longer than reading it.
    found = fetch_all(
        f"""
        SELECT note.message_id, note.created_at, note.read_at, note.reason::text AS reason,
            msg.channel_id, msg.author_name, msg.beginning
        FROM (
            SELECT note.message_id, note.created_at, note.read_at, note.reason
            FROM notification note
            WHERE {_OWN_SQL}
            {f"AND {_UNREAD_SQL}" if unread else ""}
            {"AND note.reason <> 'message'" if mentions else ""}
            {"" if before is None else "AND note.message_id < (SELECT %(before)s::bigint)"}
            ORDER BY note.message_id DESC
            LIMIT (SELECT NULL::bigint)  -- all of them, and the first ones soon: never read first, and sorted then
        ) note
        CROSS JOIN LATERAL (
            SELECT msg.channel_id, author.name AS author_name, left(msg.content, {SOURCE_CHARACTERS}) AS beginning
            FROM message msg
            JOIN user_account author ON author.id = msg.author_id
            WHERE msg.id = note.message_id
            AND {_VISIBLE_SQL}
            AND EXISTS ({_AUTHOR_CAN_POST_SQL})
            OFFSET 0  -- each message is looked up by its key: so only the partitions of this page are read
        ) msg
        ORDER BY note.message_id DESC
        LIMIT {limit:d}
        """,
        {"user_id": user.id, "channel_ids": list(channels), "before": before},
    )
    return [_serialize(user.id, notification, channels[notification["channel_id"]]) for notification in found]


def notifications_for(log_rows: Collection[Row], members: Collection[Row]) -> list[Row]:
    """The notifications that transactions wrote for users, as far as their inbox shows them, by message id.

    A log row is {"message_id", "notified_at", "xid"}, a member {"user_id", "server_id"}. Rows are as those of
    `list_notifications`, with "user_id". For a member with "from_xid", older transactions are not looked up.
    """
    found = fetch_all(
        f"""
        WITH chan AS MATERIALIZED (
            SELECT log_entry.notified_at, log_entry.last_xid, msg.id AS message_id,
                left(msg.content, {SOURCE_CHARACTERS}) AS beginning, author.name AS author_name,
                chan.id, chan.name, chan.private, chan.server_id, srv.name AS server_name
            FROM (
                SELECT message_id, max(xid) AS last_xid,
                    array_agg(notified_at) AS notified_at  -- each slice has its own time
                FROM unnest(%(message_ids)s::bigint[], %(notified_at)s::timestamptz[], %(xids)s::bigint[])
                    AS log (message_id, notified_at, xid)
                GROUP BY message_id
            ) log_entry
            JOIN message msg ON msg.id = log_entry.message_id
            JOIN channel chan ON chan.id = msg.channel_id
            JOIN user_account author ON author.id = msg.author_id
            JOIN server srv ON srv.id = chan.server_id
            WHERE msg.deleted_at IS NULL
            AND {AUTHOR_CAN_POST_SQL}
        ),
        reader AS MATERIALIZED (
            SELECT usr.id, usr.is_admin, mem.server_id, mem.from_xid
            FROM unnest(%(user_ids)s::bigint[], %(server_ids)s::bigint[], %(from_xids)s::bigint[])
                AS mem (user_id, server_id, from_xid)
            JOIN user_account usr ON usr.id = mem.user_id
        )
        SELECT reader.id AS user_id, chan.message_id, note.created_at, note.read_at, note.reason::text AS reason,
            chan.id AS channel_id, chan.name AS channel_name, chan.server_id, chan.server_name,
            chan.author_name, chan.beginning
        FROM chan
        JOIN reader ON reader.server_id = chan.server_id AND reader.from_xid <= chan.last_xid
        CROSS JOIN LATERAL (
            SELECT note.created_at, note.read_at, note.reason
            FROM notification note
            WHERE note.user_id = reader.id
            AND note.message_id = chan.message_id
            AND note.created_at = ANY(chan.notified_at)  -- not by another transaction: they know of that
            AND note.dismissed_at IS NULL
            OFFSET 0  -- each is looked up by its key
        ) note
        WHERE {can_see_channel_sql("reader.id", "reader.is_admin")}
        ORDER BY chan.message_id
        """,
        {
            "message_ids": [logged["message_id"] for logged in log_rows],
            "notified_at": [logged["notified_at"] for logged in log_rows],
            "xids": [logged["xid"] for logged in log_rows],
            "from_xids": [member.get("from_xid", 0) for member in members],
            "user_ids": [member["user_id"] for member in members],
            "server_ids": [member["server_id"] for member in members],
        },
    )
    return [
        {
            "user_id": one["user_id"],
            **_serialize(
                one["user_id"],
                one,
                {
                    "id": one["channel_id"],
                    "name": one["channel_name"],
                    "server": {"id": one["server_id"], "name": one["server_name"]},
                },
            ),
        }
        for one in found
    ]


def _serialize(user_id: int, notification: Row, channel: Row) -> Row:
    server, mentioned = channel["server"], notification["reason"] != "message"
    event = "You were mentioned" if mentioned else "New message"
    return {
        "id": notification_id(user_id, notification["message_id"]),
        "type": "mention" if mentioned else "message",
        "reason": notification["reason"],
        "title": f"{event} in {server['name']} #{channel['name']}",
        "body": f"{notification['author_name']}: {excerpt(notification['beginning'], BODY_CHARACTERS)}",
        "url": f"/servers/{server['id']}/channels/{channel['id']}#message-{notification['message_id']}",
        "message_id": notification["message_id"],
        "channel": {"id": channel["id"], "name": channel["name"]},
        "server": server,
        "created_at": notification["created_at"],
        "read_at": notification["read_at"],
    }


def unread_count(user: User) -> dict[str, Any]:
    """Count the unread notifications: {"unread", "mentions", "channels": [{"channel_id", "unread", "mentions"}]}."""
    per_channel = fetch_all(
        f"""
        WITH {VIEWER_CTE_SQL}
        SELECT msg.channel_id, sum(msg.unread)::bigint AS unread, sum(msg.mentions)::bigint AS mentions
        FROM (
            SELECT msg.channel_id, msg.author_id, msg.visible_to_user_id,
                count(*) AS unread, count(*) FILTER (WHERE note.reason <> 'message') AS mentions
            FROM notification note
            JOIN message msg ON msg.id = note.message_id
            WHERE {_OWN_SQL}
            AND {_UNREAD_SQL}
            AND msg.deleted_at IS NULL
            GROUP BY msg.channel_id, msg.author_id, msg.visible_to_user_id
        ) msg  -- who sees the channel, and whether its author may post, is asked once for all of theirs in it
        WHERE EXISTS (
            SELECT FROM viewer, channel chan
            WHERE chan.id = msg.channel_id
            AND {can_see_channel_sql("viewer.id", "viewer.is_admin")}
            OFFSET 0
        )
        AND EXISTS ({_AUTHOR_CAN_POST_SQL})
        GROUP BY msg.channel_id
        ORDER BY msg.channel_id
        """,
        {"user_id": user.id, "is_admin": user.is_admin},
    )
    return {
        "unread": sum(channel["unread"] for channel in per_channel),
        "mentions": sum(channel["mentions"] for channel in per_channel),
        "channels": per_channel,
    }


def first_unread(user: User, channel_id: int) -> int | None:
    """The id of the oldest message in a visible channel whose notification is unread; None where there is none."""
    found = fetch_one(
        f"""
        SELECT note.message_id
        FROM notification note
        JOIN message msg ON msg.id = note.message_id
        WHERE {_OWN_SQL}
        AND {_UNREAD_SQL}
        AND {_VISIBLE_SQL}
        AND EXISTS ({_AUTHOR_CAN_POST_SQL})
        ORDER BY note.message_id
        LIMIT 1
        """,
        {"user_id": user.id, "channel_ids": [channel_id]},
    )
    return found["message_id"] if found else None


_LATER_CTE_SQL = """
    up_to AS MATERIALIZED (
        SELECT last.message_id, log.xid,
            COALESCE(log.snapshot, '1:1:'::pg_snapshot) AS snapshot  -- the log does not reach back so far
        FROM (
            SELECT note.message_id, note.created_at
            FROM notification note
            WHERE note.user_id = %(user_id)s
            AND note.message_id <= %(up_to)s
            ORDER BY note.message_id DESC
            LIMIT 1
        ) last
        LEFT JOIN notification_log log ON log.notified_at = last.created_at AND last.message_id = ANY(log.message_ids)
        LIMIT 1
    ),
    edited_later AS MATERIALIZED (
        SELECT log.xid::xid AS xid
        FROM up_to
        JOIN notification_log log ON log.counts_changed AND log.xid >= pg_snapshot_xmin(up_to.snapshot)
        WHERE NOT pg_visible_in_snapshot(log.xid, up_to.snapshot)
        AND log.xid IS DISTINCT FROM up_to.xid
    ),
"""
"""The transaction that wrote the notification `up_to`, and the edits that it did not see."""

_IS_LATER_SQL = """(
    EXISTS (
        SELECT FROM up_to
        JOIN notification_log log ON log.notified_at = note.created_at
        WHERE note.message_id = ANY(log.message_ids)
        AND NOT pg_visible_in_snapshot(log.xid, up_to.snapshot)
        AND log.xid IS DISTINCT FROM up_to.xid
    )
    OR (note.xmin IN (SELECT xid FROM edited_later) AND note.message_id <> (SELECT message_id FROM up_to))
)"""
"""Whether a notification was written, or changed by an edit, after the notification `up_to`: a list that shows that one
may not have shown it, though its id is lower. Nothing is locked. `xmin` of an unread notification is the transaction
that inserted it or the edit that changed it, because nothing else writes it."""


def mark_read(
    user: User,
    *,
    ids: Sequence[tuple[int, int]] | None = None,
    up_to: tuple[int, int] | None = None,
    channel_id: int | None = None,
) -> dict[str, int]:
    """Mark notifications read: the given ones, those up to one, or those of a channel. Exactly one is given.

    `up_to` marks only what every list that shows that notification contains: one with a lower id that was committed
    later stays unread. Where there is no such notification, that of the last message before it counts. Returns
    {"marked", "unread"}. Ids of other users, and notifications that are read, are skipped. Raises NotFound for a
    channel that the user cannot see, Invalid where `up_to` is another user's.
    """
    if [ids, up_to, channel_id].count(None) != 2:
        raise ValueError("Exactly one of ids, up_to and channel_id is needed.")
    if up_to is not None and up_to[0] != user.id:
        raise Invalid({"up_to": ["There is no such notification."]})
    if channel_id is not None:
        get_visible_channel(user, channel_id)
    return _mark_read(user, ids=ids, up_to=up_to, channel_id=channel_id)


def mark_all_read(user: User) -> dict[str, int]:
    """Mark all notifications of a user read. Returns as `mark_read`."""
    return _mark_read(user)


def _mark_read(
    user: User,
    *,
    ids: Sequence[tuple[int, int]] | None = None,
    up_to: tuple[int, int] | None = None,
    channel_id: int | None = None,
) -> dict[str, int]:
    which = "AND note.message_id = ANY(%(message_ids)s::bigint[])" if ids is not None else ""
    own = [message_id for user_id, message_id in ids or () if user_id == user.id]
    with transaction():
        found = fetch_one(
            f"""
            WITH {_LATER_CTE_SQL if up_to else ""}
            shown AS (
                SELECT note.message_id
                FROM notification note
                JOIN message msg ON msg.id = note.message_id
                WHERE {_OWN_SQL}
                AND {_UNREAD_SQL}
                AND note.message_id <= %(up_to)s
                {f"AND NOT {_IS_LATER_SQL}" if up_to else ""}
                {which}
                AND {_VISIBLE_SQL}
                AND EXISTS ({_AUTHOR_CAN_POST_SQL})
                ORDER BY note.message_id  -- two devices at once lock in one order
                FOR NO KEY UPDATE OF note
            ),
            marked AS (
                UPDATE notification note
                SET read_at = now()
                FROM shown
                WHERE note.user_id = %(user_id)s
                AND note.message_id = shown.message_id
                RETURNING 1
            )
            SELECT count(*) AS marked FROM marked
            """,
            {
                "user_id": user.id,
                "channel_ids": list(_channels_of(user, channel_id)),
                "message_ids": own,
                "up_to": up_to[1] if up_to else LARGEST_ID,
            },
        )
        assert found is not None
        failpoint("read.written")
        return {"marked": found["marked"], "unread": unread_count(user)["unread"]}


def dismiss(user: User, user_id: int, message_id: int) -> None:
    """Remove one notification from the inbox. Raises NotFound where it is not the user's, or not shown."""
    _set_dismissed(user, user_id, message_id, "now()", "IS NULL")


def restore(user: User, user_id: int, message_id: int) -> None:
    """Undo `dismiss`. Raises NotFound where the notification is not the user's, or was not dismissed."""
    _set_dismissed(user, user_id, message_id, "NULL", "IS NOT NULL")


def _set_dismissed(user: User, user_id: int, message_id: int, value: str, condition: str) -> None:
    touched = user.id == user_id and execute(
        f"UPDATE notification note SET dismissed_at = {value}"
        " FROM message msg"
        " WHERE msg.id = note.message_id"
        f" AND note.message_id = %(message_id)s AND note.user_id = %(user_id)s AND note.dismissed_at {condition}"
        f" AND {_VISIBLE_SQL} AND EXISTS ({_AUTHOR_CAN_POST_SQL})",
        {"user_id": user_id, "message_id": message_id, "channel_ids": list(_channels_of(user, None))},
    )
    if not touched:
        raise NotFound(f"There is no notification {notification_id(user_id, message_id)}.")
