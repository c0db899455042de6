"""Servers, and their members, roles and channels."""

from collections.abc import Sequence
from typing import Any

from peewee import IntegrityError

from belfry.core.db import Row, db, execute, fetch_all, fetch_one
from belfry.core.errors import Conflict, Invalid, NotFound
from belfry.identity.users import find_user
from models import Channel, Role, Server


def find_server(server_id: int) -> Server:
    """Find a server. Raises NotFound."""
    server = Server.get_or_none(Server.id == server_id)
    if server is None:
        raise NotFound(f"There is no server {server_id}.")
    return server


def list_servers(*, after: int, limit: int) -> list[Server]:
    """List servers by id, above id `after`."""
    return list(Server.select().where(Server.id > after).order_by(Server.id).limit(limit))


def list_members(server_id: int, *, after: int, limit: int) -> list[Row]:
    """List members by user id: {"user": {...}, "roles": [{"id", "name"}], "joined_at"}. Raises NotFound."""
    find_server(server_id)
    found = fetch_all(
        """
        SELECT usr.id, usr.username, usr.name, mem.joined_at,
            ARRAY(SELECT mr.role_id FROM member_role mr
                  WHERE mr.server_id = mem.server_id AND mr.user_id = mem.user_id ORDER BY 1) AS role_ids
        FROM member mem
        JOIN user_account usr ON usr.id = mem.user_id
        WHERE mem.server_id = %(server_id)s
        AND mem.user_id > %(after)s
        ORDER BY mem.user_id
        LIMIT %(limit)s
        """,
        {"server_id": server_id, "after": after, "limit": limit},
    )
    return [
        {
            "user": {"id": member["id"], "username": member["username"], "name": member["name"]},
            "role_ids": member["role_ids"],
            "joined_at": member["joined_at"],
        }
        for member in found
    ]


def put_member(server_id: int, user_id: int, role_ids: Sequence[int] | None = None) -> Row:
    """Add a member, or change their roles to exactly these (None: keep them).

    Repeating it changes nothing; concurrent calls take turns at the member's row. Raises NotFound for server or user,
    Invalid for a role of another server.
    """
    find_server(server_id)
    find_user(user_id)
    parameters = {"server_id": server_id, "user_id": user_id, "role_ids": list(role_ids or ())}
    try:
        with db.atomic():
            execute(
                "INSERT INTO member (server_id, user_id) VALUES (%(server_id)s, %(user_id)s)"
                " ON CONFLICT (server_id, user_id) DO UPDATE SET server_id = EXCLUDED.server_id",
                parameters,
            )
            if role_ids is not None:
                execute(
                    "DELETE FROM member_role WHERE server_id = %(server_id)s AND user_id = %(user_id)s"
                    " AND role_id <> ALL(%(role_ids)s::bigint[])",
                    parameters,
                )
                execute(
                    "INSERT INTO member_role (role_id, user_id, server_id)"
                    " SELECT role_id, %(user_id)s, %(server_id)s FROM unnest(%(role_ids)s::bigint[]) AS role_id"
                    " ON CONFLICT DO NOTHING",
                    parameters,
                )
    except IntegrityError:
        raise Invalid({"role_ids": ["Each must be a role of this server."]}) from None
    return list_members(server_id, after=user_id - 1, limit=1)[0]


def remove_member(server_id: int, user_id: int) -> None:
    """Remove a member, with their roles in the server. Raises NotFound."""
    if not execute(
        "DELETE FROM member WHERE server_id = %(server_id)s AND user_id = %(user_id)s",
        {"server_id": server_id, "user_id": user_id},
    ):
        raise NotFound(f"User {user_id} is not a member of server {server_id}.")


def create_role(server_id: int, name: str, moderator: bool) -> Role:
    """Create a role. Raises NotFound for the server, Conflict where the name is taken in it."""
    find_server(server_id)
    try:
        with db.atomic():
            return Role.create(server=server_id, name=name, moderator=moderator)
    except IntegrityError:
        raise Conflict(f"This server has a role {name} already.") from None


def list_roles(server_id: int, *, after: int, limit: int) -> list[Role]:
    """List the roles of a server by id. Raises NotFound."""
    find_server(server_id)
    return list(
        Role.select().where((Role.server == server_id) & (Role.id > after)).order_by(Role.id).limit(limit)
    )


def delete_role(server_id: int, role_id: int) -> None:
    """Delete a role, also from members and channels. Raises NotFound."""
    if not Role.delete().where((Role.id == role_id) & (Role.server == server_id)).execute():
        raise NotFound(f"There is no role {role_id} in server {server_id}.")


def create_channel(server_id: int, name: str, private: bool, posting: str) -> Channel:
    """Create a channel. Raises NotFound for the server, Conflict where the name is taken in it."""
    find_server(server_id)
    try:
        with db.atomic():
            return Channel.create(server=server_id, name=name, private=private, posting=posting)
    except IntegrityError:
        raise Conflict(f"This server has a channel {name} already.") from None


def list_channels(server_id: int, *, after: int, limit: int) -> list[Channel]:
    """List all channels of a server by id. Raises NotFound."""
    find_server(server_id)
    return list(
        Channel.select(Channel, Server)
        .join(Server)
        .where((Channel.server == server_id) & (Channel.id > after))
        .order_by(Channel.id)
        .limit(limit)
    )


def update_channel(channel_id: int, changes: dict[str, Any]) -> None:
    """Change name, private or posting. Raises NotFound, and Conflict where the name is taken."""
    try:
        with db.atomic():
            if not Channel.select().where(Channel.id == channel_id).exists():
                raise NotFound(f"There is no channel {channel_id}.")
            if changes:
                Channel.update(changes).where(Channel.id == channel_id).execute()
    except IntegrityError:
        raise Conflict(f"This server has a channel {changes.get('name')} already.") from None


def delete_channel(channel_id: int) -> None:
    """Delete a channel. Raises NotFound, and Conflict where it has messages, which are kept."""
    try:
        with db.atomic():
            if not Channel.delete().where(Channel.id == channel_id).execute():
                raise NotFound(f"There is no channel {channel_id}.")
    except IntegrityError:
        raise Conflict("This channel has messages, which are kept. Make it private instead.") from None


def channel_roles(channel_id: int) -> list[Row]:
    """The roles that open a private channel: [{"id", "name", "moderator"}]. Raises NotFound."""
    if not Channel.select().where(Channel.id == channel_id).exists():
        raise NotFound(f"There is no channel {channel_id}.")
    return fetch_all(
        "SELECT role.id, role.name, role.moderator FROM role JOIN channel_role cr ON cr.role_id = role.id"
        " WHERE cr.channel_id = %(channel_id)s ORDER BY role.id",
        {"channel_id": channel_id},
    )


def set_channel_roles(channel_id: int, role_ids: Sequence[int]) -> list[Row]:
    """Set the roles that open a private channel. Raises NotFound, and Invalid for a role of another server."""
    try:
        with db.atomic():
            channel = fetch_one("SELECT server_id FROM channel WHERE id = %(id)s FOR NO KEY UPDATE", {"id": channel_id})
            if channel is None:
                raise NotFound(f"There is no channel {channel_id}.")
            parameters = {"channel_id": channel_id, "server_id": channel["server_id"], "role_ids": list(role_ids)}
            execute("DELETE FROM channel_role WHERE channel_id = %(channel_id)s", parameters)
            execute(
                "INSERT INTO channel_role (channel_id, role_id, server_id)"
                " SELECT DISTINCT %(channel_id)s::bigint, role_id, %(server_id)s::bigint"
                " FROM unnest(%(role_ids)s::bigint[]) AS role_id",
                parameters,
            )
    except IntegrityError:
        raise Invalid({"role_ids": ["Each must be a role of this server."]}) from None
    return channel_roles(channel_id)


def servers_of(user_id: int) -> list[Row]:
    """The servers that a user is a member of: [{"id", "name"}], by id."""
    return fetch_all(
        "SELECT srv.id, srv.name FROM server srv JOIN member mem ON mem.server_id = srv.id"
        " WHERE mem.user_id = %(user_id)s ORDER BY srv.id",
        {"user_id": user_id},
    )


def roles_of(user_id: int, server_id: int) -> list[str]:
    """The names of a user's roles in a server."""
    found = fetch_all(
        "SELECT role.name FROM role JOIN member_role mr ON mr.role_id = role.id"
        " WHERE mr.server_id = %(server_id)s AND mr.user_id = %(user_id)s ORDER BY role.name",
        {"server_id": server_id, "user_id": user_id},
    )
    return [role["name"] for role in found]
