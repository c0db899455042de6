"""A connection of a client: it collects a request until it is complete, and keeps the unsent rest of a response.

gunicorn's own parser reads every request and decides what is valid. This module only decides when the parser can read
the request without waiting for the client. Where it is wrong, the parser finds no more bytes (RequestIncomplete), and
the connection is closed; no byte is interpreted twice.
"""

import os
import socket
from typing import Any

from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.errors import InvalidHeader
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import Unreader
from gunicorn.workers.gthread import TConn

from belfry.web.endpoint import BODY_BYTES
from belfry.web.problems import HttpProblem

HEAD_BYTES = 32 * 1024  # of a request line with its header fields; gunicorn's own limits allow 800 KB
CHUNKED_BYTES = 4 * BODY_BYTES  # of a chunked body with its framing: chunks of one byte have six bytes each
READ_AHEAD = 2 * 1024  # gunicorn reads a chunked body in steps of 1 KiB, beyond what the application asks for
LINE_END = 2
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class RequestIncomplete(TimeoutError):
    """The parser needs more bytes than have arrived. gunicorn treats a TimeoutError as a body that stalls."""


class ClientSocket(socket.socket):
    """A socket on which no thread waits: bytes that the kernel does not accept at once are kept in `unsent`."""

    def __init__(self, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.unsent = bytearray()

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send what the kernel accepts at once, and keep the rest. Raises OSError when the client is gone."""
        sent = 0 if self.unsent else self._send(data)
        if sent < len(data):
            self.unsent += memoryview(data)[sent:]

    def send_rest(self) -> bool:
        """Send more of `unsent`; return whether nothing is left. Raises OSError when the client is gone."""
        del self.unsent[: self._send(self.unsent)]
        return not self.unsent

    def send_at_once(self, data: bytes) -> bool:
        """Send bytes without keeping the rest; return whether the kernel accepted all of them."""
        return self._send(data) == len(data)

    def _send(self, data: Any) -> int:
        try:
            return self.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0


class ReceivedBytes(Unreader):  # type: ignore[misc]
    """The input of gunicorn's parser: bytes that have arrived, and never the socket."""

    def chunk(self, size_hint: int | None = None) -> bytes:
        raise RequestIncomplete("The request ends before it is complete.")

    def append(self, data: bytes | bytearray) -> None:
        self.buf.seek(0, os.SEEK_END)
        self.buf.write(data)

    def __len__(self) -> int:
        return int(self.buf.seek(0, os.SEEK_END))


class ReceivedRequest(RequestParser):  # type: ignore[misc]
    """gunicorn's parser in two steps: `parse` in the worker's main loop, `next` in the thread that responds."""

    def __init__(self, cfg: Any, client: Any) -> None:
        super().__init__(cfg, (), client)
        self.unreader = ReceivedBytes()
        self._outcome: Any = None

    def parse(self) -> Any:
        """Parse the head of the next request, and return the request; None for an invalid one: `next` raises why."""
        try:
            self._outcome = super().__next__()
        except RequestIncomplete:
            self._outcome = InvalidHeader("incomplete head")
        except Exception as error:  # gunicorn's `handle` responds to it as to any error of the parser
            self._outcome = error
        return None if isinstance(self._outcome, Exception) else self._outcome

    @property
    def path(self) -> str | None:
        """The path of the last parsed request; None for an invalid one."""
        return getattr(self._outcome, "path", None)

    def __next__(self) -> Any:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class LengthScanner:
    """Counts the missing bytes of a body of known length."""

    def __init__(self, length: int) -> None:
        self._missing = length

    def is_complete(self, data: bytes) -> bool:
        """Count more of the body; return whether it is complete."""
        self._missing -= len(data)
        return self._missing <= 0


class ChunkScanner:
    """Finds the end of a chunked body. An invalid chunk counts as the end, because the parser refuses it."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._skip = 0  # bytes of the current chunk, with its line end, that are still to come
        self._data_bytes = self._bytes = 0
        self._in_trailer = False

    def is_complete(self, data: bytes) -> bool:
        """Scan more of the body; return whether it is complete, or so large that it is refused. Raises 413."""
        self._bytes += len(data)
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._data_bytes += max(0, min(step, self._skip - LINE_END))
                position += step
                self._skip -= step
                continue
            end = data.find(b"\n", position) + 1
            self._line += data[position : end or None]
            if not end:
                break
            position = end
            if self._ends(bytes(self._line)):
                return True
            self._line.clear()
        if self._data_bytes > BODY_BYTES + READ_AHEAD:  # enough for the application to see that it is too large
            return True
        if self._bytes > CHUNKED_BYTES:
            raise HttpProblem(413, "The body is larger than 64 KiB.")
        return False

    def _ends(self, line: bytes) -> bool:
        if self._in_trailer:
            return line == b"\r\n"
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            return True
        self._skip = size + LINE_END
        if size == 0:
            self._skip, self._in_trailer = 0, True
        return size < 0


class Connection(TConn):  # type: ignore[misc]
    """gunicorn's connection, whose requests are complete before a thread gets them."""

    def __init__(self, cfg: Any, accepted: socket.socket, client: Any, server: Any) -> None:
        super().__init__(cfg, ClientSocket(accepted), client, server)
        self.initialized = True  # gunicorn's thread must not create a parser
        self.parser = ReceivedRequest(cfg, client)
        self.deadline = 0.0  # time.monotonic() until which the client must send or read
        self.last_deadline = 0.0  # until which the whole request must have arrived
        self.counted_bytes = 0  # of `size`, as the worker has counted them
        self.keep = False  # whether another request may follow the response
        self.lingers = False
        self.discarded = 0
        self._head = bytearray()
        self._body: LengthScanner | ChunkScanner | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a part of a request has arrived."""
        return bool(self._head) or self.awaits_body

    @property
    def awaits_body(self) -> bool:
        """Whether the head of a request has arrived."""
        return self._body is not None

    @property
    def size(self) -> int:
        """Buffered bytes, received and unsent."""
        return len(self._head) + len(self.parser.unreader) + len(self.sock.unsent)

    def next_request(self) -> bytes:
        """Begin with the next request; return the bytes of it that have arrived."""
        self._body = None
        received: bytes = self.parser.unreader.take_buffered()
        return received

    def receive(self, data: bytes) -> bool:
        """Add received bytes; return whether a thread can respond. Raises 413 or 431 for what is too large, OSError
        when the client is gone.

        A thread can respond at once to an invalid request, and to one whose declared body is too large.
        """
        if self._body is not None:
            self.parser.unreader.append(data)
            return self._body.is_complete(data)
        line_ends = data.count(b"\r\n") + (data[:1] == b"\n" and self._head[-1:] == b"\r")
        has_bare_line_feed = data.count(b"\n") != line_ends  # such a head may have no end, and the parser refuses it
        searched = max(0, len(self._head) - 3)
        self._head += data
        if self._head.find(b"\r\n\r\n", searched) < 0 and not has_bare_line_feed:
            if len(self._head) > HEAD_BYTES:
                raise HttpProblem(431, "The request line and header fields are larger than 32 KiB.")
            return False
        self.parser.unreader.append(self._head)
        self._head = bytearray()
        request = self.parser.parse()
        return request is None or self._has_body(request)

    def _has_body(self, request: Any) -> bool:
        """Whether the body of the request whose head was just parsed is complete, or will not be read."""
        expects_continue, request._expected_100_continue = request._expected_100_continue, False
        reader, received = request.body.reader, self.parser.unreader.buf.getvalue()
        if isinstance(reader, ChunkedReader):
            self._body = ChunkScanner()
        else:
            assert isinstance(reader, LengthReader)
            if reader.length > BODY_BYTES + 1:  # the application refuses it by its Content-Length
                return True
            self._body = LengthScanner(reader.length)
        if self._body.is_complete(received):
            return True
        if expects_continue and not received and not self.sock.send_at_once(CONTINUE):
            raise ConnectionResetError("The client does not read.")
        return False
