"""Find what resuming clients missed, each from its own cursor.

The work is bounded for all clients of one poll together, for genuine and for invented cursors. A client that missed
more than can be sent one by one is sent `reset` and reads the inbox.

- `tuning.resume_max_log_rows` messages of the log are read once for all clients, the newest first. A client whose
  cursor is older is reset.
- A client is reset when more than `max_messages` messages were logged in its servers.
- `tuning.resume_max_lookups` notifications are looked up. Clients beyond that wait for the next poll.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.inbox import inbox
from belfry.stream.cursor import StreamCursor
from belfry.stream.updates import Updates, is_resumable, possible_recipients, with_cursors
from config import tuning

MAX_RESUMED_NOTIFICATIONS = 1_000  # notifications that are sent to one client one by one

Client = tuple[int, StreamCursor]  # (user id, its cursor)
LoggedMessages = dict[tuple[int, datetime], int]  # {(message id, time): transaction} of the log


def missed_updates(
    clients: Collection[Client], here: StreamCursor, max_messages: int = MAX_RESUMED_NOTIFICATIONS
) -> dict[Client, Updates]:
    """Find what clients have not been sent, within `here` of `take_snapshot`.

    Returns the updates of the first clients, as many as the bounds allow and at least one; {} without clients.
    """
    known = {client for client in clients if client[1].is_genuine(here.epoch) and is_resumable(client[1], here)}
    if known:
        unreadable = _last_unreadable_transaction()
        known = {client for client in known if client[1].first_unseen > unreadable}
    if not known:
        return {client: Updates(overflow=True) for client in clients}
    log, oldest = _read_log(min(cursor.first_unseen for _, cursor in known))
    servers: dict[int, list[int]] = {}
    for member in possible_recipients({user_id for user_id, _ in known}, list(log)):
        servers.setdefault(member["user_id"], []).append(member["server_id"])
    answered: dict[Client, Updates] = {}
    wanted: dict[Client, LoggedMessages] = {}
    lookups: dict[int, int] = {}
    unseen: dict[tuple[StreamCursor, frozenset[int]], LoggedMessages | None] = {}  # many share a cursor
    for client in clients:
        user_id, cursor = client
        found = None
        if client in known and cursor.first_unseen > oldest:
            key = cursor, frozenset(servers.get(user_id, ()))
            if key not in unseen:
                unseen[key] = _unseen((log[server_id] for server_id in key[1]), cursor, max_messages)
            found = unseen[key]
        if found is None:
            answered[client] = Updates(overflow=True)
            continue
        number = max(len(found), lookups.get(user_id, 0))  # several streams of one user are looked up together
        if answered and sum(lookups.values()) - lookups.get(user_id, 0) + number > tuning.resume_max_lookups:
            break
        lookups[user_id] = number
        answered[client], wanted[client] = Updates(), found
    _add_notifications(answered, {client: found for client, found in wanted.items() if found}, here, servers)
    return answered


def _last_unreadable_transaction() -> int:
    """The newest transaction before the last `resume_max_log_rows` of the log; 0 where there are fewer. Takes 1 ms."""
    found = fetch_one(
        "SELECT log.xid::text::bigint AS xid FROM notification_log log ORDER BY log.xid DESC OFFSET %(number)s LIMIT 1",
        {"number": tuning.resume_max_log_rows},
    )
    return int(found["xid"]) if found else 0


def _read_log(first: int) -> tuple[dict[int, list[Row]], int]:
    """Read the log from a transaction on: {server id: rows, newest first}, and the newest transaction that may be
    incomplete in it, 0 where everything was read."""
    found = fetch_all(
        """
        SELECT log.xid::text::bigint AS xid, log.message_id, log.notified_at, chan.server_id
        FROM (
            SELECT xid, unnest(message_ids) AS message_id, notified_at
            FROM notification_log
            WHERE xid >= (%(first)s::bigint)::text::xid8
            ORDER BY xid DESC
            LIMIT %(limit)s
        ) log
        LEFT JOIN message msg ON msg.id = log.message_id
        LEFT JOIN channel chan ON chan.id = msg.channel_id
        ORDER BY log.xid DESC
        """,
        {"first": first, "limit": tuning.resume_max_log_rows + 1},
    )
    by_server: dict[int, list[Row]] = {}
    for one in found:
        if one["server_id"] is not None:
            by_server.setdefault(one["server_id"], []).append(one)
    return by_server, found[-1]["xid"] if len(found) > tuning.resume_max_log_rows else 0


def _unseen(logs: Iterable[list[Row]], cursor: StreamCursor, max_messages: int) -> LoggedMessages | None:
    """The logged messages that a client at this cursor was not sent; None where there are too many."""
    found: LoggedMessages = {}
    messages = set()
    first = cursor.first_unseen
    for log in logs:
        for one in log:
            if one["xid"] < first:
                break
            if not cursor.shows(one["xid"], one["message_id"]):
                found[one["message_id"], one["notified_at"]] = one["xid"]
                messages.add(one["message_id"])
                if len(messages) > max_messages:
                    return None
    return found


def _add_notifications(
    answered: dict[Client, Updates],
    wanted: dict[Client, LoggedMessages],
    here: StreamCursor,
    servers: dict[int, list[int]],
) -> None:
    """Add to the updates of each client the user's own notifications of the logged messages."""
    if not wanted:
        return
    logged: LoggedMessages = {}
    from_xid: dict[int, int] = {}
    for (user_id, cursor), found in wanted.items():
        logged |= found
        from_xid[user_id] = min(cursor.first_unseen, from_xid.get(user_id, cursor.first_unseen))
    own: dict[int, list[Row]] = {}
    for notification in inbox.notifications_for(
        [{"message_id": id_, "notified_at": notified_at, "xid": xid} for (id_, notified_at), xid in logged.items()],
        [
            {"user_id": user_id, "server_id": server_id, "from_xid": xid}
            for user_id, xid in from_xid.items()
            for server_id in servers[user_id]
        ],
    ):
        own.setdefault(notification.pop("user_id"), []).append(notification)
    for (user_id, since), found in wanted.items():
        complete = replace(since, before=None, up_to=0, epoch=here.epoch)
        remaining: list[Row] = []  # of the poll that was interrupted
        new: list[Row] = []
        for notification in own.get(user_id, ()):
            message_id, notified_at = notification["message_id"], notification["created_at"]
            if (message_id, notified_at) in found:
                is_remaining = complete.shows(found[message_id, notified_at], message_id)
                (remaining if is_remaining else new).append(notification)
        steps = with_cursors(remaining, since.before or "", complete) + with_cursors(new, since.snapshot, here)
        if steps:
            answered[user_id, since].notifications[user_id] = steps
