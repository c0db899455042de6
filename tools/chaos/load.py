"""The load: users who post, edit, delete, read and change settings over HTTP, and repeat requests that fail."""

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

RETRY_SECONDS = 60.0  # for which a request is repeated
RESPONSE_SECONDS = 6.0  # for one response: the web process may be stopped
RETRY_STATUSES = (409, 429, 500, 503)


@dataclass
class Revision:
    """A content of a message, and the ids of the users and roles that it mentions."""

    content: str
    mentioned_users: frozenset[int] = frozenset()
    mentioned_roles: frozenset[int] = frozenset()
    everyone: bool = False


@dataclass
class PostedMessage:
    """A message as its author knows it. `revisions` are by content, in order. `late_revisions` took several attempts:
    one without a response may have been carried out after a later edit."""

    id: int
    run_id: int
    server: Server
    channel_id: int
    author: int
    sent_at: float
    revisions: dict[str, Revision]
    late_revisions: set[str] = field(default_factory=set)
    deleted: bool = False


@dataclass
class History:
    """What the load did, and the errors that it saw. `read`: (user id, message id), surely marked."""

    posted: list[PostedMessage] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """An HTTP client that repeats a request until it gets a response that is not a temporary error."""

    def __init__(self, address: str, token: str, history: History) -> None:
        self._host = urlsplit(address).netloc
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self._history = history
        self.attempts = 0  # that the last request took

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return (status, JSON). Raises TimeoutError after RETRY_SECONDS without such a response."""
        deadline = time.monotonic() + RETRY_SECONDS
        result: object = None
        self.attempts = 0
        while time.monotonic() < deadline:
            self.attempts += 1
            try:
                result = status, text = self._send_once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                result = error
                self.close()
                time.sleep(0.1)
                continue
            if status == 500:
                self._history.errors.append(f"{method} {path} answered 500: {text[:300]!r}")
            if status not in RETRY_STATUSES:
                return status, json.loads(text) if text else None
            time.sleep(0.2)
        raise TimeoutError(f"{method} {path}: {result}")

    def _send_once(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, timeout=RESPONSE_SECONDS)
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
    """Threads that send requests until `stop`. Exceptions in them are in `history.errors`."""

    def __init__(self, world: World, address: str, seed: int) -> None:
        self.world, self.history = world, History()
        self._address, self._seed = address, seed
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start five authors, a reader, a user who changes preferences, and an administrator."""
        world, small = self.world, self.world.small
        steady = small.members.keys() - {*world.changing_users, world.admin}
        able = [user_id for user_id in small.members if user_id in steady and _is_active(small, user_id)]
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
        self._run("preferences", self._change_preference, 1.0)
        self._run("admin", self._administer, 2.0)

    def stop(self) -> None:
        """Stop all threads after their current request."""
        self._stop.set()

    def running_threads(self) -> list[str]:
        """Return the names of the threads that have not ended."""
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _run(self, name: str, step: Callable[[random.Random], None], pause: float) -> None:
        rng = random.Random(f"{self._seed} {name}")

        def repeat_step() -> None:
            while not self._stop.wait(pause * rng.uniform(0.5, 1.5)):
                try:
                    step(rng)
                except Exception as error:  # every exception is a finding
                    self.history.errors.append(f"{name}: {type(error).__name__}: {error}")

        thread = threading.Thread(target=repeat_step, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _client(self, user_id: int) -> Client:
        clients: dict[int, Client] = threading.current_thread().__dict__.setdefault("clients", {})
        if user_id not in clients:
            clients[user_id] = Client(self._address, self.world.tokens[user_id], self.history)
        return clients[user_id]

    # Requests ---------------------------------------------------------------------------------------------

    def _post(self, rng: random.Random, server: Server, channel: str, author: int) -> None:
        client, channel_id = self._client(author), server.channels[channel]
        revision, key, sent_at = self._revision(rng, server, author), f"{rng.getrandbits(64):016x}", time.time()
        body = {"channel_id": channel_id, "content": revision.content}
        status, answer = client.send("POST", "/api/messages", body, Idempotency_Key=key)
        self._expect(status == 201, "POST", status, answer)
        revisions = {revision.content: revision}
        posted = PostedMessage(answer["id"], answer["run"]["id"], server, channel_id, author, sent_at, revisions)
        with self.history.lock:
            self.history.posted.append(posted)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            self._stop.wait(rng.uniform(0, 0.5))
            revision = self._revision(rng, server, author)
            posted.revisions[revision.content] = revision
            status, answer = client.send("PATCH", f"/api/messages/{posted.id}", {"content": revision.content})
            self._expect(status == 200, "PATCH", status, answer)
            if client.attempts > 1:
                posted.late_revisions.add(revision.content)
        if rng.random() < 0.12:
            self._stop.wait(rng.uniform(0, 0.5))
            posted.deleted = True
            status, answer = client.send("DELETE", f"/api/messages/{posted.id}")
            self._expect(status == 200 or (status == 404 and client.attempts > 1), "DELETE", status, answer)

    def _expect(self, correct: bool, request: str, status: int, answer: Any) -> None:
        if not correct:
            self.history.errors.append(f"{request} answered {status}: {answer}")

    def _revision(self, rng: random.Random, server: Server, author: int) -> Revision:
        """Return a unique content with random mentions; only the admin can mention a role or everyone."""
        users = frozenset(rng.sample(sorted(server.members), rng.choice((0, 0, 1, 2, 5))))
        roles = frozenset({server.vip_role}) if rng.random() < 0.2 else frozenset()
        everyone = rng.random() < 0.1
        words = [f"#{rng.getrandbits(64):016x}", *(f"@{server.usernames[user_id]}" for user_id in sorted(users))]
        words += ["@vip"] if roles else []
        words += ["@everyone"] if everyone else []
        if author != self.world.admin:
            roles, everyone = frozenset(), False
        return Revision(" ".join(words), users, roles, everyone)

    def _read(self, rng: random.Random) -> None:
        """Read some pages of a user's inbox, and mark what they show, or everything, as read."""
        reader = rng.choice(self.world.changing_users)
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
            self.history.errors.append(f"user {reader} sees the same message twice: {sorted(seen)}")
        body: dict[str, Any] = {"all": True} if rng.random() < 0.2 else {"ids": [f"{reader}-{id_}" for id_ in seen]}
        if body.get("ids") == []:
            return
        status, answer = client.send("POST", "/api/notifications/read", body)
        self._expect(status == 200, "POST of read notifications", status, answer)
        if "ids" in body and answer["marked"] == len(seen):  # otherwise an edit may have retracted one before
            with self.history.lock:
                self.history.read += [(reader, message_id) for message_id in seen]

    def _change_preference(self, rng: random.Random) -> None:
        """Change a user's preference for a channel."""
        user_id = rng.choice(self.world.changing_users)
        small = self.world.small
        channel_id = rng.choice([small.channels["general"], small.channels["announcements"]])
        setting = Preference(rng.choice(("all", "all", "mentions", "none")))
        client, path = self._client(user_id), f"/api/channels/{channel_id}/preference"
        with self.world.change((user_id, channel_id), setting) as change:
            status, answer = client.send("PUT", path, {"level": setting.level})
            change.attempts = client.attempts
        self._expect(status == 200, "PUT", status, answer)

    def _administer(self, rng: random.Random) -> None:
        """End or renew a user's subscription, and replay a recent run."""
        client, user_id = self._client(self.world.admin), rng.choice(self.world.changing_users)
        paid = Subscription(rng.choice(("active", "canceled")))
        with self.world.change((user_id, None), paid) as change:
            status, answer = client.send("PUT", f"/api/users/{user_id}/subscription", {"status": paid.status})
            change.attempts = client.attempts
        self._expect(status == 200, "PUT", status, answer)
        with self.history.lock:
            recent = [posted for posted in self.history.posted[-30:] if posted.server is self.world.small]
        if recent:
            posted = rng.choice(recent)
            status, answer = client.send("POST", f"/api/runs/{posted.run_id}/replay", {"dry_run": False})
            self._expect(status in (200, 202) or (status == 403 and posted.deleted), "POST of a replay", status, answer)


def _is_active(server: Server, user_id: int) -> bool:
    subscription = server.members[user_id].subscription
    return subscription is not None and subscription.status == "active"
