"""One reader of the live stream, and what one person has unread."""

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from belfry.stream.cursor import StreamCursor
from models import User

UNSENT_BYTES = 256 * 1024  # that wait for a reader: before they are taken there is nothing more for it
KERNEL_BYTES = 64 * 1024  # of what was sent and not taken; the kernel would keep megabytes for each
STALL_TIMEOUT_SECONDS = 60  # that something waits, and the reader takes nothing


@dataclass(eq=False)
class StreamClient:
    """A connection. `since` None: from now on. `session`: whose end is its end.

    `token_hash`: of the token that opened it, or of the session, which has a row of its own.
    """

    socket: socket.socket
    user: User
    token_hash: bytes
    session: str | None
    since: StreamCursor | None
    chunked: bool
    servers: frozenset[int] | None = None
    joined: bool = False
    said: list[bytes] = field(default_factory=list)
    unsent: bytearray = field(default_factory=bytearray)
    moved_at: float = field(default_factory=time.monotonic)
    pinged_at: float = field(default_factory=time.monotonic)

    def take_over(self) -> None:
        """Take the connection from whoever has it, who is left a socket without one. It blocks nobody from now on."""
        self.socket = socket.socket(fileno=self.socket.detach())
        self.socket.setblocking(False)
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)

    def may_go_on(self, listeners: dict[bytes, tuple[User, frozenset[int]]]) -> bool:
        """Whether this one is among those who may listen, and in all servers in which they were at first."""
        if self.token_hash not in listeners:
            return False
        self.user, servers = listeners[self.token_hash]
        if self.servers is None:
            self.servers = servers
        return servers >= self.servers

    def say(self, *events: bytes) -> None:
        """What is sent at the next `send`, all at once."""
        self.said += events

    def send(self) -> bool:
        """Send what waits and what was said, as far as there is room. False where the reader is gone, or too slow."""
        body = b"".join(self.said)
        self.said.clear()
        if body and len(self.unsent) > UNSENT_BYTES:
            return False
        if not self.unsent:
            self.moved_at = time.monotonic()
        if body:  # a chunk of nothing would be the end
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

    def has_left(self) -> bool:
        """Whether the other side has closed. What it sends is read and not looked at."""
        try:
            return not self.socket.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the answer, and the connection. The browser comes back by itself."""
        if self.chunked and not self.unsent:  # in the midst of a chunk there is no end to say
            with suppress(OSError):
                self.socket.send(b"0\r\n\r\n")
        self.socket.close()


@dataclass
class UnreadCounts:
    """What one person has unread, {channel id: [unread, mentions]}, and when (`time.monotonic()`) it was counted."""

    channels: dict[int, list[int]]
    counted_at: float

    @classmethod
    def of(cls, count: dict[str, Any], counted_at: float) -> "UnreadCounts":
        """As `inbox.unread_count` has it."""
        return cls({one["channel_id"]: [one["unread"], one["mentions"]] for one in count["channels"]}, counted_at)

    def add(self, notification: dict[str, Any]) -> None:
        """One that they were told of since."""
        if notification["read_at"] is None:
            channel = self.channels.setdefault(notification["channel"]["id"], [0, 0])
            channel[0] += 1
            channel[1] += notification["type"] == "mention"

    def count(self) -> dict[str, Any]:
        """As `inbox.unread_count` has it."""
        return {
            "unread": sum(unread for unread, _ in self.channels.values()),
            "mentions": sum(mentions for _, mentions in self.channels.values()),
            "channels": [
                {"channel_id": id_, "unread": unread, "mentions": mentions}
                for id_, (unread, mentions) in sorted(self.channels.items())
            ],
        }
