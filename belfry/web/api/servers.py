"""Servers, their members, roles and channels: for admins, except reading one channel."""

from typing import Any

import schemas
from belfry.servers import servers
from belfry.servers.visibility import VisibleChannel, get_visible_channel
from belfry.web.endpoint import ApiResponse, access, api, current_user, endpoint, paginate, require_admin
from models import Server


@api.get("/servers")
@endpoint(query=schemas.Page, response=schemas.Server, admin=True)
def list_servers(query: dict[str, Any]) -> Any:
    """List all servers, by id. Users themselves find their servers at `/api/me`."""
    return paginate(
        query,
        lambda after, limit: servers.list_servers(after=after or 0, limit=limit),
        lambda server: server.id,
    )


@api.post("/servers")
@endpoint(body=schemas.ServerIn, response=schemas.Server, status=201, admin=True, publishes=access)
def create_server(body: dict[str, Any]) -> ApiResponse:
    """Create a server. It has no members, roles or channels yet."""
    server = servers.find_server(Server.create(**body).id)
    return ApiResponse(server, headers={"Location": f"/api/servers/{server.id}"})


@api.get("/servers/<id:server_id>")
@endpoint(response=schemas.Server, admin=True)
def get_server(server_id: int) -> Any:
    """Get a server by its id. 404 where there is none."""
    return servers.find_server(server_id)


@api.get("/servers/<id:server_id>/members")
@endpoint(query=schemas.Page, response=schemas.Member, admin=True)
def list_members(server_id: int, query: dict[str, Any]) -> Any:
    """List a server's members, by the user's id. Each has the ids of their roles."""
    return paginate(
        query,
        lambda after, limit: servers.list_members(server_id, after=after or 0, limit=limit),
        lambda member: member["user"]["id"],
    )


@api.post("/servers/<id:server_id>/members")
@endpoint(body=schemas.MemberIn, response=schemas.Member, status=201, admin=True, publishes=access)
def add_member(server_id: int, body: dict[str, Any]) -> Any:
    """Add a member to a server. Of a user who is a member already the roles are set, if any are given."""
    return servers.put_member(server_id, body["user_id"], body["role_ids"])


@api.put("/servers/<id:server_id>/members/<id:user_id>")
@endpoint(body=schemas.MemberRoles, response=schemas.Member, admin=True, publishes=access)
def put_member(server_id: int, user_id: int, body: dict[str, Any]) -> Any:
    """Set a member's roles. A user who is not yet a member of the server is added."""
    return servers.put_member(server_id, user_id, body["role_ids"])


@api.delete("/servers/<id:server_id>/members/<id:user_id>")
@endpoint(status=204, admin=True, publishes=access)
def remove_member(server_id: int, user_id: int) -> None:
    """Remove a member from a server. Their roles in the server are removed as well."""
    servers.remove_member(server_id, user_id)


@api.get("/servers/<id:server_id>/roles")
@endpoint(query=schemas.Page, response=schemas.Role, admin=True)
def list_roles(server_id: int, query: dict[str, Any]) -> Any:
    """List a server's roles, by id. A role can be mentioned, and can open private channels."""
    return paginate(
        query,
        lambda after, limit: servers.list_roles(server_id, after=after or 0, limit=limit),
        lambda role: role.id,
    )


@api.post("/servers/<id:server_id>/roles")
@endpoint(body=schemas.RoleIn, response=schemas.Role, status=201, admin=True, publishes=access)
def create_role(server_id: int, body: dict[str, Any]) -> Any:
    """Create a role. Moderators may mention roles and everyone, and delete messages."""
    return servers.create_role(server_id, body["name"], body["moderator"])


@api.delete("/servers/<id:server_id>/roles/<id:role_id>")
@endpoint(status=204, admin=True, publishes=access)
def delete_role(server_id: int, role_id: int) -> None:
    """Delete a role. It is removed from members and channels as well."""
    servers.delete_role(server_id, role_id)


@api.get("/servers/<id:server_id>/channels")
@endpoint(query=schemas.Page, response=schemas.Channel, admin=True)
def list_channels(server_id: int, query: dict[str, Any]) -> Any:
    """List the channels of a server, by id. Private ones are included."""
    return paginate(
        query,
        lambda after, limit: servers.list_channels(server_id, after=after or 0, limit=limit),
        lambda channel: channel.id,
    )


@api.post("/servers/<id:server_id>/channels")
@endpoint(body=schemas.ChannelIn, response=schemas.Channel, status=201, admin=True, publishes=access)
def create_channel(server_id: int, body: dict[str, Any]) -> ApiResponse:
    """Create a channel. 409 where the server has a channel of that name."""
    channel = servers.create_channel(server_id, body["name"], body["private"], body["posting"])
    return ApiResponse(channel, headers={"Location": f"/api/channels/{channel.id}"})


def _describe(channel: VisibleChannel) -> dict[str, Any]:
    return {**vars(channel), "server": {"id": channel.server_id, "name": channel.server_name}}


@api.get("/channels/<id:channel_id>")
@endpoint(response=schemas.Channel)
def get_channel(channel_id: int) -> Any:
    """Get a channel. 404 where the caller cannot see it."""
    return _describe(get_visible_channel(current_user(), channel_id))


def _administered(channel_id: int) -> None:
    """Raises NotFound for a channel that the caller cannot see, 403 for one that they may not change."""
    get_visible_channel(current_user(), channel_id)
    require_admin()


@api.patch("/channels/<id:channel_id>")
@endpoint(body=schemas.ChannelChange, response=schemas.Channel, publishes=access)
def update_channel(channel_id: int, body: dict[str, Any]) -> Any:
    """Change a channel's name, who sees it, or who may post in it. Admins only."""
    _administered(channel_id)
    servers.update_channel(channel_id, body)
    return _describe(get_visible_channel(current_user(), channel_id))


@api.delete("/channels/<id:channel_id>")
@endpoint(status=204, publishes=access)
def delete_channel(channel_id: int) -> None:
    """Delete a channel. 409 where it has messages, which are kept. Admins only."""
    _administered(channel_id)
    servers.delete_channel(channel_id)


@api.get("/channels/<id:channel_id>/roles")
@endpoint(query=schemas.Page, response=schemas.Role)
def list_channel_roles(channel_id: int, query: dict[str, Any]) -> Any:
    """List the roles that open a private channel. Admins only."""
    _administered(channel_id)
    return paginate(
        query,
        lambda after, limit: [
            role for role in servers.channel_roles(channel_id) if role["id"] > (after or 0)
        ][:limit],
        lambda role: role["id"],
    )


@api.put("/channels/<id:channel_id>/roles")
@endpoint(body=schemas.ChannelRoles, response=schemas.RoleList, publishes=access)
def put_channel_roles(channel_id: int, body: dict[str, Any]) -> Any:
    """Set the roles that open a private channel. They replace the earlier ones. Admins only."""
    _administered(channel_id)
    return {"items": servers.set_channel_roles(channel_id, body["role_ids"]), "next": None}
