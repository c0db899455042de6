"""A client of the live stream like a browser's EventSource, except that it does not reconnect by itself."""

import http.client
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.processes import wait_until


@dataclass
class Event:
    kind: str
    id: str
    data: Any


class StreamClient:
    """Receive events in a thread from creation until `close`; `events` has all of them. Use it as a context manager."""

    def __init__(self, address: str, token: str | None = None, *, last_event_id: str = "", **headers: str) -> None:
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        self._connection.request("GET", "/api/notifications/stream", headers=headers)
        self._socket: socket.socket = self._connection.sock
        self.response = self._connection.getresponse()
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.problem = json.loads(self.response.read()) if self.response.status != 200 else None
        self._thread = threading.Thread(target=self._read, daemon=True)
        if self.problem is None:
            self._thread.start()
        else:
            self.close()

    def __enter__(self) -> "StreamClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            with suppress(OSError):  # the server has ended the stream
                self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join()
        self.response.close()
        self._connection.close()

    def _read(self) -> None:
        fields: dict[str, str] = {}
        try:
            for line in self.response:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                elif "event" in fields:
                    self.events.append(Event(fields["event"], fields["id"], json.loads(fields["data"])))
                    fields = {}
        except (OSError, http.client.HTTPException, ValueError):
            pass
        self.ended.set()

    def last_id(self) -> str:
        return self.events[-1].id

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def messages(self) -> list[int]:
        """The ids of the messages whose notifications it has received, in order."""
        return [event.data["message_id"] for event in self.events if event.kind == "notification"]

    def unread(self) -> int | None:
        """The last unread count that it has received, or None."""
        counts = [event.data["unread"] for event in self.events if event.kind == "unread"]
        return counts[-1] if counts else None

    def wait_for_unread(self, number: int) -> None:
        wait_until(lambda: self.unread() == number, f"{number} unread; it is {self.unread()}")

    def wait_for_end(self) -> None:
        wait_until(self.ended.is_set, "the stream to end")
