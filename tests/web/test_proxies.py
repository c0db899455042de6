"""The proxy configurations of docs/proxy, each with its ports and files replaced, in front of a real web process."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from belfry.stream import publish
from tests.fanout_helpers import post_and_notify
from tests.processes import WAIT_SECONDS, wait_until, web_process
from tools.dev import ROOT

pytestmark = pytest.mark.slow

CONFIGURATIONS = ROOT / "docs" / "proxy"
SLOW_REQUESTS = 40


class Proxy:
    """A proxy with TLS on `port` in front of the web process on `web_port`."""

    def __init__(self, port: int, web_port: int) -> None:
        self.port, self._web_port = port, web_port
        self._tls = ssl.create_default_context()
        self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE

    def connect(self) -> ssl.SSLSocket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)
        return self._tls.wrap_socket(connection, server_hostname="localhost")

    def is_ready(self) -> bool:
        try:
            return self.request("GET", "/healthz")[0] == 200
        except OSError:
            return False

    def request(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str]]:
        """Status and headers of the response."""
        headers = {"Content-Type": "application/json", **headers}
        with closing(HTTPSConnection("localhost", self.port, timeout=WAIT_SECONDS, context=self._tls)) as connection:
            with suppress(BrokenPipeError, ssl.SSLEOFError):  # refused before the whole body was sent
                connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            response.read()
            return response.status, dict(response.getheaders())

    def web_connections(self) -> int:
        """The number of connections of the web process."""
        return sum(
            connection.status == psutil.CONN_ESTABLISHED
            and connection.laddr
            and connection.laddr.port == self._web_port
            for connection in psutil.net_connections("tcp")
        )


def _nginx(directory: Path, http: int, https: int, web: int) -> list[str]:
    text = (CONFIGURATIONS / "nginx.conf").read_text()
    paths = "\n".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    for old, new in (
        ("http {", f"http {{ {paths}"),
        ("access_log /var/log/nginx/access.log", "access_log off"),
        ("listen 80;", f"listen 127.0.0.1:{http};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{https} ssl;"),
        ("127.0.0.1:8000", f"127.0.0.1:{web}"),
        ("/etc/ssl/belfry.crt", f"{directory}/crt"),
        ("/etc/ssl/belfry.key", f"{directory}/key"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    user = "user root;" if os.getuid() == 0 else ""  # the temporary directory is readable only by its owner
    (directory / "nginx.conf").write_text(text)
    options = f"{user} daemon off; pid {directory}/pid; error_log {directory}/log;"
    return ["nginx", "-p", str(directory), "-c", f"{directory}/nginx.conf", "-e", f"{directory}/log", "-g", options]


def _haproxy(directory: Path, http: int, https: int, web: int) -> list[str]:
    text = (CONFIGURATIONS / "haproxy.cfg").read_text()
    for old, new in (
        ("bind :80\n", f"bind 127.0.0.1:{http}\n"),
        ("bind :443 ", f"bind 127.0.0.1:{https} "),
        ("127.0.0.1:8000", f"127.0.0.1:{web}"),
        ("/etc/haproxy/belfry.pem", f"{directory}/pem"),
        ("maxconn 20000", "maxconn 2000"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (directory / "haproxy.cfg").write_text(text)
    return ["haproxy", "-db", "-f", f"{directory}/haproxy.cfg"]


def _caddy(directory: Path, http: int, https: int, web: int) -> list[str]:
    text, certificate = (CONFIGURATIONS / "Caddyfile").read_text(), f"{directory}/crt {directory}/key"
    for old, new in (
        ("\tservers {", "\tadmin off\n\tauto_https disable_redirects\n\tservers {"),
        ("chat.example.com {", f"https://localhost:{https} {{\n\tbind 127.0.0.1\n\ttls {certificate}"),
        ("127.0.0.1:8000", f"127.0.0.1:{web}"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (directory / "Caddyfile").write_text(text)
    return ["caddy", "run", "--config", f"{directory}/Caddyfile", "--adapter", "caddyfile"]


COMMANDS = {"nginx": _nginx, "haproxy": _haproxy, "caddy": _caddy}


def _free_ports(number: int) -> list[int]:
    with ExitStack() as opened:
        return [
            opened.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(number)
        ]


@pytest.fixture(scope="module", params=COMMANDS)
def proxy(request) -> Iterator[Proxy]:
    name = request.param
    for program in (name, "openssl"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        certificate = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
        subprocess.run(
            ["openssl", *certificate, "-addext", "subjectAltName=DNS:localhost", "-out", "crt", "-keyout", "key"],
            cwd=directory, check=True, capture_output=True,
        )  # fmt: skip
        (directory / "pem").write_text((directory / "crt").read_text() + (directory / "key").read_text())
        web_port = urlsplit(stack.enter_context(web_process())).port
        http, https = _free_ports(2)
        log = stack.enter_context((directory / "output").open("wb"))
        process = subprocess.Popen(
            COMMANDS[name](directory, http, https, web_port),
            env={**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        proxy = Proxy(https, web_port)
        try:
            wait_until(proxy.is_ready, f"{name} to be ready")
            yield proxy
        except BaseException:
            print((directory / "output").read_text()[-4_000:])
            raise
        finally:
            process.terminate()
            process.wait(WAIT_SECONDS)


def test_posts_and_pages_pass_the_proxy(proxy, cast):
    authorization = f"Bearer {cast.subscriber.token}"
    message = {"channel_id": cast.general, "content": "gold breaks out"}
    assert proxy.request("POST", "/api/messages", message, Authorization=authorization)[0] == 201
    assert proxy.request("GET", "/login")[0] == 200
    large = {"channel_id": cast.general, "content": "x" * 70_000}
    assert proxy.request("POST", "/api/messages", large, Authorization=authorization)[0] == 413


def test_a_stream_passes_the_proxy_event_by_event(proxy, cast):
    with proxy.connect() as stream:
        stream.sendall(
            b"GET /api/notifications/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n\r\n"
            % cast.vip.token.encode()
        )
        _read_until(stream, b"event: unread")
        post_and_notify(cast.subscriber, cast.general, "gold breaks out")
        publish.publish(notified=True)
        _read_until(stream, b"event: notification")
        _read_until(stream, b"event: ping")  # after 15 s without other events


def test_the_proxy_buffers_slow_requests(proxy, cast):
    head = b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
    with ExitStack() as opened:
        for number in range(SLOW_REQUESTS):
            slow = opened.enter_context(proxy.connect())
            slow.sendall(head + (b"\r\n{" if number % 2 else b"X-Slow: "))
        authorization = f"Bearer {cast.subscriber.token}"
        for _ in range(3):
            message = {"channel_id": cast.general, "content": "gold breaks out"}
            assert proxy.request("POST", "/api/messages", message, Authorization=authorization)[0] == 201
        assert proxy.web_connections() < SLOW_REQUESTS / 4  # a few idle connections are kept


def _read_until(stream: ssl.SSLSocket, expected: bytes) -> None:
    received = b""
    while expected not in received:
        data = stream.recv(4_096)
        assert data, received
        received += data
