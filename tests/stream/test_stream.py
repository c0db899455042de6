"""The live stream of a real web process: each event is sent immediately, once, and only to its user."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import psycopg
import pytest

from belfry.core.db import db, execute
from belfry.identity import tokens, users
from belfry.inbox.inbox import dismiss, list_notifications, mark_all_read, mark_read
from belfry.messages.messages import delete_message
from belfry.servers import servers
from belfry.stream import publish
from config import settings
from models import ApiToken
from schemas import Notification
from tests.fanout_helpers import (
    add_members,
    edit,
    post,
    post_and_notify,
    remaining_work_items,
    run_to_end,
    set_mentions_only,
)
from tests.people import csrf_of
from tests.processes import RedisProxy, open_redis_proxy, wait_until, web_process
from tests.sse_client import StreamClient

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proxy() -> Iterator[RedisProxy]:
    with open_redis_proxy(settings.redis_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def web(proxy) -> Iterator[str]:
    with web_process(REDIS_URL=proxy.url) as address:
        yield address


class Browser:
    """A browser that signs in and out; `cookie` is its session."""

    def __init__(self, web: str, token: str) -> None:
        self._web = web
        csrf, self.cookie = self._form("")
        self.cookie = self._post("/login", csrf, token=token)
        self._csrf, self.cookie = self._form(self.cookie)

    def _form(self, cookie: str) -> tuple[str, str]:
        with urlopen(Request(f"{self._web}/login", headers={"Cookie": cookie})) as response:
            return csrf_of(response.read().decode()), response.headers["Set-Cookie"].partition(";")[0]

    def _post(self, path: str, csrf: str, **fields: str) -> str:
        connection = HTTPConnection(urlsplit(self._web).netloc, timeout=30)
        headers = {"Cookie": self.cookie, "Content-Type": "application/x-www-form-urlencoded"}
        with closing(connection):
            connection.request("POST", path, urlencode({"csrf": csrf, **fields}), headers)
            response = connection.getresponse()
            assert response.status == 303
            return (response.headers["Set-Cookie"] or "").partition(";")[0]

    def sign_out(self, **fields: str) -> None:
        self._post("/logout", self._csrf, **fields)


def notify(person, channel_id: int, content: str = "gold breaks out") -> int:
    """Post a message and notify as a worker does; return the message's id."""
    message_id = post_and_notify(person, channel_id, content)
    publish.publish(notified=True)
    return message_id


def connected(web: str, person, **options: str) -> StreamClient:
    """A client that is connected and has received its first count."""
    client = StreamClient(web, person.token, **options)
    wait_until(lambda: "unread" in client.kinds(), "the count at the start of the stream")
    return client


def test_a_stream_starts_with_the_count_and_continues_with_new_notifications(web, cast):
    notify(cast.subscriber, cast.general)
    with connected(web, cast.vip) as client:
        assert client.kinds() == ["unread"]
        assert client.unread() == 1
        message_id = notify(cast.subscriber, cast.general, "gold, @vera")
        client.wait_for_unread(2)
        assert client.kinds() == ["unread", "notification", "unread"]
        [shown, _] = list_notifications(cast.vip.user, before=None, limit=9)
        assert client.events[1].data == Notification().dump(shown)
        assert client.messages() == [message_id]
        assert client.events[2].data == {
            "unread": 2,
            "mentions": 1,
            "channels": [{"channel_id": cast.general, "unread": 2, "mentions": 1}],
        }


def test_the_response_headers_disable_buffering_in_proxies(web, cast):
    with connected(web, cast.vip) as client:
        headers = client.response.headers
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert headers["Cache-Control"] == "no-store, no-transform"
        assert headers["X-Accel-Buffering"] == "no"
        assert "Content-Length" not in headers


def test_each_user_is_sent_only_their_own_notifications(web, cast):
    with (
        connected(web, cast.vip) as vip,
        connected(web, cast.admin) as admin,
        connected(web, cast.moderator) as moderator,
        connected(web, cast.subscriber) as author,
    ):
        first = notify(cast.subscriber, cast.general)
        second = notify(cast.admin, cast.vault)
        third = notify(cast.subscriber, cast.general)
        wait_until(lambda: third in vip.messages() and third in moderator.messages(), "the last message")
        wait_until(lambda: third in admin.messages(), "the last message")
        assert vip.messages() == [first, second, third]
        assert moderator.messages() == admin.messages() == [first, third]
        assert author.messages() == []


def test_all_clients_of_one_user_are_sent_the_same_events(web, cast):
    with connected(web, cast.vip) as one, connected(web, cast.vip) as other:
        notify(cast.subscriber, cast.general)
        mark_all_read(cast.vip.user)
        publish.publish(user_id=cast.vip.id)
        for client in (one, other):
            wait_until(lambda client=client: client.unread() == 0 and client.messages(), "the count after reading")
        assert one.messages() == other.messages()


# --- resuming


def test_a_reconnecting_client_is_sent_missed_notifications_once(web, cast):
    with connected(web, cast.vip) as client:
        notify(cast.subscriber, cast.general)
        client.wait_for_unread(1)
    missed = [notify(cast.subscriber, cast.general) for _ in range(3)]
    with connected(web, cast.vip, last_event_id=client.last_id()) as again:
        assert again.messages() == missed
        assert again.unread() == 4
        after = notify(cast.subscriber, cast.general)
        again.wait_for_unread(5)
        assert again.messages() == [*missed, after]
    with connected(web, cast.vip, last_event_id=again.last_id()) as third:
        assert third.messages() == []


def test_a_client_resumes_after_any_event_of_one_update(web, cast):
    with connected(web, cast.vip) as client:
        pass
    notified = [notify(cast.subscriber, cast.general) for _ in range(4)]
    with connected(web, cast.vip, last_event_id=client.last_id()) as complete:
        notifications = [event for event in complete.events if event.kind == "notification"]
    for number, event in enumerate(notifications, 1):
        with connected(web, cast.vip, last_event_id=event.id) as rest:
            assert rest.messages() == notified[number:]


def test_a_client_can_resume_at_another_web_process(web, cast):
    with connected(web, cast.vip) as client:
        pass
    message_id = notify(cast.subscriber, cast.general)
    with web_process() as other, connected(other, cast.vip, last_event_id=client.last_id()) as again:
        assert again.messages() == [message_id]


def test_a_late_commit_is_sent_late_and_delays_no_other_notification(web, cast):
    early, _ = post(cast.subscriber, cast.general)
    with psycopg.connect(settings.database_url) as late, connected(web, cast.vip) as client:
        late.execute(
            "INSERT INTO notification (user_id, message_id, reason) VALUES (%s, %s, 'message')", [cast.vip.id, early]
        )
        late.execute("INSERT INTO notification_log (message_ids) VALUES (%s)", [[early]])
        message_id = notify(cast.subscriber, cast.general)
        client.wait_for_unread(1)
        late.commit()
        publish.publish(notified=True)
        client.wait_for_unread(2)
        assert client.messages() == [message_id, early]
    with connected(web, cast.vip, last_event_id=client.last_id()) as again:
        assert again.messages() == []


def test_a_cursor_older_than_the_log_is_reset(web, cast):
    notify(cast.subscriber, cast.general)
    with connected(web, cast.vip, last_event_id="1700000000-700:700:") as client:
        assert client.kinds() == ["reset", "unread"]
    with connected(web, cast.vip, last_event_id=client.last_id()) as again:
        assert again.kinds() == ["unread"]


def test_a_forged_cursor_is_reset_without_an_error(web, cast):
    """A browser does not reconnect after an error, and after a change of SECRET_KEY all browsers have such cursors."""
    notify(cast.subscriber, cast.general)
    with connected(web, cast.vip) as client:
        for cursor in (f"{int(time.time())}-3:3:", client.last_id()[:-1]):
            with connected(web, cast.vip, last_event_id=cursor) as forged:
                assert forged.kinds() == ["reset", "unread"]
    with (
        web_process(SECRET_KEY="another key, which has been set since then") as other,
        connected(other, cast.vip, last_event_id=client.last_id()) as again,
    ):
        assert again.kinds() == ["reset", "unread"]


# --- counts


@pytest.mark.parametrize("change", ["read", "dismissed", "deleted", "edited", "moved", "lost"])
def test_the_count_is_updated_after_changes_in_another_process(web, cast, api, change):
    """Each change is a request in another process, which publishes it through Redis."""
    with connected(web, cast.vip) as client:
        first = notify(cast.subscriber, cast.general, "gold, @vera")
        second = notify(cast.admin, cast.vault, "gold")
        client.wait_for_unread(2)
        vip, admin = api(cast.vip), api(cast.admin)
        if change == "read":
            assert vip.post("/api/notifications/read", json={"up_to": f"{cast.vip.id}-{first}"}).status_code == 200
        elif change == "dismissed":
            assert vip.delete(f"/api/notifications/{cast.vip.id}-{second}").status_code == 204
        elif change == "deleted":
            assert admin.delete(f"/api/messages/{first}").status_code == 200
        elif change == "edited":
            set_mentions_only(cast.vip, cast.general)
            edit(cast.subscriber, first, "gold")  # the edit removes the mention
            publish.publish(notified=True)
        elif change == "moved":
            assert admin.patch(f"/api/channels/{cast.general}", json={"private": True}).status_code == 200
        else:
            member = f"/api/servers/{cast.server_id}/members/{cast.vip.id}"
            assert admin.put(member, json={"role_ids": []}).status_code == 200
        client.wait_for_unread(1)
        assert client.events[-1].data == api(cast.vip).get("/api/notifications/unread-count").json


def test_the_last_count_is_exact_after_many_concurrent_changes(web, cast, api):
    """Notify, read, edit and delete while other streams open and close: the last count that was sent is exact."""
    with connected(web, cast.vip) as client:
        for number in range(20):
            message_id = notify(cast.subscriber, cast.general, "gold, @vera" if number % 3 else "gold")
            if number % 5 == 1:
                mark_read(cast.vip.user, up_to=(cast.vip.id, message_id))
                publish.publish(user_id=cast.vip.id)
            if number % 5 == 2:
                delete_message(cast.subscriber.user, message_id)
                publish.publish(message_id=message_id)
            if number % 5 == 3:
                dismiss(cast.vip.user, cast.vip.id, message_id)
                publish.publish(user_id=cast.vip.id)
            connected(web, cast.vip).close()
        exact = api(cast.vip).get("/api/notifications/unread-count").json
        wait_until(
            lambda: [event.data for event in client.events if event.kind == "unread"][-1] == exact, "the exact count"
        )
        assert exact["unread"] > 0
        assert len(client.messages()) == len(set(client.messages()))


def test_all_slices_of_a_large_fan_out_are_sent(web, cast, set_slice_size):
    people = add_members(cast.server_id, 40)
    set_slice_size(10)
    token = tokens.create_token(users.find_user(people[-1]))[1]
    with connected(web, cast.vip) as first, StreamClient(web, token) as last:
        wait_until(lambda: last.kinds() == ["unread"], "the count")
        message_id, run_id = post(cast.subscriber, cast.general)
        run_to_end(run_id)
        publish.publish(notified=True)
        wait_until(lambda: last.messages() == first.messages() == [message_id], "both to be notified")
    assert not remaining_work_items(run_id)


# --- permission


@pytest.mark.parametrize(
    ("who", "status", "code"),
    [
        (None, 401, "unauthenticated"),
        ("lapsed", 403, "subscription_required"),
        ("stranger", 403, "forbidden"),
    ],
)
def test_a_user_who_cannot_be_notified_gets_no_stream(web, cast, who, status, code):
    client = StreamClient(web, cast.everybody[who].token if who else None)
    assert (client.response.status, client.problem["code"]) == (status, code)


def test_an_invalid_cursor_is_rejected(web, cast):
    client = StreamClient(web, cast.vip.token, last_event_id="7; DROP TABLE notification_log")
    assert (client.response.status, client.problem["code"]) == (422, "invalid")
    assert "Last-Event-ID" in client.problem["errors"]


@pytest.mark.parametrize("change", ["revoked", "unpaid", "removed", "left another"])
def test_a_stream_ends_when_its_user_loses_the_right_to_it(web, cast, api, change):
    admin = api(cast.admin)
    if change == "left another":
        other = admin.post("/api/servers", json={"name": "Silver Signals"}).json["id"]
        servers.put_member(other, cast.vip.id, [])
    with connected(web, cast.vip) as client, connected(web, cast.subscriber) as untouched:
        if change == "revoked":
            token = ApiToken.get(ApiToken.token_hash == tokens.hash_token(cast.vip.token))
            response = admin.delete(f"/api/users/{cast.vip.id}/tokens/{token.id}")
        elif change == "unpaid":
            response = admin.put(
                f"/api/users/{cast.vip.id}/subscription", json={"status": "canceled", "current_period_end": None}
            )
        else:
            server_id = other if change == "left another" else cast.server_id
            response = admin.delete(f"/api/servers/{server_id}/members/{cast.vip.id}")
        assert response.status_code in (200, 204)
        client.wait_for_end()
        again = StreamClient(web, cast.vip.token, last_event_id=client.last_id())
        assert again.response.status == {"revoked": 401, "left another": 200}.get(change, 403)
        again.close()
        assert not untouched.ended.is_set()


def test_signing_out_ends_only_the_streams_of_that_session(web, cast):
    browsers = [Browser(web, cast.vip.token) for _ in range(2)]
    with (
        StreamClient(web, Cookie=browsers[0].cookie) as one,
        StreamClient(web, Cookie=browsers[1].cookie) as other,
        connected(web, cast.vip) as by_token,
    ):
        wait_until(lambda: "unread" in one.kinds() and "unread" in other.kinds(), "both clients to connect")
        browsers[0].sign_out()
        one.wait_for_end()
        notify(cast.subscriber, cast.general)
        other.wait_for_unread(1)
        by_token.wait_for_unread(1)


def test_signing_out_everywhere_ends_the_streams_of_all_sessions(web, cast):
    browsers = [Browser(web, cast.vip.token) for _ in range(2)]
    with (
        StreamClient(web, Cookie=browsers[0].cookie) as one,
        StreamClient(web, Cookie=browsers[1].cookie) as other,
        connected(web, cast.vip) as by_token,
    ):
        wait_until(lambda: "unread" in one.kinds() and "unread" in other.kinds(), "both clients to connect")
        browsers[0].sign_out(everywhere="1")
        one.wait_for_end()
        other.wait_for_end()
        notify(cast.subscriber, cast.general)
        by_token.wait_for_unread(1)


def test_revoking_a_token_ends_its_streams_and_the_streams_of_its_sessions(web, api, cast):
    _, second = tokens.create_token(cast.vip.user)
    browser = Browser(web, cast.vip.token)
    with (
        connected(web, cast.vip) as revoked,
        StreamClient(web, Cookie=browser.cookie) as by_session,
        StreamClient(web, second) as by_another,
    ):
        wait_until(lambda: "unread" in by_session.kinds() and "unread" in by_another.kinds(), "all clients to connect")
        token = ApiToken.get(ApiToken.token_hash == tokens.hash_token(cast.vip.token))
        assert api(cast.vip).delete(f"/api/me/tokens/{token.id}").status_code == 204
        revoked.wait_for_end()
        by_session.wait_for_end()
        notify(cast.subscriber, cast.general)
        by_another.wait_for_unread(1)


def test_an_expired_session_ends_its_streams(web, cast):
    browser = Browser(web, cast.vip.token)
    with StreamClient(web, Cookie=browser.cookie) as client:
        wait_until(lambda: "unread" in client.kinds(), "the client to connect")
        execute("UPDATE session SET last_seen_at = now() - interval '7 days'")
        client.wait_for_end()


def test_a_closed_stream_does_not_disturb_others(web, cast):
    for _ in range(3):
        connected(web, cast.vip).close()
    with connected(web, cast.vip) as client:
        notify(cast.subscriber, cast.general)
        client.wait_for_unread(1)


def test_the_oldest_stream_of_a_user_ends_beyond_the_limit(web, cast):
    clients = [connected(web, cast.vip) for _ in range(21)]
    try:
        clients[0].wait_for_end()
        assert not any(client.ended.is_set() for client in clients[1:])
    finally:
        for client in clients:
            client.close()


# --- failures


def test_no_notification_is_lost_while_redis_is_unavailable(web, proxy, cast):
    with connected(web, cast.vip) as client:
        proxy.cut_connections()
        try:
            during = post_and_notify(cast.subscriber, cast.general, "gold")  # it is not published
            client.wait_for_unread(1)
            with connected(web, cast.subscriber) as other:
                assert other.unread() == 0
        finally:
            proxy.accept_connections()
        after = notify(cast.subscriber, cast.general)
        client.wait_for_unread(2)
        assert client.messages() == [during, after]


def test_a_notification_is_sent_although_its_announcement_is_lost(web, cast):
    with connected(web, cast.vip) as client:
        post_and_notify(cast.subscriber, cast.general, "gold")  # it is not published
        client.wait_for_unread(1)


@pytest.mark.parametrize("announced", ["5", '{"message_id": "x"}', '{"user_id": []}', "no JSON", "null", '{"new": 1}'])
def test_an_invalid_announcement_is_ignored(web, cast, redis, announced):
    """Such an announcement may come from a later version that runs at the same time."""
    with connected(web, cast.vip) as client:
        redis.publish(publish.live_channel(), announced)
        notify(cast.subscriber, cast.general)
        client.wait_for_unread(1)
        with connected(web, cast.subscriber) as other:
            assert other.unread() == 0


def test_an_error_in_the_lookup_of_one_client_affects_no_other_client(cast):
    """An internal error that one cursor causes: that client is disconnected each time, and all others continue."""
    with web_process(through=("tests.faults.failing_cursor",)) as web, connected(web, cast.vip) as client:
        with StreamClient(web, cast.admin.token, last_event_id="1-7777:7777:") as poisoned:
            poisoned.wait_for_end()
        notify(cast.subscriber, cast.general)
        client.wait_for_unread(1)
        assert not client.ended.is_set()
        with connected(web, cast.subscriber):
            pass


def test_streams_stay_open_while_the_database_is_unavailable(web, cast):
    with connected(web, cast.vip) as client, psycopg.connect(settings.database_url, autocommit=True) as administrator:
        for _ in range(5):
            administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database() AND application_name = 'belfry'"
            )
            publish.publish(notified=True)
            time.sleep(0.05)
        db.close_all()
        db.connect(reuse_if_open=True)
        message_id = notify(cast.subscriber, cast.general)
        client.wait_for_unread(1)
        assert client.messages() == [message_id]
        assert not client.ended.is_set()


def test_a_client_that_does_not_read_is_disconnected_and_resumes_later(web, cast):
    """The kernel and UNSENT_BYTES buffer about 700 notifications. The rest is read when the client resumes."""
    client = connected(web, cast.vip)
    client.close()
    with a_connection(web, cast.vip, f"Last-Event-ID: {client.last_id()}", receives=4096) as stalled:
        assert stalled.recv(100).startswith(b"HTTP/1.1 200 OK")
        message_ids = notify_in_one_transaction(cast.subscriber, cast.general, cast.vip, 900)
        publish.publish(notified=True)
        with connected(web, cast.subscriber) as other:
            notify(cast.vip, cast.general)
            other.wait_for_unread(1)  # the stalled client delays no other client
            message_ids.append(notify(cast.subscriber, cast.general))
            notify(cast.vip, cast.general)
            other.wait_for_unread(2)
        received = read_until_closed(stalled)
    assert received.count(b"event: notification") < 900
    with connected(web, cast.vip, last_event_id=client.last_id()) as again:
        assert again.messages() == message_ids


def test_a_client_that_missed_too_many_notifications_is_reset(web, cast):
    client = connected(web, cast.vip)
    client.close()
    notify_in_one_transaction(cast.subscriber, cast.general, cast.vip, 1_001)
    with connected(web, cast.vip, last_event_id=client.last_id()) as again:
        assert again.kinds() == ["reset", "unread"]
        assert again.unread() == 1_001
        message_id = notify(cast.subscriber, cast.general)
        again.wait_for_unread(1_002)
        assert again.messages() == [message_id]


@contextmanager
def a_connection(web: str, person, *headers: str, version: str = "1.1", receives: int = 0) -> Iterator[socket.socket]:
    """A connection that has requested the stream and has read nothing yet."""
    place = urlsplit(web)
    with socket.socket() as connection:
        if receives:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        connection.settimeout(30)
        connection.connect((place.hostname, place.port))
        request = [f"GET /api/notifications/stream HTTP/{version}", "Host: x", *headers]
        lines = [*request, f"Authorization: Bearer {person.token}", ""]
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
        yield connection


def read_until_closed(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def notify_in_one_transaction(author, channel_id: int, recipient, number: int) -> list[int]:
    """Insert this number of messages and notify one user of them in one transaction; return the message ids."""
    [(message_ids,)] = db.execute_sql(
        """
        WITH posted AS (
            INSERT INTO message (channel_id, author_id, content)
            SELECT %(channel_id)s, %(author_id)s, repeat('gold ', 20) FROM generate_series(1, %(number)s)
            RETURNING id
        ),
        notified AS (
            INSERT INTO notification (user_id, message_id, reason) SELECT %(user_id)s, id, 'message' FROM posted
        ),
        logged AS (INSERT INTO notification_log (message_ids) SELECT array_agg(id) FROM posted)
        SELECT array_agg(id ORDER BY id) FROM posted
        """,
        {"channel_id": channel_id, "author_id": author.id, "user_id": recipient.id, "number": number},
    ).fetchall()
    return message_ids


def test_an_http_1_0_proxy_gets_the_stream_without_chunked_encoding(web, cast):
    """nginx sends HTTP/1.0 unless it is configured otherwise."""
    with a_connection(web, cast.vip, version="1.0") as connection, connection.makefile("rb") as lines:
        head = list(iter(lines.readline, b"\r\n"))
        assert head[0].startswith(b"HTTP/1.0 200") or head[0].startswith(b"HTTP/1.1 200")
        assert not any(line.lower().startswith(b"transfer-encoding") for line in head)
        assert lines.readline().startswith(b"retry: ")
        assert lines.readline() == b"\n"
        assert lines.readline() == b"event: unread\n"


def test_a_head_request_opens_no_stream(web, cast):
    connection = HTTPConnection(urlsplit(web).netloc, timeout=30)
    connection.request("HEAD", "/api/notifications/stream", headers={"Authorization": f"Bearer {cast.vip.token}"})
    with closing(connection), connection.getresponse() as response:
        assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert response.read() == b""


def test_a_server_other_than_gunicorn_answers_501(api, cast):
    response = api(cast.vip).get("/api/notifications/stream")
    assert (response.status_code, response.json["code"]) == (501, "not_implemented")
    assert "gunicorn" in response.json["detail"]


def test_a_process_with_the_maximum_of_streams_answers_503(cast):
    with web_process(MAX_STREAMS_PER_PROCESS="1") as small, connected(small, cast.vip):
        refused = StreamClient(small, cast.admin.token)
        assert (refused.response.status, refused.problem["code"]) == (503, "unavailable")
        assert refused.response.headers["Retry-After"]


def test_open_streams_do_not_delay_the_shutdown_of_the_process(cast):
    started = None
    with web_process() as short_lived, connected(short_lived, cast.vip) as client:
        started = time.monotonic()
    client.wait_for_end()
    assert time.monotonic() - started < 20  # gunicorn waits 25 s for a request


def test_all_streams_of_a_process_share_one_thread(web, cast):
    """Other requests are answered meanwhile, by the same number of threads as without streams."""
    clients = [connected(web, person) for person in (cast.vip, cast.admin, cast.moderator) for _ in range(15)]
    try:
        statuses = [StreamClient(web, cast.lapsed.token).response.status for _ in range(20)]
        assert statuses == [403] * 20
        notify(cast.subscriber, cast.general)
        for client in clients:
            client.wait_for_unread(1)
    finally:
        for client in clients:
            client.close()
