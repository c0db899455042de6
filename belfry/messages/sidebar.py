"""The channels in the sidebar of a page."""
from belfry.core.db import Row, fetch_all
from belfry.servers.visibility import nest_server, visible_channels
from models import User

MAX_OTHER_CHANNELS = 200  # of servers that an admin is not a member of


def sidebar_channels(user: User, viewed_id: int | None = None) -> tuple[list[Row], bool]:
    """Channels as `visible_channels` returns them, by id, and whether there are more that the user can see.

    - Members: all that they can see.
    - Admins, who can see every channel: those of their servers, the viewed one, and MAX_OTHER_CHANNELS more.
    """
    if not user.is_admin:
        return visible_channels(user), False
    found = fetch_all(
        """
        WITH own AS MATERIALIZED (
            SELECT mem.server_id FROM member mem WHERE mem.user_id = %(user_id)s
        ),
        other AS MATERIALIZED (
            SELECT chan.id
            FROM channel chan
            WHERE chan.server_id NOT IN (SELECT server_id FROM own)
            ORDER BY chan.id
            LIMIT %(others)s + 1
        ),
        listed AS (
            SELECT chan.id FROM channel chan JOIN own ON own.server_id = chan.server_id
            UNION
            (SELECT id FROM other ORDER BY id LIMIT %(others)s)
            UNION
            SELECT %(viewed_id)s::bigint
        )
        SELECT chan.id, chan.name, chan.private, chan.posting, chan.server_id, srv.name AS server_name,
            (SELECT count(*) FROM other) > %(others)s AS more
        FROM listed
        JOIN channel chan ON chan.id = listed.id
        JOIN server srv ON srv.id = chan.server_id
        ORDER BY chan.id
        """,
        {"user_id": user.id, "viewed_id": viewed_id, "others": MAX_OTHER_CHANNELS},
    )
    more = bool(found and found[0]["more"])
    for one in found:
        del one["more"]
    return [nest_server(one) for one in found], more
