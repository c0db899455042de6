"""Whom one may mention in a channel: as one types the beginning of a name."""

from belfry.access import SeenChannel
from belfry.mentions import EVERYONE
from belfry.sql import Row, rows

_FROM = """
    u.username >= %(prefix)s
    AND u.username < %(beyond)s
"""
"""A range of the username's index, which is in the order of its bytes: `~` comes after all that a name can have."""

_OPEN = f"""
    SELECT u.id, u.username, u.name
    FROM user_account u
    WHERE {_FROM}
    AND EXISTS (SELECT FROM member m WHERE m.server_id = %(server_id)s AND m.user_id = u.id)
    ORDER BY u.username
    LIMIT %(limit)s
"""
_PRIVATE = f"""
    SELECT u.id, u.username, u.name
    FROM user_account u
    WHERE {_FROM}
    AND EXISTS (
        SELECT FROM channel_role o
        JOIN member_role r ON r.role_id = o.role_id
        WHERE o.channel_id = %(channel_id)s
        AND r.user_id = u.id
    )
    ORDER BY u.username
    LIMIT %(limit)s
"""


def mentionable(channel: SeenChannel, prefix: str, limit: int) -> list[Row]:
    """Up to `limit` of whom a mention can reach: {"kind", "id", "username", "name"}, whose username begins so.

    - Members who see the channel, by username; upper and lower case are the same.
    - Where the asking one moderates, before them: `everyone` (its id is None), and the server's roles.
    """
    prefix = prefix.lower()
    parameters = {
        "prefix": prefix,
        "beyond": prefix + "~",
        "server_id": channel.server_id,
        "channel_id": channel.id,
        "limit": limit,
    }
    groups: list[Row] = []
    if channel.moderates:
        if EVERYONE.startswith(prefix):
            groups.append({"kind": "everyone", "id": None, "username": EVERYONE, "name": "everyone here"})
        groups += [
            {"kind": "role", **role, "name": f"everyone with the role {role['username']}"}
            for role in rows(
                "SELECT id, name AS username FROM role"
                " WHERE server_id = %(server_id)s AND starts_with(name, %(prefix)s)"
                " ORDER BY name LIMIT %(limit)s",
                parameters,
            )
        ]
    people = rows(_PRIVATE if channel.private else _OPEN, parameters)
    return [*groups, *({"kind": "user", **person} for person in people)][:limit]
