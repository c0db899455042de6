"""The live stream over a real web process: what happens is sent at once, once, and to nobody else."""

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
from tests.fanout_helpers import crowd, edit, parts_of, post, post_and_notify, run_to_end, wants_mentions_only
from tests.people import csrf_of
from tests.processes import RedisGate, a_gate, a_web_process, wait_until
from tests.sse_client import Listener

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gate() -> Iterator[RedisGate]:
    with a_gate(settings.redis_url) as gate:
        yield gate


@pytest.fixture(scope="module")
def web(gate) -> Iterator[str]:
    with a_web_process(REDIS_URL=gate.url) as address:
        yield address


class Browser:
    """Signs in and out as a browser does; `cookie` is its session."""

    def __init__(self, web: str, token: str) -> None:
        self._web = web
        csrf, self.cookie = self._form("")
        self.cookie = self._post("/login", csrf, token=token)
        self._csrf, self.cookie = self._form(self.cookie)

    def _form(self, cookie: str) -> tuple[str, str]:
        with urlopen(Request(f"{self._web}/login", headers={"Cookie": cookie})) as answer:
            return csrf_of(answer.read().decode()), answer.headers["Set-Cookie"].partition(";")[0]

    def _post(self, path: str, csrf: str, **fields: str) -> str:
        connection = HTTPConnection(urlsplit(self._web).netloc, timeout=30)
        headers = {"Cookie": self.cookie, "Content-Type": "application/x-www-form-urlencoded"}
        with closing(connection):
            connection.request("POST", path, urlencode({"csrf": csrf, **fields}), headers)
            answer = connection.getresponse()
            assert answer.status == 303
            return (answer.headers["Set-Cookie"] or "").partition(";")[0]

    def sign_out(self, **fields: str) -> None:
        self._post("/logout", self._csrf, **fields)


def notify(person, channel_id: int, content: str = "gold breaks out") -> int:
    """Post and notify as a worker does; the message's id."""
    message_id = post_and_notify(person, channel_id, content)
    publish.publish(notified=True)
    return message_id


def listening(web: str, person, **options: str) -> Listener:
    """A reader who is connected: it has had its count."""
    listener = Listener(web, person.token, **options)
    wait_until(lambda: "unread" in listener.kinds(), "the count that a stream begins with")
    return listener


def test_a_stream_begins_with_the_count_and_goes_on_with_what_happens(web, cast):
    notify(cast.subscriber, cast.general)
    with listening(web, cast.vip) as listener:
        assert listener.kinds() == ["unread"]
        assert listener.unread() == 1
        message_id = notify(cast.subscriber, cast.general, "gold, @vera")
        listener.wait_for_unread(2)
        assert listener.kinds() == ["unread", "notification", "unread"]
        [shown, _] = list_notifications(cast.vip.user, before=None, limit=9)
        assert listener.events[1].data == Notification().dump(shown)
        assert listener.messages() == [message_id]
        assert listener.events[2].data == {
            "unread": 2,
            "mentions": 1,
            "channels": [{"channel_id": cast.general, "unread": 2, "mentions": 1}],
        }


def test_the_head_of_the_response_disables_buffering_in_proxies(web, cast):
    with listening(web, cast.vip) as listener:
        headers = listener.answer.headers
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert headers["Cache-Control"] == "no-store, no-transform"
        assert headers["X-Accel-Buffering"] == "no"
        assert "Content-Length" not in headers


def test_everybody_is_sent_their_own_and_nobody_anything_else(web, cast):
    with (
        listening(web, cast.vip) as vip,
        listening(web, cast.admin) as admin,
        listening(web, cast.moderator) as moderator,
        listening(web, cast.subscriber) as author,
    ):
        first = notify(cast.subscriber, cast.general)
        second = notify(cast.admin, cast.vault)
        third = notify(cast.subscriber, cast.general)
        wait_until(lambda: third in vip.messages() and third in moderator.messages(), "the last message")
        wait_until(lambda: third in admin.messages(), "the last message")
        assert vip.messages() == [first, second, third]
        assert moderator.messages() == admin.messages() == [first, third]
        assert author.messages() == []


def test_every_window_of_one_person_is_sent_the_same(web, cast):
    with listening(web, cast.vip) as one, listening(web, cast.vip) as other:
        notify(cast.subscriber, cast.general)
        mark_all_read(cast.vip.user)
        publish.publish(user_id=cast.vip.id)
        for listener in (one, other):
            wait_until(lambda listener=listener: listener.unread() == 0 and listener.messages(), "what was read")
        assert one.messages() == other.messages()


# --- going on where one was


def test_who_comes_back_is_sent_what_they_missed_and_nothing_twice(web, cast):
    with listening(web, cast.vip) as listener:
        notify(cast.subscriber, cast.general)
        listener.wait_for_unread(1)
    missed = [notify(cast.subscriber, cast.general) for _ in range(3)]
    with listening(web, cast.vip, since=listener.last_id()) as again:
        assert again.messages() == missed
        assert again.unread() == 4
        after = notify(cast.subscriber, cast.general)
        again.wait_for_unread(5)
        assert again.messages() == [*missed, after]
    with listening(web, cast.vip, since=again.last_id()) as once_more:
        assert once_more.messages() == []


def test_who_broke_off_in_the_midst_of_several_goes_on_in_their_midst(web, cast):
    with listening(web, cast.vip) as listener:
        pass
    notified = [notify(cast.subscriber, cast.general) for _ in range(4)]
    with listening(web, cast.vip, since=listener.last_id()) as all_:
        notifications = [event for event in all_.events if event.kind == "notification"]
    for number, event in enumerate(notifications, 1):
        with listening(web, cast.vip, since=event.id) as rest:
            assert rest.messages() == notified[number:]


def test_a_stream_goes_on_in_another_process(web, cast):
    with listening(web, cast.vip) as listener:
        pass
    message_id = notify(cast.subscriber, cast.general)
    with a_web_process() as other, listening(other, cast.vip, since=listener.last_id()) as again:
        assert again.messages() == [message_id]


def test_what_is_committed_late_is_sent_late_and_holds_nothing_up(web, cast):
    early, _ = post(cast.subscriber, cast.general)
    with psycopg.connect(settings.database_url) as late, listening(web, cast.vip) as listener:
        late.execute(
            "INSERT INTO notification (user_id, message_id, reason) VALUES (%s, %s, 'message')", [cast.vip.id, early]
        )
        late.execute("INSERT INTO notification_log (message_ids) VALUES (%s)", [[early]])
        message_id = notify(cast.subscriber, cast.general)
        listener.wait_for_unread(1)
        late.commit()
        publish.publish(notified=True)
        listener.wait_for_unread(2)
        assert listener.messages() == [message_id, early]
    with listening(web, cast.vip, since=listener.last_id()) as again:
        assert again.messages() == []


def test_a_position_of_which_nothing_is_known_any_more_sends_to_the_inbox(web, cast):
    notify(cast.subscriber, cast.general)
    with listening(web, cast.vip, since="1700000000-700:700:") as listener:
        assert listener.kinds() == ["reset", "unread"]
    with listening(web, cast.vip, since=listener.last_id()) as again:
        assert again.kinds() == ["unread"]


def test_a_made_up_position_sends_to_the_inbox_and_is_no_error(web, cast):
    """A browser does not come back after an error; and after a change of SECRET_KEY all of them have such positions."""
    notify(cast.subscriber, cast.general)
    with listening(web, cast.vip) as listener:
        for since in (f"{int(time.time())}-3:3:", listener.last_id()[:-1]):
            with listening(web, cast.vip, since=since) as made_up:
                assert made_up.kinds() == ["reset", "unread"]
    with (
        a_web_process(SECRET_KEY="another key, which has been set since then") as other,
        listening(other, cast.vip, since=listener.last_id()) as again,
    ):
        assert again.kinds() == ["reset", "unread"]


# --- counts


@pytest.mark.parametrize("how", ["read", "dismissed", "deleted", "edited", "moved", "lost"])
def test_the_count_follows_what_happens_elsewhere(web, cast, api, how):
    """Each by the request that does it, of another process: the announcement goes through Redis."""
    with listening(web, cast.vip) as listener:
        first = notify(cast.subscriber, cast.general, "gold, @vera")
        second = notify(cast.admin, cast.vault, "gold")
        listener.wait_for_unread(2)
        vip, admin = api(cast.vip), api(cast.admin)
        if how == "read":
            assert vip.post("/api/notifications/read", json={"up_to": f"{cast.vip.id}-{first}"}).status_code == 200
        elif how == "dismissed":
            assert vip.delete(f"/api/notifications/{cast.vip.id}-{second}").status_code == 204
        elif how == "deleted":
            assert admin.delete(f"/api/messages/{first}").status_code == 204
        elif how == "edited":
            wants_mentions_only(cast.vip, cast.general)
            edit(cast.subscriber, first, "gold")  # nobody is mentioned any more
            publish.publish(notified=True)
        elif how == "moved":
            assert admin.patch(f"/api/channels/{cast.general}", json={"private": True}).status_code == 200
        else:
            member = f"/api/servers/{cast.server_id}/members/{cast.vip.id}"
            assert admin.put(member, json={"role_ids": []}).status_code == 200
        listener.wait_for_unread(1)
        assert listener.events[-1].data == api(cast.vip).get("/api/notifications/unread-count").json


def test_the_count_is_the_count_after_a_storm(web, cast, api):
    """Notified, read, edited, deleted, while streams come and go: what was last sent is what there is."""
    with listening(web, cast.vip) as listener:
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
            listening(web, cast.vip).close()
        real = api(cast.vip).get("/api/notifications/unread-count").json
        wait_until(
            lambda: [event.data for event in listener.events if event.kind == "unread"][-1] == real, "the real count"
        )
        assert real["unread"] > 0
        assert len(listener.messages()) == len(set(listener.messages()))


def test_a_large_fan_out_is_sent_slice_by_slice(web, cast, slices_of):
    people = crowd(cast.server_id, 40)
    slices_of(10)
    token = tokens.create_token(users.find_user(people[-1]))[1]
    with listening(web, cast.vip) as first, Listener(web, token) as last:
        wait_until(lambda: last.kinds() == ["unread"], "the count")
        message_id, run_id = post(cast.subscriber, cast.general)
        run_to_end(run_id)
        publish.publish(notified=True)
        wait_until(lambda: last.messages() == first.messages() == [message_id], "both to be notified")
    assert not parts_of(run_id)


# --- who may listen


@pytest.mark.parametrize(
    ("who", "status", "code"),
    [
        (None, 401, "unauthenticated"),
        ("lapsed", 403, "subscription_required"),
        ("stranger", 403, "forbidden"),
    ],
)
def test_a_user_who_cannot_be_notified_gets_no_stream(web, cast, who, status, code):
    listener = Listener(web, cast.everybody[who].token if who else None)
    assert (listener.answer.status, listener.problem["code"]) == (status, code)


def test_a_position_that_was_never_given_out_is_refused(web, cast):
    listener = Listener(web, cast.vip.token, since="7; DROP TABLE notification_log")
    assert (listener.answer.status, listener.problem["code"]) == (422, "invalid")
    assert "Last-Event-ID" in listener.problem["errors"]


@pytest.mark.parametrize("how", ["revoked", "unpaid", "removed", "left another"])
def test_a_stream_ends_with_what_it_stands_on(web, cast, api, how):
    admin = api(cast.admin)
    if how == "left another":
        other = admin.post("/api/servers", json={"name": "Silver Signals"}).json["id"]
        servers.put_member(other, cast.vip.id, [])
    with listening(web, cast.vip) as listener, listening(web, cast.subscriber) as untouched:
        if how == "revoked":
            token = ApiToken.get(ApiToken.token_hash == tokens.hash_token(cast.vip.token))
            answer = admin.delete(f"/api/users/{cast.vip.id}/tokens/{token.id}")
        elif how == "unpaid":
            answer = admin.put(
                f"/api/users/{cast.vip.id}/subscription", json={"status": "canceled", "current_period_end": None}
            )
        else:
            server_id = other if how == "left another" else cast.server_id
            answer = admin.delete(f"/api/servers/{server_id}/members/{cast.vip.id}")
        assert answer.status_code in (200, 204)
        listener.wait_for_end()
        again = Listener(web, cast.vip.token, since=listener.last_id())
        assert again.answer.status == {"revoked": 401, "left another": 200}.get(how, 403)
        again.close()
        assert not untouched.ended.is_set()


def test_signing_out_ends_the_streams_of_that_session_alone(web, cast):
    windows = [Browser(web, cast.vip.token) for _ in range(2)]
    with (
        Listener(web, Cookie=windows[0].cookie) as one,
        Listener(web, Cookie=windows[1].cookie) as other,
        listening(web, cast.vip) as by_token,
    ):
        wait_until(lambda: "unread" in one.kinds() and "unread" in other.kinds(), "both to listen")
        windows[0].sign_out()
        one.wait_for_end()
        notify(cast.subscriber, cast.general)
        other.wait_for_unread(1)
        by_token.wait_for_unread(1)


def test_signing_out_everywhere_ends_the_streams_of_all_sessions(web, cast):
    windows = [Browser(web, cast.vip.token) for _ in range(2)]
    with (
        Listener(web, Cookie=windows[0].cookie) as one,
        Listener(web, Cookie=windows[1].cookie) as other,
        listening(web, cast.vip) as by_token,
    ):
        wait_until(lambda: "unread" in one.kinds() and "unread" in other.kinds(), "both to listen")
        windows[0].sign_out(everywhere="1")
        one.wait_for_end()
        other.wait_for_end()
        notify(cast.subscriber, cast.general)
        by_token.wait_for_unread(1)


def test_revoking_ones_own_token_ends_its_streams_and_those_of_its_sessions(web, api, cast):
    _, second = tokens.create_token(cast.vip.user)
    window = Browser(web, cast.vip.token)
    with (
        listening(web, cast.vip) as revoked,
        Listener(web, Cookie=window.cookie) as by_session,
        Listener(web, second) as by_another,
    ):
        wait_until(lambda: "unread" in by_session.kinds() and "unread" in by_another.kinds(), "all to listen")
        token = ApiToken.get(ApiToken.token_hash == tokens.hash_token(cast.vip.token))
        assert api(cast.vip).delete(f"/api/me/tokens/{token.id}").status_code == 204
        revoked.wait_for_end()
        by_session.wait_for_end()
        notify(cast.subscriber, cast.general)
        by_another.wait_for_unread(1)


def test_a_session_that_ends_unannounced_ends_its_streams(web, cast):
    window = Browser(web, cast.vip.token)
    with Listener(web, Cookie=window.cookie) as listener:
        wait_until(lambda: "unread" in listener.kinds(), "it to listen")
        execute("UPDATE session SET last_seen_at = now() - interval '7 days'")
        listener.wait_for_end()


def test_a_reader_who_is_gone_is_forgotten(web, cast):
    for _ in range(3):
        listening(web, cast.vip).close()
    with listening(web, cast.vip) as listener:
        notify(cast.subscriber, cast.general)
        listener.wait_for_unread(1)


def test_of_one_person_the_oldest_of_too_many_streams_ends(web, cast):
    listeners = [listening(web, cast.vip) for _ in range(21)]
    try:
        listeners[0].wait_for_end()
        assert not any(listener.ended.is_set() for listener in listeners[1:])
    finally:
        for listener in listeners:
            listener.close()


# --- what may go wrong


def test_while_redis_is_away_and_after_it_nothing_is_lost(web, gate, cast):
    with listening(web, cast.vip) as listener:
        gate.shut()
        try:
            during = post_and_notify(cast.subscriber, cast.general, "gold")  # nobody announces it
            listener.wait_for_unread(1)
            with listening(web, cast.subscriber) as other:
                assert other.unread() == 0
        finally:
            gate.open()
        after = notify(cast.subscriber, cast.general)
        listener.wait_for_unread(2)
        assert listener.messages() == [during, after]


def test_an_announcement_that_is_lost_does_no_harm(web, cast):
    with listening(web, cast.vip) as listener:
        post_and_notify(cast.subscriber, cast.general, "gold")  # and no word of it
        listener.wait_for_unread(1)


@pytest.mark.parametrize("announced", ["5", '{"message_id": "x"}', '{"user_id": []}', "no JSON", "null", '{"new": 1}'])
def test_an_announcement_that_nobody_understands_stops_nothing(web, cast, redis, announced):
    """As of a later version, while both are at work."""
    with listening(web, cast.vip) as listener:
        redis.publish(publish.live_channel(), announced)
        notify(cast.subscriber, cast.general)
        listener.wait_for_unread(1)
        with listening(web, cast.subscriber) as other:
            assert other.unread() == 0


def test_a_reader_who_cannot_be_looked_up_stops_nobody(cast):
    """A fault of Belfry's own that one reader meets: they are let go, each time, and all others go on."""
    with a_web_process(through=("tests.faults.poisoned",)) as web, listening(web, cast.vip) as listener:
        with Listener(web, cast.admin.token, since="1-7777:7777:") as poisoned:
            poisoned.wait_for_end()
        notify(cast.subscriber, cast.general)
        listener.wait_for_unread(1)
        assert not listener.ended.is_set()
        with listening(web, cast.subscriber):
            pass


def test_while_the_database_is_away_streams_wait(web, cast):
    with listening(web, cast.vip) as listener, psycopg.connect(settings.database_url, autocommit=True) as outside:
        for _ in range(5):
            outside.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database() AND application_name = 'belfry'"
            )
            publish.publish(notified=True)
            time.sleep(0.05)
        db.close_all()
        db.connect(reuse_if_open=True)
        message_id = notify(cast.subscriber, cast.general)
        listener.wait_for_unread(1)
        assert listener.messages() == [message_id]
        assert not listener.ended.is_set()


def test_who_does_not_read_is_cut_off_and_goes_on_later(web, cast):
    """The kernel and UNSENT_BYTES hold some 700 notifications. What is more is found for a reader who takes them."""
    listener = listening(web, cast.vip)
    listener.close()
    with a_connection(web, cast.vip, f"Last-Event-ID: {listener.last_id()}", receives=4096) as deaf:
        assert deaf.recv(100).startswith(b"HTTP/1.1 200 OK")
        message_ids = at_once(cast.subscriber, cast.general, cast.vip, 900)
        publish.publish(notified=True)
        with listening(web, cast.subscriber) as other:
            notify(cast.vip, cast.general)
            other.wait_for_unread(1)  # nobody waits for the deaf one
            message_ids.append(notify(cast.subscriber, cast.general))
            notify(cast.vip, cast.general)
            other.wait_for_unread(2)
        received = rest_of(deaf)
    assert received.count(b"event: notification") < 900
    with listening(web, cast.vip, since=listener.last_id()) as again:
        assert again.messages() == message_ids


def test_who_missed_very_much_reads_the_inbox(web, cast):
    listener = listening(web, cast.vip)
    listener.close()
    at_once(cast.subscriber, cast.general, cast.vip, 1_001)
    with listening(web, cast.vip, since=listener.last_id()) as again:
        assert again.kinds() == ["reset", "unread"]
        assert again.unread() == 1_001
        message_id = notify(cast.subscriber, cast.general)
        again.wait_for_unread(1_002)
        assert again.messages() == [message_id]


@contextmanager
def a_connection(web: str, person, *headers: str, version: str = "1.1", receives: int = 0) -> Iterator[socket.socket]:
    """One that has asked for the stream, and of which nothing is read yet."""
    place = urlsplit(web)
    with socket.socket() as connection:
        if receives:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        connection.settimeout(30)
        connection.connect((place.hostname, place.port))
        asked = [f"GET /api/notifications/stream HTTP/{version}", "Host: x", *headers]
        lines = [*asked, f"Authorization: Bearer {person.token}", ""]
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the other side ends it."""
    received = b""
    with suppress(ConnectionResetError):
        while some := connection.recv(65536):
            received += some
    return received


def at_once(author, channel_id: int, reader, number: int) -> list[int]:
    """So many messages, of which one transaction notifies one reader; their ids."""
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
        {"channel_id": channel_id, "author_id": author.id, "user_id": reader.id, "number": number},
    ).fetchall()
    return message_ids


def test_an_old_proxy_gets_the_stream_without_chunks(web, cast):
    """nginx asks by HTTP/1.0 unless notified otherwise."""
    with a_connection(web, cast.vip, version="1.0") as connection, connection.makefile("rb") as lines:
        head = list(iter(lines.readline, b"\r\n"))
        assert head[0].startswith(b"HTTP/1.0 200") or head[0].startswith(b"HTTP/1.1 200")
        assert not any(line.lower().startswith(b"transfer-encoding") for line in head)
        assert lines.readline().startswith(b"retry: ")
        assert lines.readline() == b"\n"
        assert lines.readline() == b"event: unread\n"


def test_the_head_alone_opens_no_stream(web, cast):
    connection = HTTPConnection(urlsplit(web).netloc, timeout=30)
    connection.request("HEAD", "/api/notifications/stream", headers={"Authorization": f"Bearer {cast.vip.token}"})
    with closing(connection), connection.getresponse() as answer:
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert answer.read() == b""


def test_another_server_than_gunicorn_says_that_it_cannot(api, cast):
    answer = api(cast.vip).get("/api/notifications/stream")
    assert (answer.status_code, answer.json["code"]) == (501, "not_implemented")
    assert "gunicorn" in answer.json["detail"]


def test_a_process_that_is_full_says_so(cast):
    with a_web_process(MAX_STREAMS_PER_PROCESS="1") as small, listening(small, cast.vip):
        refused = Listener(small, cast.admin.token)
        assert (refused.answer.status, refused.problem["code"]) == (503, "unavailable")
        assert refused.answer.headers["Retry-After"]


def test_open_streams_do_not_hold_up_the_end_of_the_process(cast):
    began = None
    with a_web_process() as short_lived, listening(short_lived, cast.vip) as listener:
        began = time.monotonic()
    listener.wait_for_end()
    assert time.monotonic() - began < 20  # gunicorn would wait 25 for a request


def test_all_streams_take_one_thread(web, cast):
    """So does the answer to everything else beside them, on as many threads as ever."""
    listeners = [listening(web, person) for person in (cast.vip, cast.admin, cast.moderator) for _ in range(15)]
    try:
        answers = [Listener(web, cast.lapsed.token).answer.status for _ in range(20)]
        assert answers == [403] * 20
        notify(cast.subscriber, cast.general)
        for listener in listeners:
            listener.wait_for_unread(1)
    finally:
        for listener in listeners:
            listener.close()
