"""`make drill ARGS="reconnect"`: what 1,000 streams that come back at once, and one attacker, cost everybody else.

The clients are members of a community of 10,000. They were away for an hour of 100 messages a minute; then for ten
seconds, as in a deployment. Meanwhile others are connected, and somebody posts a message every half second. The
attacker opens 20 streams at once, and then 14 a second, from positions of long ago: forged ones, and captured ones.

It uses nothing but HTTP and SQL of the product, so that it can be run beside another version.
"""

import asyncio
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

import psycopg

from tools.dev import say
from tools.dev.client import Client
from tools.dev.harness import Harness

MEMBERS = 10_000
CLIENTS = 1_000
CONNECTED = 20  # who stay, and wait for the messages that are posted meanwhile
AN_HOUR, TEN_SECONDS = 6_000, 17  # messages
AT_ONCE, A_SECOND, ATTACK_SECONDS = 20, 14, 10
POST_SECONDS = 0.5
PATIENCE = 60.0
FORGED = "{taken}-3:3:"  # everything of the whole day
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
    """One client's stream: the last event's id, and the seconds until its first event, count and `reset`."""

    def __init__(self, token: str, position: str = "") -> None:
        self.token, self.position = token, position
        self.status = 0
        self.first: dict[str, float] = {}
        self.notifications: dict[int, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._began = asyncio.Event()

    def open(self, address: tuple[str, int]) -> None:
        self._task = asyncio.create_task(self._read(address))

    async def begun(self) -> None:
        """Return when the first count has come, or the stream was refused or ended."""
        await self._began.wait()

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, address: tuple[str, int]) -> None:
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
        try:
            since = f"Last-Event-ID: {self.position}\r\n" if self.position else ""
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
                    self.position = line[4:-1].decode()
                elif line.startswith(b"data: ") and event == b"notification":
                    found = re.search(rb'"message_id": (\d+)', line)
                    self.notifications.setdefault(int(found[1]) if found else 0, now)
                elif line.startswith(b"data: ") and event == b"unread":
                    self._began.set()
        finally:
            self._began.set()
            writer.close()


def reconnect(harness: Harness, _: int, __: int) -> dict[str, Any]:
    """1,000 streams that come back at once after an hour of messages, and after ten seconds; then an attacker with
    positions of long ago. From opening to the first event, and what those who are connected wait for a message."""
    return asyncio.run(_reconnect(harness))


async def _reconnect(harness: Harness) -> dict[str, Any]:
    server = await asyncio.to_thread(harness.create_server, MEMBERS)
    drill = _Drill(harness, server["channel_ids"][0])
    found: dict[str, Any] = {"clients": CLIENTS, "members": MEMBERS}
    with harness.workers(1):
        connected = await drill.opened(drill.tokens[CLIENTS : CLIENTS + CONNECTED])
        clients = await drill.opened(drill.tokens[:CLIENTS])
        captured: list[str] = []
        for name, messages in (("hour", AN_HOUR), ("ten_seconds", TEN_SECONDS)):
            await drill.close(clients)
            say(f"  {messages:,} messages")
            for first in range(0, messages, -(-messages // AT_ONCE)):
                await asyncio.to_thread(drill.messages, min(-(-messages // AT_ONCE), messages - first))
                if name == "hour":
                    captured.append(await drill.position())
            await asyncio.to_thread(drill.settle)
            waiting = asyncio.create_task(drill.delays(connected))
            clients = [Stream(client.token, client.position) for client in clients]
            for client in clients:
                client.open(drill.address)
            await asyncio.wait([asyncio.create_task(client.begun()) for client in clients], timeout=PATIENCE)
            drill.enough.set()
            found[name] = {**_waited(clients), "connected_max_s": await waiting}
            say(f"  {name}: {found[name]}")
        found["attack"] = {}
        forged = [FORGED.format(taken=int(time.time()) - number) for number in range(AT_ONCE)]
        for name, positions in (("forged", forged), ("captured", captured)):
            found["attack"][name] = await drill.attack(connected, positions)
            say(f"  attack, {name}: {found['attack'][name]}")
        await drill.close([*clients, *connected])
    drill.forget()
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
        self.user_ids, self.tokens = self._people()
        self.enough = asyncio.Event()

    def _people(self) -> tuple[list[int], list[str]]:
        from belfry.identity.tokens import TOKEN_PREFIX, hash_token

        found = self.database.execute(
            "SELECT m.user_id FROM channel c JOIN member m ON m.server_id = c.server_id"
            " JOIN subscription s ON s.user_id = m.user_id AND s.status = 'active'"
            " AND COALESCE(s.current_period_end > now(), true)"
            " WHERE c.id = %(id)s AND NOT EXISTS (SELECT FROM preference p WHERE p.user_id = m.user_id)"
            " ORDER BY m.user_id LIMIT %(people)s",
            {"id": self.channel_id, "people": CLIENTS + CONNECTED + 1},
        ).fetchall()
        user_ids = [user_id for (user_id,) in found]
        tokens = [TOKEN_PREFIX + secrets.token_urlsafe(32) for _ in user_ids]
        self.database.execute(
            "INSERT INTO api_token (user_id, token_hash) SELECT * FROM unnest(%s::bigint[], %s::bytea[])",
            [user_ids, [hash_token(token) for token in tokens]],
        )
        return user_ids, tokens

    def forget(self) -> None:
        """Remove all of it: `verify` would look for the runs, which were never made."""
        for table in ("notification_log", "notification", "message CASCADE"):
            self.database.execute(f"TRUNCATE {table}")
        self.database.close()

    def messages(self, number: int) -> None:
        """So many messages, notified to the clients and the attacker, each in a transaction of its own."""
        parameters = {
            "channel_id": self.channel_id,
            "author_id": self.author_id,
            "user_ids": self.user_ids[:CLIENTS] + self.user_ids[-1:],
        }
        for _ in range(number):
            self.database.execute(_INSERT_SQL, parameters)

    def settle(self) -> None:
        """Do what Belfry and autovacuum would have done during the hour, so that it is not done while we measure."""
        from belfry.core import partitions
        from belfry.core.db import db

        with db.connection_context():
            partitions.maintain()
            for name in partitions.partitions_missing_unread_index():
                partitions.create_unread_index(name)
        self.database.execute("VACUUM (ANALYZE) notification, message, notification_log")
        self.database.execute("CHECKPOINT")

    async def opened(self, tokens: list[str]) -> list[Stream]:
        """Streams that have begun, opened a few at a time."""
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

    async def position(self) -> str:
        """A genuine one of the attacker's."""
        [stream] = await self.opened(self.tokens[-1:])
        await stream.close()
        return stream.position

    async def delays(self, connected: list[Stream]) -> float:
        """Post every half second until it is enough; the longest that a connected client waited for one, in seconds."""
        self.enough.clear()
        posted: dict[int, float] = {}
        while not self.enough.is_set() or len(posted) < 2:
            at = time.perf_counter()
            body = {"channel_id": self.channel_id, "content": "silver"}
            message = await asyncio.to_thread(self.poster.post, "/api/messages", body)
            posted[message["id"]] = at
            await asyncio.sleep(POST_SECONDS)
        give_up = time.perf_counter() + PATIENCE
        while any(id_ not in stream.notifications for id_ in posted for stream in connected):
            if time.perf_counter() > give_up:
                break
            await asyncio.sleep(0.05)
        return round(
            max(
                stream.notifications.get(id_, give_up) - at for id_, at in posted.items() for stream in connected
            ),
            2,
        )

    async def attack(self, connected: list[Stream], positions: list[str]) -> dict[str, Any]:
        """One person's streams from these positions: all at once; then some a second."""
        found: dict[str, Any] = {}
        for name, number in (("at_once", len(positions)), ("a_second", A_SECOND * ATTACK_SECONDS)):
            waiting = asyncio.create_task(self.delays(connected))
            streams = []
            for turn in range(number):
                streams.append(Stream(self.tokens[-1], positions[turn % len(positions)]))
                streams[-1].open(self.address)
                await asyncio.sleep(0 if name == "at_once" else 1 / A_SECOND)
            if name == "at_once":
                await asyncio.sleep(3)
            self.enough.set()
            found[f"{name}_connected_max_s"] = await waiting
            found[f"{name}_refused"] = sum(stream.status == 429 for stream in streams)
            await self.close(streams)
        return found


def _waited(streams: list[Stream]) -> dict[str, Any]:
    firsts = sorted(stream.first.get("event", PATIENCE) for stream in streams)
    counts = sorted(stream.first.get("unread", PATIENCE) for stream in streams)
    return {
        "refused": sum(stream.status not in (0, 200) for stream in streams),
        f"without_a_count_after_{PATIENCE:.0f}_s": sum("unread" not in stream.first for stream in streams),
        "first_event_p50_s": round(firsts[len(firsts) // 2], 2),
        "first_event_max_s": round(firsts[-1], 2),
        "count_p50_s": round(counts[len(counts) // 2], 2),
        "count_last_s": round(counts[-1], 2),
        "resets": sum("reset" in stream.first for stream in streams),
    }
