"""The channels that a page lists beside what it shows."""
from belfry.core.db import Row, fetch_all
from belfry.servers.visibility import nest_server, visible_channels
from models import User

MAX_OTHER_CHANNELS = 200  # channels of servers that an admin is not in


def sidebar_channels(user: User, viewed_id: int | None = None) -> tuple[list[Row], bool]:
    """As of `visible_channels`, by id, and whether there are more that the user may see.

    - Members: all that they may see.
    - Admins, who may see every channel: those of their servers, the one in view, and MAX_OTHER_CHANNELS more.
    """
    if not user.is_admin:
        return visible_channels(user), False
    found = fetch_all(
        """
        WITH own AS MATERIALIZED (
            SELECT m.server_id FROM member m WHERE m.user_id = %(user_id)s
        ),
        other AS MATERIALIZED (
            SELECT c.id
            FROM channel c
            WHERE c.server_id NOT IN (SELECT server_id FROM own)
            ORDER BY c.id
            LIMIT %(others)s + 1
        ),
        listed AS (
            SELECT c.id FROM channel c JOIN own ON own.server_id = c.server_id
            UNION
            (SELECT id FROM other ORDER BY id LIMIT %(others)s)
            UNION
            SELECT %(viewed_id)s::bigint
        )
        SELECT c.id, c.name, c.private, c.posting, c.server_id, v.name AS server_name,
            (SELECT count(*) FROM other) > %(others)s AS more
        FROM listed
        JOIN channel c ON c.id = listed.id
        JOIN server v ON v.id = c.server_id
        ORDER BY c.id
        """,
        {"user_id": user.id, "viewed_id": viewed_id, "others": MAX_OTHER_CHANNELS},
    )
    more = bool(found and found[0]["more"])
    for one in found:
        del one["more"]
    return [nest_server(one) for one in found], more
