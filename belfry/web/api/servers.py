"""Servers, their members, roles and channels: for admins, but for a channel itself."""

from typing import Any

import schemas
from belfry.servers import servers
from belfry.servers.visibility import VisibleChannel, get_visible_channel
from belfry.web.endpoint import ApiResponse, api, current_user, endpoint, paginate, require_admin
from models import Server


@api.get("/servers")
@endpoint(query=schemas.Page, gives=schemas.Server, admin=True)
def list_servers(query: dict[str, Any]) -> Any:
    """All servers."""
    return paginate(
        query,
        lambda after, limit: servers.list_servers(after=after or 0, limit=limit),
        lambda server: server.id,
    )


@api.post("/servers")
@endpoint(body=schemas.ServerIn, gives=schemas.Server, status=201, admin=True)
def create_server(body: dict[str, Any]) -> ApiResponse:
    """A new server, with nobody in it."""
    server = servers.find_server(Server.create(**body).id)
    return ApiResponse(server, headers={"Location": f"/api/servers/{server.id}"})


@api.get("/servers/<id:server_id>")
@endpoint(gives=schemas.Server, admin=True)
def get_server(server_id: int) -> Any:
    """One server."""
    return servers.find_server(server_id)


@api.get("/servers/<id:server_id>/members")
@endpoint(query=schemas.Page, gives=schemas.Member, admin=True)
def list_members(server_id: int, query: dict[str, Any]) -> Any:
    """A server's members and their roles."""
    return paginate(
        query,
        lambda after, limit: servers.list_members(server_id, after=after or 0, limit=limit),
        lambda member: member["user"]["id"],
    )


@api.post("/servers/<id:server_id>/members")
@endpoint(body=schemas.MemberIn, gives=schemas.Member, status=201, admin=True)
def add_member(server_id: int, body: dict[str, Any]) -> Any:
    """Make somebody a member, with exactly these roles; without `role_ids` those of a member stay."""
    return servers.put_member(server_id, body["user_id"], body["role_ids"])


@api.put("/servers/<id:server_id>/members/<id:user_id>")
@endpoint(body=schemas.MemberRoles, gives=schemas.Member, admin=True)
def put_member(server_id: int, user_id: int, body: dict[str, Any]) -> Any:
    """The same, by address: a member with exactly these roles."""
    return servers.put_member(server_id, user_id, body["role_ids"])


@api.delete("/servers/<id:server_id>/members/<id:user_id>")
@endpoint(status=204, admin=True)
def remove_member(server_id: int, user_id: int) -> None:
    """Take somebody out of a server; their roles in it go with them."""
    servers.remove_member(server_id, user_id)


@api.get("/servers/<id:server_id>/roles")
@endpoint(query=schemas.Page, gives=schemas.Role, admin=True)
def list_roles(server_id: int, query: dict[str, Any]) -> Any:
    """A server's roles."""
    return paginate(
        query,
        lambda after, limit: servers.list_roles(server_id, after=after or 0, limit=limit),
        lambda role: role.id,
    )


@api.post("/servers/<id:server_id>/roles")
@endpoint(body=schemas.RoleIn, gives=schemas.Role, status=201, admin=True)
def create_role(server_id: int, body: dict[str, Any]) -> Any:
    """A new role. Moderators mention roles and everyone, and delete messages."""
    return servers.create_role(server_id, body["name"], body["moderator"])


@api.delete("/servers/<id:server_id>/roles/<id:role_id>")
@endpoint(status=204, admin=True)
def delete_role(server_id: int, role_id: int) -> None:
    """Take a role away, from its members and channels as well."""
    servers.delete_role(server_id, role_id)


@api.get("/servers/<id:server_id>/channels")
@endpoint(query=schemas.Page, gives=schemas.Channel, admin=True)
def list_channels(server_id: int, query: dict[str, Any]) -> Any:
    """All channels of a server."""
    return paginate(
        query,
        lambda after, limit: servers.list_channels(server_id, after=after or 0, limit=limit),
        lambda channel: channel.id,
    )


@api.post("/servers/<id:server_id>/channels")
@endpoint(body=schemas.ChannelIn, gives=schemas.Channel, status=201, admin=True)
def create_channel(server_id: int, body: dict[str, Any]) -> ApiResponse:
    """A new channel: open or private, for members or for admins to post in."""
    channel = servers.create_channel(server_id, body["name"], body["private"], body["posting"])
    return ApiResponse(channel, headers={"Location": f"/api/channels/{channel.id}"})


def _describe(channel: VisibleChannel) -> dict[str, Any]:
    return {**vars(channel), "server": {"id": channel.server_id, "name": channel.server_name}}


@api.get("/channels/<id:channel_id>")
@endpoint(gives=schemas.Channel)
def get_channel(channel_id: int) -> Any:
    """One channel, for whoever may see it."""
    return _describe(get_visible_channel(current_user(), channel_id))


def _administered(channel_id: int) -> None:
    """Raises NotFound for a channel that the caller may not see, 403 for one that is not theirs to change."""
    get_visible_channel(current_user(), channel_id)
    require_admin()


@api.patch("/channels/<id:channel_id>")
@endpoint(body=schemas.ChannelChange, gives=schemas.Channel)
def update_channel(channel_id: int, body: dict[str, Any]) -> Any:
    """Rename a channel, make it private or open, or say who posts in it. Admins."""
    _administered(channel_id)
    servers.update_channel(channel_id, body)
    return _describe(get_visible_channel(current_user(), channel_id))


@api.delete("/channels/<id:channel_id>")
@endpoint(status=204)
def delete_channel(channel_id: int) -> None:
    """Take away a channel in which nothing was ever posted. Admins."""
    _administered(channel_id)
    servers.delete_channel(channel_id)


@api.get("/channels/<id:channel_id>/roles")
@endpoint(query=schemas.Page, gives=schemas.Role)
def list_channel_roles(channel_id: int, query: dict[str, Any]) -> Any:
    """The roles that open a private channel. Admins."""
    _administered(channel_id)
    return paginate(
        query,
        lambda after, limit: [
            role for role in servers.channel_roles(channel_id) if role["id"] > (after or 0)
        ][:limit],
        lambda role: role["id"],
    )


@api.put("/channels/<id:channel_id>/roles")
@endpoint(body=schemas.ChannelRoles, gives=schemas.RoleList)
def put_channel_roles(channel_id: int, body: dict[str, Any]) -> Any:
    """Let exactly these roles open a channel. Admins."""
    _administered(channel_id)
    return {"items": servers.set_channel_roles(channel_id, body["role_ids"]), "next": None}
