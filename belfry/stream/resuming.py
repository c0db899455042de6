"""What clients missed who come back to the live stream, from whatever position each one gives.

The work has bounds that hold for all clients of one look together, and for genuine positions as for made-up ones: a
client that missed more than can be sent one by one is sent `reset` and reads the inbox.

- `tuning.resume_max_log_rows` messages of the log are read, the newest first, once for all. A client whose position is
  older is reset.
- A client is reset when more messages than `most` were announced in the servers that it is in.
- `tuning.resume_max_lookups` notifications are looked up. Clients beyond that are not answered: ask for them again.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime

from belfry.core.db import Row, fetch_all, fetch_one
from belfry.inbox import inbox
from belfry.stream.cursor import StreamCursor
from belfry.stream.updates import Updates, is_resumable, possible_recipients, with_cursors
from config import tuning

MAX_RESUMED_NOTIFICATIONS = 1_000  # notifications to one client, one by one

Client = tuple[int, StreamCursor]  # a user's id, and where that client was
Announced = dict[tuple[int, datetime], int]  # transaction by (message id, time) of the announcement


def missed_updates(
    clients: Collection[Client], here: StreamCursor, most: int = MAX_RESUMED_NOTIFICATIONS
) -> dict[Client, Updates]:
    """Find what clients have not been sent, of what is seen `here`, in a `live.take_snapshot`.

    Returns the news of the first clients, as many as the bounds allow and at least one; {} for no clients.
    """
    known = {client for client in clients if client[1].is_genuine(here.epoch) and is_resumable(client[1], here)}
    if known:
        beyond = _overflow()
        known = {client for client in known if client[1].first_unseen > beyond}
    if not known:
        return {client: Updates(overflow=True) for client in clients}
    log, oldest = _log(min(position.first_unseen for _, position in known))
    servers: dict[int, list[int]] = {}
    for member in possible_recipients({user_id for user_id, _ in known}, list(log)):
        servers.setdefault(member["user_id"], []).append(member["server_id"])
    answered: dict[Client, Updates] = {}
    wanted: dict[Client, Announced] = {}
    lookups: dict[int, int] = {}
    unseen: dict[tuple[StreamCursor, frozenset[int]], Announced | None] = {}  # many share a cursor
    for client in clients:
        user_id, position = client
        found = None
        if client in known and position.first_unseen > oldest:
            alike = position, frozenset(servers.get(user_id, ()))
            if alike not in unseen:
                unseen[alike] = _unseen((log[server_id] for server_id in alike[1]), position, most)
            found = unseen[alike]
        if found is None:
            answered[client] = Updates(overflow=True)
            continue
        number = max(len(found), lookups.get(user_id, 0))  # several streams of one user are looked up together
        if answered and sum(lookups.values()) - lookups.get(user_id, 0) + number > tuning.resume_max_lookups:
            break
        lookups[user_id] = number
        answered[client], wanted[client] = Updates(), found
    _look_up(answered, {client: found for client, found in wanted.items() if found}, here, servers)
    return answered


def _overflow() -> int:
    """The number of a transaction before the last `resume_max_log_rows`; 0 where there are fewer. Some 1 ms."""
    found = fetch_one(
        "SELECT log.xid::text::bigint AS xid FROM notification_log log ORDER BY log.xid DESC OFFSET %(number)s LIMIT 1",
        {"number": tuning.resume_max_log_rows},
    )
    return int(found["xid"]) if found else 0


def _log(first: int) -> tuple[dict[int, list[Row]], int]:
    """What was announced by transactions from this number on: by server, newest first. And the number of the last
    transaction that may not be in it whole: 0 where everything was read."""
    found = fetch_all(
        """
        SELECT t.xid::text::bigint AS xid, t.message_id, t.notified_at, chan.server_id
        FROM (
            SELECT xid, unnest(message_ids) AS message_id, notified_at
            FROM notification_log
            WHERE xid >= (%(first)s::bigint)::text::xid8
            ORDER BY xid DESC
            LIMIT %(limit)s
        ) t
        LEFT JOIN message msg ON msg.id = t.message_id
        LEFT JOIN channel chan ON chan.id = msg.channel_id
        ORDER BY t.xid DESC
        """,
        {"first": first, "limit": tuning.resume_max_log_rows + 1},
    )
    by_server: dict[int, list[Row]] = {}
    for one in found:
        if one["server_id"] is not None:
            by_server.setdefault(one["server_id"], []).append(one)
    return by_server, found[-1]["xid"] if len(found) > tuning.resume_max_log_rows else 0


def _unseen(logs: Iterable[list[Row]], position: StreamCursor, most: int) -> Announced | None:
    """What was announced in some servers that a client at this position has not been sent. None: too many messages."""
    found: Announced = {}
    messages = set()
    first = position.first_unseen
    for log in logs:
        for one in log:
            if one["xid"] < first:
                break
            if not position.shows(one["xid"], one["message_id"]):
                found[one["message_id"], one["notified_at"]] = one["xid"]
                messages.add(one["message_id"])
                if len(messages) > most:
                    return None
    return found


def _look_up(
    answered: dict[Client, Updates], wanted: dict[Client, Announced], here: StreamCursor, servers: dict[int, list[int]]
) -> None:
    """Put into the news of each client the notifications that are the user's own, of what was announced."""
    if not wanted:
        return
    announced: Announced = {}
    from_xid: dict[int, int] = {}
    for (user_id, position), found in wanted.items():
        announced |= found
        from_xid[user_id] = min(position.first_unseen, from_xid.get(user_id, position.first_unseen))
    own: dict[int, list[Row]] = {}
    for notification in inbox.notifications_for(
        [{"message_id": id_, "notified_at": notified_at, "xid": xid} for (id_, notified_at), xid in announced.items()],
        [
            {"user_id": user_id, "server_id": server_id, "from_xid": xid}
            for user_id, xid in from_xid.items()
            for server_id in servers[user_id]
        ],
    ):
        own.setdefault(notification.pop("user_id"), []).append(notification)
    for (user_id, since), found in wanted.items():
        whole = replace(since, before=None, up_to=0, epoch=here.epoch)
        rest: list[Row] = []  # of what it was being sent when it broke off
        new: list[Row] = []
        for notification in own.get(user_id, ()):
            message_id, notified_at = notification["message_id"], notification["created_at"]
            if (message_id, notified_at) in found:
                of_the_rest = whole.shows(found[message_id, notified_at], message_id)
                (rest if of_the_rest else new).append(notification)
        steps = with_cursors(rest, since.before or "", whole) + with_cursors(new, since.snapshot, here)
        if steps:
            answered[user_id, since].notifications[user_id] = steps
