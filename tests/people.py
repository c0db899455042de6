"""The cast of the tests: users, channels and roles, and a client of the API for one user.

- admin (ada): an admin without a subscription, in the server.
- moderator (moira): an active subscriber in the server, with the role of moderators.
- subscriber (sam): an active subscriber in the server.
- vip (vera): a trialing subscriber in the server, with the role that opens the private channel.
- lapsed (lars): in the server, with a canceled subscription.
- stranger (stan): an active subscriber who is not in the server and has no access to it.

Channels: general (open), announcements (open; only admins post), vault (private; opened by the role vip).
"""

import re
from dataclasses import dataclass, field
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from belfry.identity import subscriptions, tokens, users
from belfry.servers import servers
from models import ChannelRole, Server, User


@dataclass
class Person:
    user: User
    token: str

    @property
    def id(self) -> int:
        return int(self.user.id)

    @property
    def username(self) -> str:
        return str(self.user.username)


@dataclass
class Cast:
    admin: Person
    moderator: Person
    subscriber: Person
    vip: Person
    lapsed: Person
    stranger: Person
    server_id: int
    general: int
    announcements: int
    vault: int
    vip_role: int
    moderators_role: int
    everybody: dict[str, Person] = field(default_factory=dict)


def csrf_of(html: str) -> str:
    """The CSRF token in the form or the head of a page."""
    return re.search(r'name="csrf" (?:value|content)="([^"]+)"', html)[1]


def make_person(username: str, *, status: str | None = "active", admin: bool = False) -> Person:
    user = users.create_user(username, username.title(), is_admin=admin)
    if status:
        subscriptions.set_subscription(user.id, status, None)
    return Person(user, tokens.create_token(user)[1])


def make_cast() -> Cast:
    server = Server.create(name="Golden Signals")
    vip_role = servers.create_role(server.id, "vip", moderator=False)
    moderators = servers.create_role(server.id, "moderators", moderator=True)
    general = servers.create_channel(server.id, "general", private=False, posting="members")
    announcements = servers.create_channel(server.id, "announcements", private=False, posting="admins")
    vault = servers.create_channel(server.id, "vault", private=True, posting="members")
    ChannelRole.create(channel_id=vault.id, role_id=vip_role.id, server_id=server.id)
    people = {
        "admin": make_person("ada", status=None, admin=True),
        "moderator": make_person("moira"),
        "subscriber": make_person("sam"),
        "vip": make_person("vera", status="trialing"),
        "lapsed": make_person("lars", status="canceled"),
        "stranger": make_person("stan"),
    }
    roles = {"moderator": [moderators.id], "vip": [vip_role.id]}
    for name, person in people.items():
        if name != "stranger":
            servers.put_member(server.id, person.id, roles.get(name, []))
    return Cast(
        **people,
        server_id=server.id,
        general=general.id,
        announcements=announcements.id,
        vault=vault.id,
        vip_role=vip_role.id,
        moderators_role=moderators.id,
        everybody=people,
    )


class Api:
    """A test client that sends the token of one user."""

    def __init__(self, client: FlaskClient, token: str | None) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def open(self, method: str, path: str, headers: dict[str, str] | None = None, **arguments: Any) -> TestResponse:
        return self._client.open(path, method=method, headers={**self._headers, **(headers or {})}, **arguments)

    def get(self, path: str, **arguments: Any) -> TestResponse:
        return self.open("GET", path, **arguments)

    def post(self, path: str, **arguments: Any) -> TestResponse:
        return self.open("POST", path, **arguments)

    def put(self, path: str, **arguments: Any) -> TestResponse:
        return self.open("PUT", path, **arguments)

    def patch(self, path: str, **arguments: Any) -> TestResponse:
        return self.open("PATCH", path, **arguments)

    def delete(self, path: str, **arguments: Any) -> TestResponse:
        return self.open("DELETE", path, **arguments)
