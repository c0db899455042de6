"""The servers and users of a chaos run, and when their settings changed, so that the audit can predict decisions.

`small` has every kind of member; CHANGING of them read and change settings all the time. `large` needs several slices,
and no setting in it changes: every decision can be predicted exactly.
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
    """`members` have the initial settings; `usernames` are by user id."""

    id: int
    channels: dict[str, int]
    members: dict[int, Member]
    usernames: dict[int, str]
    vip_role: int


Setting = Preference | Subscription | None


@dataclass
class Change:
    """A value of a setting, and the period in which it may have been in effect.

    It is unknown when it takes effect between the request and its response. `settled` is the time after which none of
    the request's attempts can still be carried out.
    """

    value: Setting
    since: float
    until: float = float("inf")
    attempts: int = 1
    settled: float = 0.0


LATE_SECONDS = 45.0
"""How long after a time-out an attempt may be carried out, by a web process that was stopped."""

SettingKey = tuple[int, int | None]
"""(user id, channel id), or (user id, None) for the subscription."""


@dataclass
class World:
    small: Server
    large: Server
    admin: int
    tokens: dict[int, str]
    preferences: dict[SettingKey, Preference]
    changes: dict[SettingKey, list[Change]]
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def changing_users(self) -> list[int]:
        """The users who read and change settings."""
        return sorted({user_id for user_id, _ in self.changes})

    @contextmanager
    def change(self, key: SettingKey, value: Setting) -> Iterator[Change]:
        """Record a change; send the request inside the block, and set `attempts`. Afterwards no earlier value that was
        settled before is in effect."""
        new = Change(value, time.time(), settled=float("inf"))
        with self.lock:
            self.changes[key].append(new)
        yield new
        now = time.time()
        with self.lock:
            new.settled = now + LATE_SECONDS if new.attempts > 1 else now
            for old in self.changes[key][:-1]:
                if old.settled <= new.since:
                    old.until = min(old.until, now)

    def possible_settings(self, key: SettingKey, since: float, until: float) -> list[Setting]:
        """Return the values that may have been in effect at some time of a period."""
        with self.lock:
            return [one.value for one in self.changes[key] if one.since <= until and one.until >= since]

    def possible_members(
        self, server: Server, channel_id: int, user_id: int, since: float, until: float
    ) -> list[Member]:
        """Return the states that a member may have had in a channel at some time of a period."""
        member = replace(server.members[user_id], preference=self.preferences.get((user_id, channel_id)))
        if (user_id, channel_id) not in self.changes:
            return [member]
        return [
            replace(member, preference=preference, subscription=subscription)
            for preference in self.possible_settings((user_id, channel_id), since, until)
            for subscription in self.possible_settings((user_id, None), since, until)
        ]


def make_world() -> World:
    """Create both servers, an administrator of both, and tokens for all users of `small` and some of `large`."""
    admin = users.create_user("admin", is_admin=True)
    small, large = _server(seeding.seed(SMALL_MEMBERS, 3)), _server(seeding.seed(LARGE_MEMBERS, 1))
    authors = [user_id for user_id in large.members if _may_post(large.members[user_id])][:4]
    tokens = {
        user_id: create_token(users.find_user(user_id))[1]
        for user_id in sorted({*small.members, *authors, admin.id})
    }
    preferences = {
        (found["user_id"], found["channel_id"]): Preference(found["level"], found["muted_until"])
        for found in fetch_all("SELECT channel_id, user_id, level, muted_until FROM preference")
    }
    changing = [user_id for user_id in small.members if user_id != admin.id][-CHANGING:]
    changes: dict[SettingKey, list[Change]] = {}
    for user_id in changing:
        changes[user_id, None] = [Change(small.members[user_id].subscription, 0)]
        for channel_id in small.channels.values():
            changes[user_id, channel_id] = [Change(preferences.get((user_id, channel_id)), 0)]
    return World(small, large, admin.id, tokens, preferences, changes)


def _may_post(member: Member) -> bool:
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
        usernames={one["id"]: one["username"] for one in found},
        vip_role=vip["id"],
    )
