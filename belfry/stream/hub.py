"""The live streams of this process: one thread, one subscription to Redis, one query for all who are connected.

- gunicorn's threads answer requests, and a stream is none: its socket is handed over to the hub, which
  waits for all of them at once. A thread for each would be a thousand threads.
- Redis only says that it is time to look; what is new is asked of PostgreSQL. While Redis is away the hub looks each
  second by itself, and every few seconds in any case: an announcement may be lost.
- What people have unread is counted when they come and when something of theirs changes. What they are told after that
  is added, as of the same moment. Everybody's is counted again every few minutes, whatever happens.
- Who does not read what is sent is cut off, and goes on where they were: memory stays bounded.
- Clients that come are met some at a time, and what they missed is looked up within bounds (resuming.py): those
  that are connected do not wait for it. A client that missed too much is sent `reset`; the more wait, the less is too
  much. While many come nobody is counted; one that missed nothing is sent a `ping` first, so it has a position at once.
- Who may listen no longer (their token, subscription or a membership is gone) is cut off within CHECK_SECONDS.
"""

import json
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
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
from belfry.stream.sse import Dumped, event, events_of
from belfry.stream.updates import Updates

log = logging.getLogger(__name__)
T = TypeVar("T")

PING_SECONDS = 15
CHECK_SECONDS = 15  # between two looks at who may still listen
CHECK_AGAIN_SECONDS = 1  # however often an admin changes something
MAX_POLL_INTERVAL = 5  # at least so often, whatever Redis says; each second while it says nothing
MIN_POLL_INTERVAL = 0.05  # between two looks: what is told meanwhile is one look's
RECOUNT_SECONDS = 300
COUNT_SECONDS = 0.1  # in one look, for counts: one takes a millisecond or two, and all others wait meanwhile
MANY_NEW = 10  # clients in one look: while so many come, nobody is counted
NEW_AT_ONCE = 100  # clients that are met in one look
RESUMED_AT_ONCE = 50_000  # messages times clients that wait: who missed more than their part of it is sent `reset`
MAX_STREAMS_PER_USER = 20  # of one person, in one process; the oldest ends

UNREACHABLE = (OperationalError, InterfaceError, MaxConnectionsExceeded)


class Hub:
    """See the module. `add` and `announced` are for every thread, the rest is the hub's own."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._woken, self._bell = socket.socketpair()
        self._woken.setblocking(False)
        self._bell.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._new: SimpleQueue[StreamClient] = SimpleQueue()  # handed over, and not met by the thread
        self._waiting: deque[StreamClient] = deque()  # met by the thread, and not by a look; the first to come first
        self._announced: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._readers: dict[int, list[StreamClient]] = {}  # by user id, the oldest first
        self._unread: dict[int, UnreadCounts] = {}
        self._uncounted: dict[int, None] = {}  # user ids that wait for their first count, the first to come first
        self._stale: dict[int, None] = {}  # user ids, in the order in which they are to be counted again
        self._deleted: set[int] = set()  # messages: who was told of them is stale
        self._unchecked: set[int] = set()  # user ids: whether they may still listen
        self._check_wanted = False  # of everybody
        self._position: StreamCursor | None = None  # of all readers
        self._due = self._looked_at = self._checked_at = self._pinged_at = 0.0
        self._redis_answers = False
        self._most = streams_limit()
        for work in (self._run, self._listen):
            threading.Thread(target=work, name=f"hub{work.__name__}", daemon=True).start()

    def add(self, reader: StreamClient) -> None:
        """Take over a reader, who has had the head of the answer."""
        self._new.put(reader)
        self._ring()

    def is_full(self) -> bool:
        """Whether there is no room for one more: connections are open files, of which requests need some."""
        coming = self._new.qsize() + len(self._waiting)
        return sum(map(len, list(self._readers.values()))) + coming >= self._most

    def announced(self, what: dict[str, Any]) -> None:
        """Something has changed, as `queues.publish` says it."""
        self._announced.put(what)
        self._ring()

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has rung often enough
            self._bell.send(b"!")

    def _listen(self) -> None:
        """The subscription to Redis. Made again whenever it breaks: anything may have changed meanwhile."""
        while True:
            try:
                with redis_connection().pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]
                    subscription.subscribe(live_channel())
                    self._redis_answers = True
                    self.announced({"access": True})
                    while True:
                        if message := subscription.get_message(timeout=MAX_POLL_INTERVAL):
                            self.announced(json.loads(message["data"]))
            except (RedisError, OSError) as error:
                if self._redis_answers:
                    log.warning("live: Redis is out of reach, the database is asked each second: %s", error)
                self._redis_answers = False
                self._ring()  # somebody may have been told since
                time.sleep(1)
            except Exception:
                log.exception("live: an announcement went wrong")

    # --- the thread

    def _run(self) -> None:
        while True:
            try:
                self._wait()
                if time.monotonic() >= self._pinged_at + 1:
                    self._ping()
                if time.monotonic() >= self._due:
                    self._look()
            except UNREACHABLE as error:
                log.warning("live: the database is out of reach, all go on when it is back: %s", error)
                self._due = time.monotonic() + 1
            except Exception:
                log.exception("live: a look went wrong, and the next one begins where it did")
                self._due = time.monotonic() + 1

    def _wait(self) -> None:
        """Until something happens, or is due."""
        for key, mask in self._selector.select(min(max(0.0, self._due - time.monotonic()), 1.0)):
            if key.data is None:
                self._woken.recv(4096)
                self._due = min(self._due, max(time.monotonic(), self._looked_at + MIN_POLL_INTERVAL))
            elif mask & selectors.EVENT_WRITE:
                self._send(key.data)
            elif key.data.has_left():
                self._cut(key.data)

    def _ping(self) -> None:
        self._pinged_at = time.monotonic()
        for reader in self._everybody():
            if self._position and self._pinged_at >= reader.pinged_at + PING_SECONDS:
                reader.pinged_at = self._pinged_at
                reader.say(event("ping", "{}", self._position))
                self._send(reader)

    def _everybody(self) -> list[StreamClient]:
        return [reader for readers in self._readers.values() for reader in readers]

    def _look(self) -> None:
        """Send everybody what is new."""
        self._looked_at = time.monotonic()
        self._waiting += _drain(self._new)
        new = [self._waiting.popleft() for _ in range(min(NEW_AT_ONCE, len(self._waiting)))]
        announced = _drain(self._announced)
        if new or self._readers:
            try:
                gone = self._heed(announced)
                self._look_at(new, gone)
            except UNREACHABLE:
                self._waiting.extendleft(reversed(new))
                raise
            except Exception:
                for reader in new:  # what they asked for may be the reason: nobody else shall bear it
                    if not reader.joined:
                        reader.close()
                raise
        more = self._uncounted or self._stale or self._deleted or self._waiting or not self._new.empty()
        now = time.monotonic()
        gap = max(MIN_POLL_INTERVAL, 2 * (now - self._looked_at))  # the other threads get half of the time at least
        self._due = self._looked_at + (gap if more else MAX_POLL_INTERVAL if self._redis_answers else 1)
        if self._check_wanted:
            self._due = min(self._due, self._checked_at + CHECK_AGAIN_SECONDS)

    def _heed(self, announced: list[dict[str, Any]]) -> set[str]:
        """Make a note of what is announced; the sessions that have ended. Most only says that it is time to look."""
        theirs: dict[int, None] = {}
        gone: set[str] = set()
        for what in announced:
            match what:
                case {"user_id": int(user_id)} | {"access": int(user_id)} if user_id is not True:
                    theirs[user_id] = None
                    self._unchecked |= {user_id} if "access" in what else set()
                case {"access": _}:
                    self._check_wanted = True
                    self._stale |= dict.fromkeys(self._readers)
                case {"message_id": int(message_id)}:
                    self._deleted.add(message_id)
                case {"signed_out": str(session)}:
                    gone.add(session)
        theirs = {user_id: None for user_id in theirs if user_id in self._readers}
        self._stale = theirs | self._stale  # those first: they look at it
        long_ago = self._looked_at - RECOUNT_SECONDS
        self._stale |= {user_id: None for user_id, unread in self._unread.items() if unread.counted_at < long_ago}
        for reader in self._everybody() if gone else []:
            if reader.session in gone:
                self._cut(reader)
        return gone

    def _look_at(self, new: list[StreamClient], gone: set[str]) -> None:
        pause = CHECK_AGAIN_SECONDS if self._check_wanted else CHECK_SECONDS
        check_all = self._looked_at >= self._checked_at + pause
        checked = [reader for reader in self._everybody() if check_all or reader.user.id in self._unchecked]
        with updates.take_snapshot() as here:
            asked = {reader.token_hash for reader in [*new, *checked]}
            listeners = updates.authorized_clients(asked) if asked else {}
            found = updates.updates_since(self._position or here, here, self._readers)
            missed = self._missed(new, here)
            for message_id in self._deleted:
                self._stale |= dict.fromkeys(updates.notified_among(message_id, self._readers))
            self._stale |= dict.fromkeys(self._readers if found.overflow else found.counts_changed)
            counted = self._count(new)
        # All is known; what is wrong from here on is one reader's own affair.
        self._position = here
        self._deleted.clear()
        self._unchecked.clear()
        if check_all:
            self._checked_at, self._check_wanted = self._looked_at, False
        for reader in checked:
            if not reader.may_go_on(listeners):
                self._cut(reader)  # they come back, and go on or are told why not
        dumped: Dumped = {}
        self._tell(found, here, dumped)
        later = []
        for reader in new:
            if not reader.may_go_on(listeners) or reader.session in gone:
                reader.close()
            elif reader.since is None:
                self._join(reader, Updates(), here, dumped)
            elif client_missed := missed.get((reader.user.id, reader.since)):
                self._join(reader, client_missed, here, dumped)
            else:
                later.append(reader)
        self._waiting.extendleft(reversed(later))
        self._tell_counts(found, counted, {reader.user.id for reader in new if reader.joined}, here)
        for reader in self._everybody():
            if reader.said:
                self._send(reader)

    # --- who listens

    def _missed(self, new: list[StreamClient], here: StreamCursor) -> dict[tuple[int, StreamCursor], Updates]:
        """What those missed who come back: of the first of them, the others come with the next look."""
        clients = {(reader.user.id, reader.since): None for reader in new if reader.since}
        share = RESUMED_AT_ONCE // (len(self._waiting) + len(new)) if new else 0
        return resuming.missed_updates(list(clients), here, min(resuming.MAX_RESUMED_NOTIFICATIONS, share))

    def _join(self, reader: StreamClient, missed: Updates, here: StreamCursor, dumped: Dumped) -> None:
        """From now on the reader is one of all, who are here."""
        readers = self._readers.setdefault(reader.user.id, [])
        if len(readers) >= MAX_STREAMS_PER_USER:
            self._cut(readers[0])
        readers.append(reader)
        reader.joined = True
        self._selector.register(reader.socket, selectors.EVENT_READ, reader)
        reader.say(*events_of(missed, here, [reader.user.id], dumped).get(reader.user.id, []))

    def _cut(self, reader: StreamClient) -> None:
        readers = self._readers[reader.user.id]
        readers.remove(reader)
        if not readers:
            del self._readers[reader.user.id]
            self._unread.pop(reader.user.id, None)
            self._stale.pop(reader.user.id, None)
            self._uncounted.pop(reader.user.id, None)
        self._selector.unregister(reader.socket)
        reader.close()

    def _send(self, reader: StreamClient) -> None:
        """Send what was said; what does not go out at once goes when there is room. Who takes nothing is cut off."""
        if not reader.send():
            self._cut(reader)
            return
        waits = selectors.EVENT_WRITE if reader.unsent else 0
        self._selector.modify(reader.socket, selectors.EVENT_READ | waits, reader)

    # --- what they have unread

    def _count(self, new: list[StreamClient]) -> dict[int, UnreadCounts]:
        """Of those who came, who come, and who are stale, for COUNT_SECONDS; the rest with the next looks."""
        coming = {reader.user.id: reader.user for reader in new if reader.user.id not in self._unread}
        counted: dict[int, UnreadCounts] = {}
        if len(new) > MANY_NEW:
            return counted
        enough = time.monotonic() + COUNT_SECONDS
        for user_id in chain(self._uncounted, coming, self._stale):
            if user_id not in counted:
                user = coming[user_id] if user_id in coming else self._readers[user_id][0].user
                counted[user_id] = UnreadCounts.of(inbox.unread_count(user), self._looked_at)
            if time.monotonic() > enough:
                break
        return counted

    # --- what they are sent

    def _tell(self, found: Updates, here: StreamCursor, dumped: Dumped) -> None:
        for user_id, events in events_of(found, here, self._readers, dumped).items():
            for reader in self._readers.get(user_id, []):
                reader.say(*events)

    def _tell_counts(self, found: Updates, counted: dict[int, UnreadCounts], new: set[int], here: StreamCursor) -> None:
        """Send what people have unread to those of whom it has changed, and to who has come."""
        changed = new | set(found.notifications)
        for user_id in self._readers.keys() & (changed | counted.keys()):
            before = self._unread.get(user_id)
            if user_id in counted:
                self._stale.pop(user_id, None)
                self._uncounted.pop(user_id, None)
                self._unread[user_id] = counted[user_id]
                if before is None or before.channels != counted[user_id].channels:
                    changed.add(user_id)
            elif before is None:  # there was no time
                self._uncounted[user_id] = None
                changed.discard(user_id)
                for reader in self._readers[user_id] if user_id in new else []:
                    if not reader.said:
                        reader.say(event("ping", "{}", here))
            else:
                for _, notification in found.notifications.get(user_id, []):
                    before.add(notification)
        for user_id in self._readers.keys() & changed:
            count = event("unread", json.dumps(self._unread[user_id].count()), here)
            for reader in self._readers[user_id]:
                reader.say(count)


def _drain(waiting: "SimpleQueue[T]") -> list[T]:
    """What waits."""
    taken: list[T] = []
    while True:
        try:
            taken.append(waiting.get_nowait())
        except Empty:
            return taken


@cache
def _hub(process: int) -> Hub:
    return Hub()


_making = threading.Lock()


def hub() -> Hub:
    """This process's own: made when the first stream comes, for threads do not live through a fork."""
    with _making:
        return _hub(os.getpid())
