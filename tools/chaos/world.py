"""Who is in the play, and what of it is known to the audit: members, their wishes and when they changed them.

`small` has every kind of member; some of them change what they want to hear, and read, all the time. `large` needs
several slices, and nobody in it changes anything: what it is notified can be predicted to the last decision.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from belfry.cli import seeding
from belfry.core.db import fetch_all
from belfry.identity import users
from belfry.identity.tokens import create_token
from tests.oracle import Member, Preference, Subscription

SMALL_MEMBERS, LARGE_MEMBERS = 60, 1_500
CHANGING = 8


@dataclass
class Server:
    """`members` as they are in the beginning; `names` by id."""

    id: int
    channels: dict[str, int]
    members: dict[int, Member]
    names: dict[int, str]
    vip_role: int


Wish = Preference | Subscription | None


@dataclass
class Change:
    """What somebody wants to hear of a channel, or their subscription: from when it may have counted, and until
    when it may have counted still. Between a request and its answer nobody knows. `settled` is when the last of its
    attempts has surely been carried out, or never will be."""

    value: Wish
    since: float
    until: float = float("inf")
    attempts: int = 1
    settled: float = 0.0


LATE_SECONDS = 45.0
"""An attempt whose client gave up may still be carried out, by a web process that was stopped and goes on."""

Matter = tuple[int, int | None]
"""(user id, channel id), or (user id, None) for the subscription."""


@dataclass
class World:
    small: Server
    large: Server
    admin: int
    tokens: dict[int, str]
    preferences: dict[Matter, Preference]
    changes: dict[Matter, list[Change]]
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def changing(self) -> list[int]:
        """Who changes their mind, and reads."""
        return sorted({user_id for user_id, _ in self.changes})

    @contextmanager
    def change(self, matter: Matter, value: Wish) -> Iterator[Change]:
        """Around the request that changes it, whose attempts are to be set: what was before, and settled when this
        began, counts no more after it."""
        new = Change(value, time.time(), settled=float("inf"))
        with self.lock:
            self.changes[matter].append(new)
        yield new
        now = time.time()
        with self.lock:
            new.settled = now + LATE_SECONDS if new.attempts > 1 else now
            for old in self.changes[matter][:-1]:
                if old.settled <= new.since:
                    old.until = min(old.until, now)

    def possible(self, matter: Matter, since: float, until: float) -> list[Wish]:
        """All that may have counted at some time of a period."""
        with self.lock:
            return [one.value for one in self.changes[matter] if one.since <= until and one.until >= since]

    def possible_members(
        self, server: Server, channel_id: int, user_id: int, since: float, until: float
    ) -> list[Member]:
        """Every state of a member that may have counted for a channel at some time of a period."""
        member = replace(server.members[user_id], preference=self.preferences.get((user_id, channel_id)))
        if (user_id, channel_id) not in self.changes:
            return [member]
        return [
            replace(member, preference=preference, subscription=subscription)
            for preference in self.possible((user_id, channel_id), since, until)
            for subscription in self.possible((user_id, None), since, until)
        ]


def make_world() -> World:
    """Two servers, an administrator in both, and tokens for all of the small one and some of the large one."""
    admin = users.create_user("admin", is_admin=True)
    small, large = _server(seeding.seed(SMALL_MEMBERS, 3)), _server(seeding.seed(LARGE_MEMBERS, 1))
    speakers = [user_id for user_id in large.members if _speaks(large.members[user_id])][:4]
    tokens = {
        user_id: create_token(users.find_user(user_id))[1]
        for user_id in sorted({*small.members, *speakers, admin.id})
    }
    preferences = {
        (found["user_id"], found["channel_id"]): Preference(found["level"], found["muted_until"])
        for found in fetch_all("SELECT channel_id, user_id, level, muted_until FROM preference")
    }
    changing = [user_id for user_id in small.members if user_id != admin.id][-CHANGING:]
    changes: dict[Matter, list[Change]] = {}
    for user_id in changing:
        changes[user_id, None] = [Change(small.members[user_id].subscription, 0)]
        for channel_id in small.channels.values():
            changes[user_id, channel_id] = [Change(preferences.get((user_id, channel_id)), 0)]
    return World(small, large, admin.id, tokens, preferences, changes)


def _speaks(member: Member) -> bool:
    return member.subscription is not None and member.subscription.status == "active"


def _server(seeded: dict) -> Server:
    server_id = seeded["server_id"]
    found = fetch_all(
        """
        SELECT u.id, u.username, u.is_admin, s.status, s.current_period_end,
            ARRAY(SELECT role_id FROM member_role r WHERE r.user_id = u.id AND r.server_id = m.server_id) AS roles
        FROM member m
        JOIN user_account u ON u.id = m.user_id
        LEFT JOIN subscription s ON s.user_id = u.id
        WHERE m.server_id = %(server_id)s
        ORDER BY u.id
        """,
        {"server_id": server_id},
    )
    members = {
        one["id"]: Member(
            admin=one["is_admin"],
            subscription=Subscription(one["status"], one["current_period_end"]) if one["status"] else None,
            roles=frozenset(one["roles"]),
        )
        for one in found
    }
    parameters = {"server_id": server_id}
    channels = fetch_all("SELECT id, name FROM channel WHERE server_id = %(server_id)s", parameters)
    (vip,) = fetch_all("SELECT id FROM role WHERE server_id = %(server_id)s AND name = 'vip'", parameters)
    return Server(
        id=server_id,
        channels={channel["name"]: channel["id"] for channel in channels},
        members=members,
        names={one["id"]: one["username"] for one in found},
        vip_role=vip["id"],
    )
