"""The load: people who post, edit, delete, read, and change their minds over HTTP, and do not take no for an answer."""

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.oracle import Preference, Subscription
from tools.chaos.world import Server, World

PATIENCE = 60.0  # seconds that one request is tried again
TIMEOUT = 6.0  # seconds for one answer: a web process may be stopped
AGAIN = (409, 429, 500, 503)


@dataclass
class Text:
    """One revision: its content, and whom it mentions."""

    content: str
    named: frozenset[int] = frozenset()
    named_roles: frozenset[int] = frozenset()
    everyone: bool = False


@dataclass
class Posted:
    """A message as its author knows it. `revisions` are by content, in order; `stragglers` those of which an attempt
    without an answer may still have been carried out after a later one."""

    id: int
    run_id: int
    server: Server
    channel_id: int
    author: int
    sent_at: float
    revisions: dict[str, Text]
    stragglers: set[str] = field(default_factory=set)
    deleted: bool = False


@dataclass
class Diary:
    """What the load has done, and what it has seen that must not be. `read`: (user id, message id), surely marked."""

    posted: list[Posted] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One person's browser: it asks again until it gets an answer that is one."""

    def __init__(self, address: str, token: str, diary: Diary) -> None:
        self._host = urlsplit(address).netloc
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self._diary = diary
        self.attempts = 0  # that the last request took

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON). Raises TimeoutError where nothing but silence and errors comes for PATIENCE seconds."""
        give_up = time.monotonic() + PATIENCE
        answered: object = None
        self.attempts = 0
        while time.monotonic() < give_up:
            self.attempts += 1
            try:
                answered = status, text = self._send_once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                answered = error
                self.close()
                time.sleep(0.1)
                continue
            if status == 500:
                self._diary.wrong.append(f"{method} {path} answered 500: {text[:300]!r}")
            if status not in AGAIN:
                return status, json.loads(text) if text else None
            time.sleep(0.2)
        raise TimeoutError(f"{method} {path}: {answered}")

    def _send_once(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {**self._headers, **named})
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None


class Load:
    """Threads that go on until they are asked to stop. What breaks in one is in `diary.wrong`."""

    def __init__(self, world: World, address: str, seed: int) -> None:
        self.world, self.diary = world, Diary()
        self._address, self._seed = address, seed
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """An author each in three channels, and one for all; a reader; somebody who changes their mind; an admin."""
        world, small = self.world, self.world.small
        steady = [user_id for user_id in small.members if user_id not in world.changing and user_id != world.admin]
        able = [user_id for user_id in steady if _active(small, user_id)]
        vips = [user_id for user_id in able if small.vip_role in small.members[user_id].roles]
        speakers = [user_id for user_id in world.large.members if user_id in world.tokens and user_id != world.admin]
        authors = [
            (small, "general", able[0], 0.6),
            (small, "vip", vips[0], 1.5),
            (small, "announcements", world.admin, 1.2),
            (world.large, "general", speakers[0], 2.0),
            (world.large, "general", world.admin, 3.0),
        ]
        for number, (server, channel, author, pause) in enumerate(authors):
            self._run(f"author {number}", lambda rng, a=(server, channel, author): self._post(rng, *a), pause)
        self._run("reader", self._read, 0.3)
        self._run("waverer", self._waver, 1.0)
        self._run("admin", self._administer, 2.0)

    def ask_to_stop(self) -> None:
        """Stop all threads after their current request."""
        self._stop.set()

    def at_work(self) -> list[str]:
        """Who has not ended."""
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _run(self, name: str, step: Callable[[random.Random], None], pause: float) -> None:
        rng = random.Random(f"{self._seed} {name}")

        def go_on() -> None:
            while not self._stop.wait(pause * rng.uniform(0.5, 1.5)):
                try:
                    step(rng)
                except Exception as error:  # anything at all that breaks is a finding
                    self.diary.wrong.append(f"{name}: {type(error).__name__}: {error}")

        thread = threading.Thread(target=go_on, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _client(self, user_id: int) -> Client:
        clients: dict[int, Client] = threading.current_thread().__dict__.setdefault("clients", {})
        if user_id not in clients:
            clients[user_id] = Client(self._address, self.world.tokens[user_id], self.diary)
        return clients[user_id]

    # What they do -----------------------------------------------------------------------------------------

    def _post(self, rng: random.Random, server: Server, channel: str, author: int) -> None:
        client, channel_id = self._client(author), server.channels[channel]
        text, key, sent_at = self._text(rng, server, author), f"{rng.getrandbits(64):016x}", time.time()
        body = {"channel_id": channel_id, "content": text.content}
        status, answer = client.send("POST", "/api/messages", body, Idempotency_Key=key)
        self._expect(status == 201, "POST", status, answer)
        revisions = {text.content: text}
        posted = Posted(answer["id"], answer["run"]["id"], server, channel_id, author, sent_at, revisions)
        with self.diary.lock:
            self.diary.posted.append(posted)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            self._stop.wait(rng.uniform(0, 0.5))
            text = self._text(rng, server, author)
            posted.revisions[text.content] = text
            status, answer = client.send("PATCH", f"/api/messages/{posted.id}", {"content": text.content})
            self._expect(status == 200, "PATCH", status, answer)
            if client.attempts > 1:
                posted.stragglers.add(text.content)
        if rng.random() < 0.12:
            self._stop.wait(rng.uniform(0, 0.5))
            posted.deleted = True
            status, answer = client.send("DELETE", f"/api/messages/{posted.id}")
            self._expect(status == 204 or (status == 404 and client.attempts > 1), "DELETE", status, answer)

    def _expect(self, right: bool, what: str, status: int, answer: Any) -> None:
        if not right:
            self.diary.wrong.append(f"{what} answered {status}: {answer}")

    def _text(self, rng: random.Random, server: Server, author: int) -> Text:
        """Some content that nobody else writes; only the admin can mention a role or everyone."""
        named = frozenset(rng.sample(sorted(server.members), rng.choice((0, 0, 1, 2, 5))))
        roles = frozenset({server.vip_role}) if rng.random() < 0.2 else frozenset()
        everyone = rng.random() < 0.1
        words = [f"#{rng.getrandbits(64):016x}", *(f"@{server.names[user_id]}" for user_id in sorted(named))]
        words += ["@vip"] if roles else []
        words += ["@everyone"] if everyone else []
        if author != self.world.admin:
            roles, everyone = frozenset(), False
        return Text(" ".join(words), named, roles, everyone)

    def _read(self, rng: random.Random) -> None:
        """Somebody looks through their inbox, and marks read what is on the page, or all."""
        reader = rng.choice(self.world.changing)
        client = self._client(reader)
        seen: list[int] = []
        cursor = ""
        for _ in range(rng.randint(1, 3)):
            status, page = client.send("GET", f"/api/notifications?unread=1&limit=20{cursor}")
            self._expect(status == 200, "GET", status, page)
            seen += [item["message_id"] for item in page["items"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
        if len(seen) != len(set(seen)):
            self.diary.wrong.append(f"user {reader} is shown the same message twice: {sorted(seen)}")
        what: dict[str, Any] = {"all": True} if rng.random() < 0.2 else {"ids": [f"{reader}-{id_}" for id_ in seen]}
        if what.get("ids") == []:
            return
        status, answer = client.send("POST", "/api/notifications/read", what)
        self._expect(status == 200, "POST of what is read", status, answer)
        if "ids" in what and answer["marked"] == len(seen):  # otherwise an edit may have taken one back before
            with self.diary.lock:
                self.diary.read += [(reader, message_id) for message_id in seen]

    def _waver(self, rng: random.Random) -> None:
        """Somebody wants to hear something else of a channel."""
        user_id = rng.choice(self.world.changing)
        small = self.world.small
        channel_id = rng.choice([small.channels["general"], small.channels["announcements"]])
        wish = Preference(rng.choice(("all", "all", "mentions", "none")))
        client, path = self._client(user_id), f"/api/channels/{channel_id}/preference"
        with self.world.change((user_id, channel_id), wish) as change:
            status, answer = client.send("PUT", path, {"level": wish.level})
            change.attempts = client.attempts
        self._expect(status == 200, "PUT", status, answer)

    def _administer(self, rng: random.Random) -> None:
        """Somebody's subscription ends, or begins again; and now and then a run is replayed."""
        client, user_id = self._client(self.world.admin), rng.choice(self.world.changing)
        paid = Subscription(rng.choice(("active", "canceled")))
        with self.world.change((user_id, None), paid) as change:
            status, answer = client.send("PUT", f"/api/users/{user_id}/subscription", {"status": paid.status})
            change.attempts = client.attempts
        self._expect(status == 200, "PUT", status, answer)
        with self.diary.lock:
            recent = [posted for posted in self.diary.posted[-30:] if posted.server is self.world.small]
        if recent:
            posted = rng.choice(recent)
            status, answer = client.send("POST", f"/api/runs/{posted.run_id}/replay", {"dry_run": False})
            right = status in (200, 202) or (status == 403 and posted.deleted)
            self._expect(right, "POST of a replay", status, answer)


def _active(server: Server, user_id: int) -> bool:
    subscription = server.members[user_id].subscription
    return subscription is not None and subscription.status == "active"
