"""gunicorn's thread worker, changed so that no thread waits for a client.

gunicorn hands a connection to a thread when the first byte arrives. The thread waits for the rest of the request, and
then until the client has read the response, so as many slow clients as there are threads block everyone else. Here the
main loop, which waits for all connections at once, receives each request and sends the rest of each response:

- The head of a request must arrive within HEAD_SECONDS of its first byte, and the whole request within REQUEST_SECONDS,
  otherwise the client gets 408. The client must read a response within SEND_SECONDS. An idle connection is closed after
  `keepalive` seconds.
- With too many connections, or too many buffered bytes, the connection that has waited longest is closed. A normal
  request is complete within milliseconds, so it is never the oldest.
- Streams are opened on STREAM_OPENINGS of the threads: after a deployment all clients reconnect at once, and posts must
  not wait behind them.
- A connection is closed without blocking the loop. gunicorn waits up to 2 s for the client to close.

TLS, HTTP/2 and the PROXY protocol are left to the proxy in front. Tests check all this on the pinned gunicorn.
"""

import errno
import logging
import selectors
import socket
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from belfry.core.open_files import connections_limit
from belfry.web.connection import ClientSocket, Connection
from belfry.web.problems import HttpProblem, problem

log = logging.getLogger(__name__)

HEAD_SECONDS = 10
REQUEST_SECONDS = 30
SEND_SECONDS = 60
LINGER_SECONDS = 2  # after the last response: closing with unread bytes would discard the response
LINGER_BYTES = 64 * 1024
RECEIVE_BYTES = 16 * 1024
BUFFERED_BYTES = 64 * 1024 * 1024  # of incomplete requests and unsent responses, in one process
STREAM_PATH = "/api/notifications/stream"
STREAM_OPENINGS = 0.25  # of the threads
REPORT_SECONDS = 60  # between two warnings that connections are closed to make room
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PARSE_STATUS = {LimitRequestLine: 414, LimitRequestHeaders: 431, UnsupportedTransferCoding: 501, ExpectationFailed: 417}
PARSE_DETAILS = {
    400: "The request is not valid HTTP.",
    414: "The request line is too long.",
    417: "Only `Expect: 100-continue` is supported.",
    431: "The header fields are too large.",
    501: "This transfer coding is not supported.",
}


class WebWorker(ThreadWorker):  # type: ignore[misc]
    """The worker that the module describes. Only `handle`, which is gunicorn's own, runs in a thread."""

    def init_process(self) -> None:
        self.worker_connections = connections_limit()
        self._polled: dict[Connection, None] = {}  # the connections that the loop waits for, the oldest first
        self._buffered = 0  # bytes, of all polled connections
        self._openings: deque[Connection] = deque()  # requests for streams that wait for a thread
        self._free_openings = max(1, int(self.cfg.threads * STREAM_OPENINGS))
        self._checked_at = self._reported_at = float("-inf")
        super().init_process()

    # --- open and close connections

    def accept(self, server_socket: Any) -> None:
        """Accept a connection and wait for its request."""
        try:
            accepted, client = server_socket.accept()
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                self._close_oldest()
                time.sleep(0.01)  # the socket stays readable: avoids a busy loop where nothing can be closed
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        self.nr_conns += 1
        conn = Connection(self.cfg, accepted, client, server_socket.getsockname())
        self._wait(conn, time.monotonic() + self.cfg.keepalive)
        if self.nr_conns >= self.worker_connections:
            self._close_oldest()

    def _close_oldest(self) -> None:
        self._report()
        if self._polled:
            self._drop(next(iter(self._polled)))

    def _report(self) -> None:
        if time.monotonic() >= self._reported_at + REPORT_SECONDS:
            self._reported_at = time.monotonic()
            log.warning(
                "Too many connections: %d open, %d bytes buffered for them. The oldest are closed.",
                self.nr_conns,
                self._buffered,
            )

    def _drop(self, conn: Connection) -> None:
        self._forget(conn)
        self.nr_conns -= 1
        conn.sock.close()

    def _linger(self, conn: Connection) -> None:
        """Shut down the sending side, and close when the client has closed, or after LINGER_SECONDS."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        conn.lingers = True
        self._wait(conn, time.monotonic() + LINGER_SECONDS)

    # --- wait for events

    def _wait(self, conn: Connection, deadline: float, event: int = selectors.EVENT_READ) -> None:
        conn.deadline = deadline
        self._polled[conn] = None
        self.poller.register(conn.sock, event, partial(self._on_event, conn))
        self._count(conn)

    def _forget(self, conn: Connection) -> None:
        if conn in self._polled:
            del self._polled[conn]
            self.poller.unregister(conn.sock)
            self._buffered -= conn.counted_bytes
            conn.counted_bytes = 0

    def _count(self, conn: Connection) -> None:
        """Count the bytes of a connection. Above BUFFERED_BYTES the oldest connections with bytes are closed."""
        size = conn.size
        self._buffered += size - conn.counted_bytes
        conn.counted_bytes = size
        while self._buffered > BUFFERED_BYTES:
            self._report()
            self._drop(next(one for one in self._polled if one.counted_bytes))

    def _on_event(self, conn: Connection, _: Any) -> None:
        if conn not in self._polled:  # closed by another event of the same iteration
            return
        try:
            if conn.sock.unsent:
                if conn.sock.send_rest():
                    self._forget(conn)
                    self._finish_response(conn)
                return
            data = conn.sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(conn)
        elif conn.lingers:
            conn.discarded += len(data)
            if conn.discarded > LINGER_BYTES:
                self._drop(conn)
        else:
            self._receive(conn, data)

    def murder_keepalived(self, force: bool = False) -> None:
        """Close connections that have waited too long, at most once a second; with `force`, all at once."""
        now = time.monotonic()
        if now < self._checked_at + 1 and not force:
            return
        self._checked_at = now
        for conn in [one for one in self._polled if one.deadline <= now or force]:
            if conn.has_begun and not conn.sock.unsent and not conn.lingers and not force:
                self._refuse(conn, HttpProblem(408, "The request was not complete in time."))
            else:
                self._drop(conn)

    def _cap_keepalive(self, deadline: float) -> None:
        """Drop requests that are incomplete at the deadline, because the worker stops. Responses are sent in full."""
        for conn in self._polled:
            if not conn.sock.unsent:
                conn.deadline = min(conn.deadline, deadline)

    # --- receive requests, send responses

    def _receive(self, conn: Connection, data: bytes) -> None:
        """Add bytes to a request; a complete request is given to a thread."""
        if not conn.has_begun:
            now = time.monotonic()
            conn.deadline, conn.last_deadline = now + HEAD_SECONDS, now + REQUEST_SECONDS
        try:
            is_complete = conn.receive(data)
        except HttpProblem as refusal:
            self._refuse(conn, refusal)
            return
        except OSError:
            self._drop(conn)
            return
        if is_complete:
            self._forget(conn)
            self.enqueue_req(conn)
            return
        if conn.awaits_body:
            conn.deadline = conn.last_deadline
        self._count(conn)

    def handle_error(self, req: Any, client: ClientSocket, addr: Any, exc: BaseException) -> None:
        """Respond to a request that gunicorn's parser refuses in the API's error format, not in gunicorn's HTML."""
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        self.log.warning("Invalid request from %s: %s", addr[0] if addr else "", exc)
        status = next((status for kind, status in PARSE_STATUS.items() if isinstance(exc, kind)), 400)
        with suppress(OSError):
            client.sendall(_refusal(status, PARSE_DETAILS[status]))

    def _refuse(self, conn: Connection, refusal: HttpProblem) -> None:
        self._forget(conn)
        try:
            conn.sock.sendall(_refusal(refusal.status, refusal.detail))
        except OSError:
            self._drop(conn)
            return
        conn.keep = False
        self._send_rest(conn)

    def enqueue_req(self, conn: Connection) -> None:
        """Give a complete request to a thread; requests for streams share a limited number of threads."""
        if conn.parser.path != STREAM_PATH:
            super().enqueue_req(conn)
            return
        self._openings.append(conn)
        self._start_openings()

    def _start_openings(self) -> None:
        while self._openings and self._free_openings:
            self._free_openings -= 1
            super().enqueue_req(self._openings.popleft())

    def finish_request(self, conn: Connection, fs: Any) -> None:
        """Send the rest of the response of a thread that has finished, then wait for the next request."""
        if conn.parser.path == STREAM_PATH:
            self._free_openings += 1
            self._start_openings()
        try:
            conn.keep = not fs.cancelled() and fs.result() is True
        except Exception:
            conn.keep = False
        if conn.sock.fileno() < 0:  # a stream, which the hub has taken over
            self.nr_conns -= 1
        else:
            self._send_rest(conn)

    def _send_rest(self, conn: Connection) -> None:
        if conn.sock.unsent:
            self._wait(conn, time.monotonic() + SEND_SECONDS, selectors.EVENT_WRITE)
        else:
            self._finish_response(conn)

    def _finish_response(self, conn: Connection) -> None:
        """Wait for the next request, of which a part may have arrived, or close the connection."""
        if not conn.keep:
            self._linger(conn)
            return
        received = conn.next_request()
        seconds = self.cfg.keepalive if self.alive else STOP_KEEPALIVE_LINGER
        self._wait(conn, time.monotonic() + seconds)
        if received:
            self._receive(conn, received)


def _refusal(status: int, detail: str) -> bytes:
    """The bytes of an error response that closes the connection."""
    response = problem(status, detail, code="malformed_request" if status == 400 else None)
    head = (
        f"HTTP/1.1 {response.status}\r\nConnection: close\r\nContent-Type: {response.content_type}\r\n"
        f"Content-Length: {response.content_length}\r\n\r\n"
    )
    return head.encode() + response.get_data()
