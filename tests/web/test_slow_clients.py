"""Slow, silent or hostile clients, over raw sockets to a real web process, do not delay others."""

import json
import os
import resource
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPResponse
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from belfry.web.connection import ChunkScanner
from models import Message
from tests.processes import WAIT_SECONDS, running, wait_until, web_process
from tests.sse_client import StreamClient

pytestmark = pytest.mark.slow

SLOW_HEADERS, SLOW_BODIES, SILENT_CLIENTS = 100, 100, 1_500
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with web_process() as address:
        yield address


@pytest.fixture
def connect(web) -> Iterator[object]:
    """`connect(bytes, ...)`: open a connection and send these one after the other."""
    with ExitStack() as opened:

        def open_connection(*parts: bytes, receive_bytes: int | None = None) -> socket.socket:
            connection = opened.enter_context(closing(socket.socket()))
            connection.settimeout(WAIT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if receive_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            connection.connect((urlsplit(web).hostname, urlsplit(web).port))
            for part in parts:
                connection.sendall(part)
            return connection

        yield open_connection


def responses_on(connection: socket.socket) -> list[tuple[int, bytes]]:
    """Status and body of every response until the server closes, including 100 Continue."""
    received = b"".join(iter(lambda: connection.recv(65_536), b""))
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        found.append((int(head.split()[1]), received[:length]))
        received = received[length:]
    return found


def statuses_on(connection: socket.socket) -> list[int]:
    return [status for status, _ in responses_on(connection)]


def response_on(connection: socket.socket, method: str = "GET") -> HTTPResponse:
    """Read the next response. Nothing after it may have arrived."""
    response = HTTPResponse(connection, method=method)
    response.begin()
    response.read()
    return response


def post_of(person, channel_id: int, *fields: str, content: str = "gold", body: bytes | None = None) -> bytes:
    """The bytes of `POST /api/messages`."""
    if body is None:
        body = json.dumps({"channel_id": channel_id, "content": content}).encode()
        fields = (*fields, f"Content-Length: {len(body)}")
    head = ("POST /api/messages HTTP/1.1", "Host: localhost", f"Authorization: Bearer {person.token}", *fields)
    return "\r\n".join((*head, "Content-Type: application/json", "", "")).encode() + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (*chunks, b"") if one) + b"0\r\n" + trailer + b"\r\n"


def assert_others_get_responses(web: str, person, channel_id: int, times: int = 5) -> None:
    """Request /healthz and post as another user, each over a new connection."""
    for _ in range(times):
        for request in (HEALTHZ, post_of(person, channel_id)):
            with socket.create_connection((urlsplit(web).hostname, urlsplit(web).port), timeout=WAIT_SECONDS) as other:
                other.sendall(request)
                assert response_on(other).status in (200, 201)


# --- other clients


def test_slow_and_silent_clients_do_not_delay_others(web, cast, connect):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4_096, hard)), hard))
    body = post_of(cast.vip, cast.general, "Content-Length: 60000", body=b"{")
    login = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    for _ in range(SLOW_HEADERS):
        connect(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
    for number in range(SLOW_BODIES):
        connect((body, login)[number % 2])
    for _ in range(SILENT_CLIENTS):
        connect()
    assert_others_get_responses(web, cast.subscriber, cast.general)


def test_clients_that_do_not_read_do_not_delay_others(web, cast, connect):
    requests = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200
    for _ in range(24):
        connect(requests, receive_bytes=4_096)
    assert_others_get_responses(web, cast.subscriber, cast.general, 60)  # meanwhile the kernel's buffers fill


def test_clients_that_do_not_close_do_not_delay_others(web, cast, connect):
    for _ in range(60):
        connect(HEALTHZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert_others_get_responses(web, cast.subscriber, cast.general)


def test_slow_clients_do_not_delay_streams(web, cast, connect):
    with StreamClient(web, cast.vip.token) as stream:
        for _ in range(50):
            connect(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        wait_until(lambda: "unread" in stream.kinds(), "the first unread count of the stream")
        with StreamClient(web, cast.moderator.token) as other:
            wait_until(lambda: "unread" in other.kinds(), "the first unread count of the stream")


def test_opening_many_streams_does_not_delay_others(cast, connect, in_another_session):
    opening = (
        f"GET /api/notifications/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {cast.vip.token}\r\n\r\n"
    )
    with in_another_session("LOCK TABLE subscription"):
        streams = [connect(opening.encode()) for _ in range(15)]
        for _ in range(5):
            assert response_on(connect(HEALTHZ)).status == 200
        assert not select.select(streams, [], [], 0)[0], "no stream is open yet"
    for stream in streams:
        assert stream.recv(12) == b"HTTP/1.1 200"


# --- slow clients


def test_an_incomplete_request_gets_408(cast, connect):
    slow = {
        "head": connect(b"GET /healthz HTTP/1.1\r\nX-Slow: "),
        "body": connect(post_of(cast.subscriber, cast.general, "Content-Length: 60", body=b'{"channel_id": ')),
        "no body": connect(post_of(cast.subscriber, cast.general, "Content-Length: 60", body=b"")),
        "chunk": connect(
            post_of(cast.subscriber, cast.general, "Transfer-Encoding: chunked", body=b"5\r\n{"),
        ),
        "second head": connect(HEALTHZ + b"GET /healthz HTTP/1.1\r\nX-Slow: "),
    }
    for name, connection in slow.items():
        connection.settimeout(2 * WAIT_SECONDS)
        *before, (status, problem) = responses_on(connection)
        assert status == 408, name
        assert json.loads(problem)["code"] == "request_timeout"
        assert [status for status, _ in before] == ([200] if name == "second head" else [])
    assert Message.select().count() == 0


def test_the_process_ends_despite_an_incomplete_request(cast):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with running(["gunicorn", "--bind", f"127.0.0.1:{port}", "app:create_app()"], WEB_CONCURRENCY="1") as process:
        wait_until(lambda: "Booting worker" in process.log() and _connects(port), "the web process to listen")
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
            with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as other:
                other.sendall(HEALTHZ)  # accepted after the slow one
                assert response_on(other).status == 200
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(20) == 0  # gunicorn would give a request 25 s


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- HTTP


def test_a_request_may_arrive_byte_by_byte(cast, connect):
    request = post_of(cast.subscriber, cast.general, "Connection: close")
    assert statuses_on(connect(*(bytes([one]) for one in request))) == [201]


def test_a_connection_is_kept_and_requests_may_be_pipelined(cast, connect):
    connection = connect()
    for _ in range(3):
        connection.sendall(HEALTHZ)
        assert response_on(connection).status == 200
    post = post_of(cast.subscriber, cast.general)
    in_chunks = post_of(
        cast.subscriber,
        cast.general,
        "Transfer-Encoding: chunked",
        body=chunked(b'{"channel_id": %d,' % cast.general, b'"content": "gold"}', trailer=b"X-Sum: 1\r\n"),
    )
    last = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    connection.sendall(HEALTHZ + post + in_chunks + in_chunks + post + last)
    assert statuses_on(connection) == [200, 201, 201, 201, 201, 404]


def test_an_unread_body_is_not_taken_for_the_next_request(connect):
    inner = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    outer = b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner)
    last = HEALTHZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert statuses_on(connect(outer + inner, last)) == [401, 200]


def test_a_client_that_expects_100_continue_gets_it(cast, connect):
    body = json.dumps({"channel_id": cast.general, "content": "gold"}).encode()
    head = post_of(
        cast.subscriber,
        cast.general,
        "Expect: 100-continue",
        "Connection: close",
        f"Content-Length: {len(body)}",
        body=b"",
    )
    waiting = connect(head)
    assert waiting.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    waiting.sendall(body)
    assert statuses_on(waiting) == [201]
    assert statuses_on(connect(head + body)) == [201]


def test_half_closed_and_http_1_0_connections_are_answered_and_closed(connect):
    half_closed = connect(HEALTHZ)
    half_closed.shutdown(socket.SHUT_WR)
    assert statuses_on(half_closed) == [200]
    assert statuses_on(connect(b"GET /healthz HTTP/1.0\r\n\r\n")) == [200]


def test_a_disconnected_client_is_released(web, cast, connect):
    for cut in range(1, len(HEALTHZ), 7):
        connect(HEALTHZ[:cut]).close()
    connect(HEALTHZ).close()
    assert_others_get_responses(web, cast.subscriber, cast.general, 1)


# --- refused requests


def test_an_oversized_request_is_refused_before_it_is_complete(cast, connect, subtests):
    announced = post_of(
        cast.subscriber, cast.general, "Expect: 100-continue", "Content-Length: 10000000", body=b"{" * 1_000
    )
    bytewise = post_of(cast.subscriber, cast.general, "Transfer-Encoding: chunked", body=b"1\r\nx\r\n" * 50_000)
    large = b"GET /healthz HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1_000) for n in range(50))
    line = b"GET /" + b"x" * 5_000 + b" HTTP/1.1\r\n\r\n"
    for name, request, status in (
        ("announced", announced, 413), ("bytewise", bytewise, 413), ("head", large, 431), ("line", line, 414),
    ):  # fmt: skip
        with subtests.test(name):
            assert statuses_on(connect(request)) == [status]


def test_a_body_of_the_largest_size_is_read(cast, connect):
    body = json.dumps({"channel_id": cast.general, "content": "gold"}).encode().ljust(64 * 1024)
    plain = post_of(cast.subscriber, cast.general, f"Content-Length: {len(body)}", body=body)
    pieces = [body[start : start + 3] for start in range(0, len(body), 3)]
    in_chunks = post_of(
        cast.subscriber, cast.general, "Transfer-Encoding: chunked", "Connection: close", body=chunked(*pieces)
    )
    assert statuses_on(connect(plain + in_chunks)) == [201, 201]


def test_an_ambiguous_request_is_refused_and_the_connection_closed(cast, connect, subtests):
    """Requests that hide a post in what one of two interpretations takes for the body."""
    hidden = post_of(cast.subscriber, cast.general)
    head = b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n%b\r\n\r\n%b"
    for fields, body in (
        (b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
        (b"Content-Length: 0\r\nContent-Length: %d" % len(hidden), b""),
        (b"Content-Length: +0", b""),
        (b"Content-Length: 0, 0", b""),
        (b"Transfer-Encoding: xchunked", b"0\r\n\r\n"),
        (b"Transfer-Encoding: chunked, identity", b"0\r\n\r\n"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
        (b"Transfer-Encoding\x0b: chunked", b"0\r\n\r\n"),
        (b"X: y\nContent-Length: 0", b""),
        (b"X: y\r\n Content-Length: 0", b""),
        (b"Transfer-Encoding: chunked", b"+0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"-1\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"0x0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"0_0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"0\n\r\n"),
        (b"Transfer-Encoding: chunked", b"1\r\n0xx0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"0\r\nContent-Length: 9\r\n\r\n"),
    ):
        with subtests.test(fields=fields, body=body):
            statuses = statuses_on(connect(head % (cast.subscriber.token.encode(), fields, body) + hidden))
            assert len(statuses) == 1
            assert statuses[0] in (400, 415, 500, 501)
    assert Message.select().count() == 0


@given(st.lists(st.binary(min_size=1, max_size=40)), st.sampled_from([b"", b"A: b\r\n", b"A: 0\r\nB: \r\n"]), st.data())
def test_the_end_of_a_chunked_body_is_found_however_it_arrives(chunks, trailer, data):
    body = chunked(*chunks, trailer=trailer)
    scanner, position = ChunkScanner(), 0
    while position < len(body):
        step = data.draw(st.integers(1, len(body) - position))
        position += step
        assert scanner.is_complete(body[position - step : position]) == (position == len(body))


# --- headers that only a trusted proxy may send


def test_headers_named_like_wsgi_variables_are_ignored(connect):
    """gunicorn accepts SCRIPT_NAME from any client on this machine, which includes a proxy that passes it on."""
    for field in (b"SCRIPT_NAME: /x", b"PATH_INFO: /readyz", b"Script_Name: /healthz"):
        request = b"GET %b HTTP/1.1\r\nHost: localhost\r\n%b\r\nConnection: close\r\n\r\n"
        assert statuses_on(connect(request % (b"/healthz", field))) == [200], field
        assert statuses_on(connect(request % (b"/x/healthz", field))) == [404], field


def test_untrusted_scheme_headers_are_ignored(connect):
    contradiction = b"X-Forwarded-Proto: https\r\nX-Forwarded-Protocol: plain"
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n%b\r\nConnection: close\r\n\r\n" % contradiction
    assert statuses_on(connect(request)) == [200]
