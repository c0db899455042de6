"""A drill: 1,000 streams that reconnect at once, and an attacker with old cursors; what other clients notice.

The clients are members of a server of 10,000. They were disconnected for an hour of 100 messages a minute; then for ten
seconds, as in a deployment. Meanwhile other clients are connected, and a message is posted every half second. The
attacker opens 20 streams at once, and then 14 a second, with cursors of long ago: forged ones, and genuine ones.
"""

import asyncio
import re
import time
from typing import Any
from urllib.parse import urlsplit

import psycopg

from tools.bench.measuring import create_subscriber_tokens
from tools.dev import say
from tools.dev.client import Client
from tools.dev.harness import Harness

MEMBERS = 10_000
CLIENTS = 1_000
CONNECTED = 20  # clients that stay connected, and wait for the messages that are posted meanwhile
AN_HOUR, TEN_SECONDS = 6_000, 17  # messages
AT_ONCE, A_SECOND, ATTACK_SECONDS = 20, 14, 10
POST_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0
FORGED = "{taken}-3:3:"  # all messages of the day
TARGET = 2.0  # seconds

_INSERT_SQL = """
    WITH posted AS (
        INSERT INTO message (channel_id, author_id, content) VALUES (%(channel_id)s, %(author_id)s, 'gold') RETURNING id
    ),
    notified AS (
        INSERT INTO notification (user_id, message_id, reason)
        SELECT user_id, posted.id, 'message' FROM posted, unnest(%(user_ids)s::bigint[]) AS user_id
    )
    INSERT INTO notification_log (message_ids) SELECT ARRAY[id] FROM posted
"""


class Stream:
    """One client's stream: the id of the last event, and the seconds until the first event, count and `reset`."""

    def __init__(self, token: str, cursor: str = "") -> None:
        self.token, self.cursor = token, cursor
        self.status = 0
        self.first: dict[str, float] = {}
        self.notifications: dict[int, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._began = asyncio.Event()

    def open(self, address: tuple[str, int]) -> None:
        self._task = asyncio.create_task(self._read(address))

    async def begun(self) -> None:
        """Wait until the first count arrived, or the stream was refused or ended."""
        await self._began.wait()

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, address: tuple[str, int]) -> None:
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
        try:
            since = f"Last-Event-ID: {self.cursor}\r\n" if self.cursor else ""
            writer.write(
                "GET /api/notifications/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                f"Authorization: Bearer {self.token}\r\n{since}\r\n".encode()
            )
            self.status = int((await reader.readline()).split()[1])
            event = b""
            while self.status == 200 and (line := await reader.readline()):
                now = time.perf_counter()
                if line.startswith(b"event: "):
                    event = line[7:-1]
                    self.first.setdefault("event", now - started)
                    self.first.setdefault(event.decode(), now - started)
                elif line.startswith(b"id: "):
                    self.cursor = line[4:-1].decode()
                elif line.startswith(b"data: ") and event == b"notification":
                    found = re.search(rb'"message_id": (\d+)', line)
                    self.notifications.setdefault(int(found[1]) if found else 0, now)
                elif line.startswith(b"data: ") and event == b"unread":
                    self._began.set()
        finally:
            self._began.set()
            writer.close()


def reconnect(harness: Harness, _: int, __: int) -> dict[str, Any]:
    """1,000 streams reconnect at once after an hour of messages, and after ten seconds; then an attacker opens streams
    with old cursors. Seconds from opening to the first event, and until connected clients receive a message."""
    return asyncio.run(_reconnect(harness))


async def _reconnect(harness: Harness) -> dict[str, Any]:
    server = await asyncio.to_thread(harness.create_server, MEMBERS)
    drill = _Drill(harness, server["channel_ids"][0])
    found: dict[str, Any] = {"clients": CLIENTS, "members": MEMBERS}
    with harness.workers(1):
        connected = await drill.open_streams(drill.tokens[CLIENTS : CLIENTS + CONNECTED])
        clients = await drill.open_streams(drill.tokens[:CLIENTS])
        genuine: list[str] = []
        for name, messages in (("hour", AN_HOUR), ("ten_seconds", TEN_SECONDS)):
            await drill.close(clients)
            say(f"  {messages:,} messages")
            for first in range(0, messages, -(-messages // AT_ONCE)):
                await asyncio.to_thread(drill.insert_messages, min(-(-messages // AT_ONCE), messages - first))
                if name == "hour":
                    genuine.append(await drill.current_cursor())
            await asyncio.to_thread(drill.settle)
            waiting = asyncio.create_task(drill.delays(connected))
            clients = [Stream(client.token, client.cursor) for client in clients]
            for client in clients:
                client.open(drill.address)
            await asyncio.wait([asyncio.create_task(client.begun()) for client in clients], timeout=TIMEOUT_SECONDS)
            drill.enough.set()
            found[name] = {**_waiting_times(clients), "connected_max_s": await waiting}
            say(f"  {name}: {found[name]}")
        found["attack"] = {}
        forged = [FORGED.format(taken=int(time.time()) - number) for number in range(AT_ONCE)]
        for name, cursors in (("forged", forged), ("genuine", genuine)):
            found["attack"][name] = await drill.attack(connected, cursors)
            say(f"  attack, {name}: {found['attack'][name]}")
        await drill.close([*clients, *connected])
    drill.delete_messages()
    found["reached"] = all(
        figure <= TARGET
        for one in (found["hour"], found["ten_seconds"], *found["attack"].values())
        for name, figure in one.items()
        if name.endswith("_max_s")
    )
    return found


class _Drill:
    def __init__(self, harness: Harness, channel_id: int) -> None:
        place = urlsplit(harness.address)
        self.address = (place.hostname or "", place.port or 80)
        self.channel_id = channel_id
        self.database = psycopg.connect(harness.env["DATABASE_URL"], autocommit=True)
        self.database.execute("SET synchronous_commit = off")
        self.author_id = harness.admin.id
        self.poster = Client(harness.address, harness.client.token)
        self.user_ids, self.tokens = create_subscriber_tokens(channel_id, CLIENTS + CONNECTED + 1)
        self.enough = asyncio.Event()

    def delete_messages(self) -> None:
        """Delete the messages: they have no runs, which `verify` would report."""
        for table in ("notification_log", "notification", "message CASCADE"):
            self.database.execute(f"TRUNCATE {table}")
        self.database.close()

    def insert_messages(self, number: int) -> None:
        """Insert messages that the clients and the attacker are notified of, each in its own transaction."""
        parameters = {
            "channel_id": self.channel_id,
            "author_id": self.author_id,
            "user_ids": self.user_ids[:CLIENTS] + self.user_ids[-1:],
        }
        for _ in range(number):
            self.database.execute(_INSERT_SQL, parameters)

    def settle(self) -> None:
        """Do what Belfry and autovacuum would have done during the hour, so that they do not during a measurement."""
        from belfry.core import partitions
        from belfry.core.db import db

        with db.connection_context():
            partitions.maintain()
            for name in partitions.partitions_missing_unread_index():
                partitions.create_unread_index(name)
        self.database.execute("VACUUM (ANALYZE) notification, message, notification_log")
        self.database.execute("CHECKPOINT")

    async def open_streams(self, tokens: list[str]) -> list[Stream]:
        """Open streams, a few at a time, and wait until they have begun."""
        streams = [Stream(token) for token in tokens]
        for first in range(0, len(streams), 50):
            for stream in streams[first : first + 50]:
                stream.open(self.address)
            for stream in streams[first : first + 50]:
                await stream.begun()
                assert stream.status == 200, stream.status
        return streams

    async def close(self, streams: list[Stream]) -> None:
        for stream in streams:
            await stream.close()

    async def current_cursor(self) -> str:
        """Return a genuine cursor of the attacker."""
        [stream] = await self.open_streams(self.tokens[-1:])
        await stream.close()
        return stream.cursor

    async def delays(self, connected: list[Stream]) -> float:
        """Post every half second until `enough` is set; returns the longest wait of a connected client, in seconds."""
        self.enough.clear()
        posted: dict[int, float] = {}
        while not self.enough.is_set() or len(posted) < 2:
            at = time.perf_counter()
            body = {"channel_id": self.channel_id, "content": "silver"}
            message = await asyncio.to_thread(self.poster.post, "/api/messages", body)
            posted[message["id"]] = at
            await asyncio.sleep(POST_SECONDS)
        deadline = time.perf_counter() + TIMEOUT_SECONDS
        while any(id_ not in stream.notifications for id_ in posted for stream in connected):
            if time.perf_counter() > deadline:
                break
            await asyncio.sleep(0.05)
        return round(
            max(
                stream.notifications.get(id_, deadline) - at for id_, at in posted.items() for stream in connected
            ),
            2,
        )

    async def attack(self, connected: list[Stream], cursors: list[str]) -> dict[str, Any]:
        """Open streams of one user with these cursors: all at once; then A_SECOND."""
        found: dict[str, Any] = {}
        for name, number in (("at_once", len(cursors)), ("a_second", A_SECOND * ATTACK_SECONDS)):
            waiting = asyncio.create_task(self.delays(connected))
            streams = []
            for turn in range(number):
                streams.append(Stream(self.tokens[-1], cursors[turn % len(cursors)]))
                streams[-1].open(self.address)
                await asyncio.sleep(0 if name == "at_once" else 1 / A_SECOND)
            if name == "at_once":
                await asyncio.sleep(3)
            self.enough.set()
            found[f"{name}_connected_max_s"] = await waiting
            found[f"{name}_refused"] = sum(stream.status == 429 for stream in streams)
            await self.close(streams)
        return found


def _waiting_times(streams: list[Stream]) -> dict[str, Any]:
    firsts = sorted(stream.first.get("event", TIMEOUT_SECONDS) for stream in streams)
    counts = sorted(stream.first.get("unread", TIMEOUT_SECONDS) for stream in streams)
    return {
        "refused": sum(stream.status not in (0, 200) for stream in streams),
        f"without_a_count_after_{TIMEOUT_SECONDS:.0f}_s": sum("unread" not in stream.first for stream in streams),
        "first_event_p50_s": round(firsts[len(firsts) // 2], 2),
        "first_event_max_s": round(firsts[-1], 2),
        "count_p50_s": round(counts[len(counts) // 2], 2),
        "count_last_s": round(counts[-1], 2),
        "resets": sum("reset" in stream.first for stream in streams),
    }
