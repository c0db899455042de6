"""A client of the stream, and the unread counts of a user."""

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from belfry.stream.cursor import StreamCursor
from models import User

UNSENT_BYTES = 256 * 1024  # that may wait for a client; it is disconnected when more follow
KERNEL_BYTES = 64 * 1024  # of the kernel's send buffer for a client; the default is megabytes
STALL_TIMEOUT_SECONDS = 60  # for which a client may receive nothing of what waits


@dataclass(eq=False)
class StreamClient:
    """A connection. `since`: the cursor to resume from, None for a new stream.

    `session`: the hash of the session that opened it; the stream ends with it. `token_hash`: the hash of the token or
    session that authorizes it. `channel_id`: the channel of whose messages it is sent changes, None for none.
    """

    socket: socket.socket
    user: User
    token_hash: bytes
    session: str | None
    since: StreamCursor | None
    chunked: bool
    channel_id: int | None = None
    servers: frozenset[int] | None = None
    registered: bool = False
    pending_events: list[bytes] = field(default_factory=list)
    unsent: bytearray = field(default_factory=bytearray)
    moved_at: float = field(default_factory=time.monotonic)
    pinged_at: float = field(default_factory=time.monotonic)

    def detach(self) -> None:
        """Take the connection over from its thread, whose socket loses its descriptor; make it non-blocking."""
        self.socket = socket.socket(fileno=self.socket.detach())
        self.socket.setblocking(False)
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)

    def is_authorized(self, authorized: dict[bytes, tuple[User, frozenset[int]]]) -> bool:
        """Whether the user may still use the stream, and is still in all servers of the beginning."""
        if self.token_hash not in authorized:
            return False
        self.user, servers = authorized[self.token_hash]
        if self.servers is None:
            self.servers = servers
        return servers >= self.servers

    def enqueue(self, *events: bytes) -> None:
        """Add events to those that the next `send` sends at once."""
        self.pending_events += events

    def send(self) -> bool:
        """Send as much as the connection accepts. False where the client is gone or too slow."""
        body = b"".join(self.pending_events)
        self.pending_events.clear()
        if body and len(self.unsent) > UNSENT_BYTES:
            return False
        if not self.unsent:
            self.moved_at = time.monotonic()
        if body:  # an empty chunk would end the answer
            self.unsent += b"%x\r\n%b\r\n" % (len(body), body) if self.chunked else body
        if not self.unsent:
            return True
        try:
            sent = self.socket.send(self.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent:
            self.moved_at = time.monotonic()
            del self.unsent[:sent]
        return not self.unsent or time.monotonic() - self.moved_at < STALL_TIMEOUT_SECONDS

    def peer_closed(self) -> bool:
        """Whether the client has closed the connection. What it sends is discarded."""
        try:
            return not self.socket.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the answer and the connection. A browser reconnects by itself."""
        if self.chunked and not self.unsent:  # an unfinished chunk cannot be ended
            with suppress(OSError):
                self.socket.send(b"0\r\n\r\n")
        self.socket.close()


@dataclass
class UnreadCounts:
    """The unread counts of a user, {channel id: [unread, mentions]}; `counted_at` in `time.monotonic()`."""

    channels: dict[int, list[int]]
    counted_at: float

    @classmethod
    def of(cls, count: dict[str, Any], counted_at: float) -> "UnreadCounts":
        """From the result of `inbox.unread_count`."""
        return cls({one["channel_id"]: [one["unread"], one["mentions"]] for one in count["channels"]}, counted_at)

    def add(self, notification: dict[str, Any]) -> None:
        """Count a notification that was sent since."""
        if notification["read_at"] is None:
            channel = self.channels.setdefault(notification["channel"]["id"], [0, 0])
            channel[0] += 1
            channel[1] += notification["type"] == "mention"

    def count(self) -> dict[str, Any]:
        """The counts as `inbox.unread_count` returns them."""
        return {
            "unread": sum(unread for unread, _ in self.channels.values()),
            "mentions": sum(mentions for _, mentions in self.channels.values()),
            "channels": [
                {"channel_id": id_, "unread": unread, "mentions": mentions}
                for id_, (unread, mentions) in sorted(self.channels.items())
            ],
        }
