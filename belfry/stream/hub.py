"""The hub: one thread sends all streams of a process, with one subscription to Redis and one query for all clients.

- A stream does not occupy one of gunicorn's threads: its socket is handed over to the hub, which waits for all sockets
  at once.
- Redis only says that there is something new; PostgreSQL is asked what. The hub also polls every few seconds, because
  a message of Redis may be lost, and every second while Redis is unavailable.
- Unread counts are read when a client connects and when they change. Later notifications are added to them. All counts
  are read again every RECOUNT_SECONDS.
- A client that does not receive what is sent is disconnected, and resumes later, so memory is bounded.
- Clients that resume are handled some at a time, within bounds (resuming.py), so that connected clients do not wait.
  A client that missed too much is sent `reset`; the more clients wait, the less that is. While many connect, no counts
  are read; a client that missed nothing is sent a `ping` first, so that it has a cursor at once.
- A client whose token, subscription or membership has ended is disconnected within CHECK_SECONDS.
"""

import json
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from peewee import InterfaceError, OperationalError
from playhouse.pool import MaxConnectionsExceeded
from redis.exceptions import RedisError

from belfry.core.open_files import streams_limit
from belfry.core.redis import redis_connection
from belfry.inbox import inbox
from belfry.stream import resuming, updates
from belfry.stream.client import StreamClient, UnreadCounts
from belfry.stream.cursor import StreamCursor
from belfry.stream.publish import live_channel
from belfry.stream.sse import Serialized, event, events_of
from belfry.stream.updates import Updates

log = logging.getLogger(__name__)
T = TypeVar("T")

PING_SECONDS = 5
DELAY_SECONDS = 10  # age of the oldest unfinished run, or of the last poll, from which on pings say that it is delayed
DELAY_CHECK_SECONDS = 2
CHECK_SECONDS = 15  # between two checks of who may still use the stream
CHECK_AGAIN_SECONDS = 1  # between two checks after an admin's changes
MAX_POLL_INTERVAL = 5  # seconds; one second while Redis is unavailable
MIN_POLL_INTERVAL = 0.05  # seconds, so that changes are collected
RECOUNT_SECONDS = 300
COUNT_SECONDS = 0.1  # for counts in one poll; each takes 1 to 2 ms, for which all clients wait
MANY_NEW = 10  # new clients in one poll from which on no counts are read
NEW_AT_ONCE = 100  # new clients that one poll handles
RESUMED_AT_ONCE = 50_000  # messages times waiting clients; a client that missed more than its share is reset
MAX_STREAMS_PER_USER = 20  # in one process; the oldest is closed

UNREACHABLE = (OperationalError, InterfaceError, MaxConnectionsExceeded)


class Hub:
    """See the module. Other threads call `add`, `is_full` and `publish`; the rest belongs to the hub's thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._new: SimpleQueue[StreamClient] = SimpleQueue()  # added, and not seen by the thread
        self._waiting: deque[StreamClient] = deque()  # in the order of their arrival
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._clients: dict[int, list[StreamClient]] = {}  # {user id: clients, oldest first}
        self._unread: dict[int, UnreadCounts] = {}
        self._uncounted: dict[int, None] = {}  # user ids without a count, in the order of arrival
        self._stale: dict[int, None] = {}  # user ids, in the order in which they are counted again
        self._deleted: set[int] = set()  # message ids, whose recipients' counts changed
        self._changed: set[int] = set()  # ids of messages that were posted, edited or deleted
        self._unchecked: set[int] = set()  # user ids whose authorization is to be checked
        self._check_all_requested = False
        self._cursor: StreamCursor | None = None  # of all connected clients
        self._next_poll_at = self._polled_at = self._checked_at = self._pinged_at = 0.0
        self._redis_answers = False
        self._oldest_run = 0.0  # age in seconds of the oldest unfinished run
        self._oldest_run_at = time.monotonic()
        self._was_delayed = False
        self._max_clients = streams_limit()
        for work in (self._run, self._subscribe):
            threading.Thread(target=work, name=f"hub{work.__name__}", daemon=True).start()

    def add(self, client: StreamClient) -> None:
        """Add a client to which the head of the answer was sent."""
        self._new.put(client)
        self._wake()

    def is_full(self) -> bool:
        """Whether no more streams are accepted: connections are open files, and requests need some."""
        waiting = self._new.qsize() + len(self._waiting)
        return sum(map(len, list(self._clients.values()))) + waiting >= self._max_clients

    def publish(self, change: dict[str, Any]) -> None:
        """Process a change as `publish` sends it."""
        self._events.put(change)
        self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is awake already
            self._wake_sender.send(b"!")

    def _subscribe(self) -> None:
        """Subscribe to Redis, again whenever the connection breaks; anything may have changed in between."""
        while True:
            try:
                with redis_connection().pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]
                    subscription.subscribe(live_channel())
                    self._redis_answers = True
                    self.publish({"access": True})
                    while True:
                        if message := subscription.get_message(timeout=MAX_POLL_INTERVAL):
                            self.publish(json.loads(message["data"]))
            except (RedisError, OSError) as error:
                if self._redis_answers:
                    log.warning("stream: Redis is unavailable, the database is polled every second: %s", error)
                self._redis_answers = False
                self._wake()  # there may be notifications
                time.sleep(1)
            except Exception:
                log.exception("stream: a change from Redis could not be processed")

    # --- the thread

    def _run(self) -> None:
        while True:
            try:
                self._wait()
                if time.monotonic() >= self._pinged_at + 1:
                    self._ping()
                if time.monotonic() >= self._next_poll_at:
                    self._poll()
            except UNREACHABLE as error:
                log.warning("stream: the database is unavailable, streams resume when it returns: %s", error)
                self._next_poll_at = time.monotonic() + 1
            except Exception:
                log.exception("stream: a poll failed, and is repeated")
                self._next_poll_at = time.monotonic() + 1

    def _wait(self) -> None:
        """Wait until something happens or a poll is due."""
        for key, mask in self._selector.select(min(max(0.0, self._next_poll_at - time.monotonic()), 1.0)):
            if key.data is None:
                self._wake_receiver.recv(4096)
                self._next_poll_at = min(self._next_poll_at, max(time.monotonic(), self._polled_at + MIN_POLL_INTERVAL))
            elif mask & selectors.EVENT_WRITE:
                self._send(key.data)
            elif key.data.peer_closed():
                self._disconnect(key.data)

    def _ping(self) -> None:
        """Send a `ping` to each client after PING_SECONDS, and to all when notifications begin or cease to be late."""
        self._pinged_at = time.monotonic()
        delay = max(self._oldest_run, self._pinged_at - self._oldest_run_at)
        is_delayed = delay >= DELAY_SECONDS
        text = json.dumps({"delayed_seconds": round(delay)}) if is_delayed else "{}"
        for client in self._all_clients():
            is_due = self._pinged_at >= client.pinged_at + PING_SECONDS or is_delayed != self._was_delayed
            if self._cursor and is_due:
                client.pinged_at = self._pinged_at
                client.enqueue(event("ping", text, self._cursor))
                self._send(client)
        self._was_delayed = is_delayed

    def _all_clients(self) -> list[StreamClient]:
        return [client for clients in self._clients.values() for client in clients]

    def _poll(self) -> None:
        """Send what is new to all clients."""
        self._polled_at = time.monotonic()
        self._waiting += _drain(self._new)
        new = [self._waiting.popleft() for _ in range(min(NEW_AT_ONCE, len(self._waiting)))]
        events = _drain(self._events)
        if not self._clients:
            self._oldest_run_at = self._polled_at  # without clients nothing is read
        if new or self._clients:
            try:
                signed_out = self._apply_events(events)
                self._collect_and_send(new, signed_out)
            except UNREACHABLE:
                self._waiting.extendleft(reversed(new))
                raise
            except Exception:
                for client in new:  # one of their cursors may be the cause
                    if not client.registered:
                        client.close()
                raise
        more = self._uncounted or self._stale or self._deleted or self._waiting or not self._new.empty()
        now = time.monotonic()
        gap = max(MIN_POLL_INTERVAL, 2 * (now - self._polled_at))  # leave at least half of the time to other threads
        self._next_poll_at = self._polled_at + (gap if more else MAX_POLL_INTERVAL if self._redis_answers else 1)
        if self._check_all_requested:
            self._next_poll_at = min(self._next_poll_at, self._checked_at + CHECK_AGAIN_SECONDS)

    def _apply_events(self, events: list[dict[str, Any]]) -> set[str]:
        """Record the changes for this poll; the sessions that have ended."""
        changed_users: dict[int, None] = {}
        signed_out: set[str] = set()
        for change in events:
            self._changed.update(change.get("messages", ()))
            match change:
                case {"user_id": int(user_id)} | {"access": int(user_id)} if user_id is not True:
                    changed_users[user_id] = None
                    self._unchecked |= {user_id} if "access" in change else set()
                case {"access": _}:
                    self._check_all_requested = True
                    self._stale |= dict.fromkeys(self._clients)
                case {"message_id": int(message_id)}:
                    self._deleted.add(message_id)
                case {"signed_out": str(session)}:
                    signed_out.add(session)
        changed_users = {user_id: None for user_id in changed_users if user_id in self._clients}
        self._stale = changed_users | self._stale  # these first, because the user is looking at it
        long_ago = self._polled_at - RECOUNT_SECONDS
        self._stale |= {user_id: None for user_id, unread in self._unread.items() if unread.counted_at < long_ago}
        for client in self._all_clients() if signed_out else []:
            if client.session in signed_out:
                self._disconnect(client)
        return signed_out

    def _collect_and_send(self, new: list[StreamClient], signed_out: set[str]) -> None:
        pause = CHECK_AGAIN_SECONDS if self._check_all_requested else CHECK_SECONDS
        check_all = self._polled_at >= self._checked_at + pause
        checked = [client for client in self._all_clients() if check_all or client.user.id in self._unchecked]
        with updates.take_snapshot() as here:
            asked = {client.token_hash for client in [*new, *checked]}
            authorized = updates.authorized_clients(asked) if asked else {}
            found = updates.updates_since(self._cursor or here, here, self._clients)
            missed = self._missed_updates(new, here)
            for message_id in self._deleted:
                self._stale |= dict.fromkeys(updates.notified_among(message_id, self._clients))
            self._stale |= dict.fromkeys(self._clients if found.overflow else found.counts_changed)
            counted = self._count(new)
            viewed = {view[1] for view in _views(self._all_clients())}
            changed = updates.messages_by_channel(self._changed, viewed) if self._changed and viewed else {}
            views = _views([*new, *checked])
            visible = updates.visible_views(views) if views else set()
            if self._polled_at >= self._oldest_run_at + DELAY_CHECK_SECONDS:
                self._oldest_run, self._oldest_run_at = updates.oldest_unfinished_seconds(), self._polled_at
        # Everything is read; errors from here on concern one client.
        self._cursor = here
        self._deleted.clear()
        self._changed.clear()
        self._unchecked.clear()
        if check_all:
            self._checked_at, self._check_all_requested = self._polled_at, False
        for client in checked:
            if not client.is_authorized(authorized):
                self._disconnect(client)  # it reconnects, and is sent the reason
        for client in [*new, *checked]:
            if (client.user.id, client.channel_id) not in visible:
                client.channel_id = None
        serialized: Serialized = {}
        self._send_notifications(found, here, serialized)
        self._send_changes(changed, here)
        later = []
        for client in new:
            if not client.is_authorized(authorized) or client.session in signed_out:
                client.close()
            elif client.since is None:
                self._register(client, Updates(), here, serialized)
            elif missed_by_client := missed.get((client.user.id, client.since)):
                self._register(client, missed_by_client, here, serialized)
            else:
                later.append(client)
        self._waiting.extendleft(reversed(later))
        self._send_counts(found, counted, {client.user.id for client in new if client.registered}, here)
        for client in self._all_clients():
            if client.pending_events:
                self._send(client)

    # --- clients

    def _missed_updates(self, new: list[StreamClient], here: StreamCursor) -> dict[tuple[int, StreamCursor], Updates]:
        """What resuming clients missed; clients beyond the bounds wait for the next poll."""
        clients = {(client.user.id, client.since): None for client in new if client.since}
        share = RESUMED_AT_ONCE // (len(self._waiting) + len(new)) if new else 0
        return resuming.missed_updates(list(clients), here, min(resuming.MAX_RESUMED_NOTIFICATIONS, share))

    def _register(self, client: StreamClient, missed: Updates, here: StreamCursor, serialized: Serialized) -> None:
        """Add a client to those that are sent everything new."""
        clients = self._clients.setdefault(client.user.id, [])
        if len(clients) >= MAX_STREAMS_PER_USER:
            self._disconnect(clients[0])
        clients.append(client)
        client.registered = True
        if self._was_delayed:
            client.pinged_at = 0.0  # so that the next `_ping` includes it
        self._selector.register(client.socket, selectors.EVENT_READ, client)
        client.enqueue(*events_of(missed, here, [client.user.id], serialized).get(client.user.id, []))

    def _disconnect(self, client: StreamClient) -> None:
        clients = self._clients[client.user.id]
        clients.remove(client)
        if not clients:
            del self._clients[client.user.id]
            self._unread.pop(client.user.id, None)
            self._stale.pop(client.user.id, None)
            self._uncounted.pop(client.user.id, None)
        self._selector.unregister(client.socket)
        client.close()

    def _send(self, client: StreamClient) -> None:
        """Send pending events; the rest is sent later. Disconnect a client that is too slow."""
        if not client.send():
            self._disconnect(client)
            return
        waits = selectors.EVENT_WRITE if client.unsent else 0
        self._selector.modify(client.socket, selectors.EVENT_READ | waits, client)

    # --- unread counts

    def _count(self, new: list[StreamClient]) -> dict[int, UnreadCounts]:
        """Read counts for COUNT_SECONDS: of users without one, new users, stale ones. The rest follows later."""
        new_users = {client.user.id: client.user for client in new if client.user.id not in self._unread}
        counted: dict[int, UnreadCounts] = {}
        if len(new) > MANY_NEW:
            return counted
        deadline = time.monotonic() + COUNT_SECONDS
        for user_id in chain(self._uncounted, new_users, self._stale):
            if user_id not in counted:
                user = new_users[user_id] if user_id in new_users else self._clients[user_id][0].user
                counted[user_id] = UnreadCounts.of(inbox.unread_count(user), self._polled_at)
            if time.monotonic() > deadline:
                break
        return counted

    # --- sending

    def _send_notifications(self, found: Updates, here: StreamCursor, serialized: Serialized) -> None:
        for user_id, events in events_of(found, here, self._clients, serialized).items():
            for client in self._clients.get(user_id, []):
                client.enqueue(*events)

    def _send_changes(self, changed: dict[int, list[int]], here: StreamCursor) -> None:
        """Send which messages changed to the clients that view their channel."""
        events = {
            channel_id: event("messages", json.dumps({"channel_id": channel_id, "ids": ids}), here)
            for channel_id, ids in changed.items()
        }
        for client in self._all_clients():
            if client.channel_id in events:
                client.enqueue(events[client.channel_id])

    def _send_counts(self, found: Updates, counted: dict[int, UnreadCounts], new: set[int], here: StreamCursor) -> None:
        """Send the unread counts that changed, and those of new clients."""
        changed = new | set(found.notifications)
        for user_id in self._clients.keys() & (changed | counted.keys()):
            before = self._unread.get(user_id)
            if user_id in counted:
                self._stale.pop(user_id, None)
                self._uncounted.pop(user_id, None)
                self._unread[user_id] = counted[user_id]
                if before is None or before.channels != counted[user_id].channels:
                    changed.add(user_id)
            elif before is None:  # not read yet, for lack of time
                self._uncounted[user_id] = None
                changed.discard(user_id)
                for client in self._clients[user_id] if user_id in new else []:
                    if not client.pending_events:
                        client.enqueue(event("ping", "{}", here))
            else:
                for _, notification in found.notifications.get(user_id, []):
                    before.add(notification)
        for user_id in self._clients.keys() & changed:
            count = event("unread", json.dumps(self._unread[user_id].count()), here)
            for client in self._clients[user_id]:
                client.enqueue(count)


def _views(clients: Iterable[StreamClient]) -> set[tuple[int, int]]:
    """The (user id, channel id) of the clients that view a channel."""
    return {(client.user.id, client.channel_id) for client in clients if client.channel_id is not None}


def _drain(waiting: "SimpleQueue[T]") -> list[T]:
    """Remove and return everything that is in a queue."""
    items: list[T] = []
    while True:
        try:
            items.append(waiting.get_nowait())
        except Empty:
            return items


@cache
def _hub(process: int) -> Hub:
    return Hub()


_creating = threading.Lock()


def hub() -> Hub:
    """The hub of this process, created with its first stream, because threads do not survive a fork."""
    with _creating:
        return _hub(os.getpid())
