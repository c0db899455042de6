"""Suggest mentions in a channel while a user types the beginning of a name."""
from belfry.core.db import Row, fetch_all
from belfry.messages.mentions import EVERYONE
from belfry.servers.visibility import VisibleChannel
from config import tuning

MAX_INDEX_SCAN = 20_000

_OPEN_CHANNEL_SQL = "SELECT mem.user_id FROM member mem WHERE mem.server_id = %(server_id)s"
_PRIVATE_CHANNEL_SQL = """
    SELECT mr.user_id
    FROM channel_role cr
    JOIN member_role mr ON mr.role_id = cr.role_id
    WHERE cr.channel_id = %(channel_id)s
"""


def _users_sql(who: str, user_id: str) -> str:
    """Those of a set of user ids, `user_id` among them, whose name is in the range: fast, however many there are.

    - Up to `tuning.suggestion_small_audience` members are each compared with the prefix.
    - Where there are more, the index of usernames is scanned from the prefix on: `~` comes after every character of a
      name. At most MAX_INDEX_SCAN names are read, so that a prefix that few members have does not read all users.
      Another letter then finds the others.
    """
    in_range = "usr.username >= %(prefix)s AND usr.username < %(beyond)s"
    return f"""
        WITH few AS MATERIALIZED ({who} LIMIT {tuning.suggestion_small_audience + 1}),
        counted AS MATERIALIZED (SELECT count(*) <= {tuning.suggestion_small_audience} AS are_few FROM few)
        SELECT DISTINCT found.*
        FROM (
            SELECT usr.id, usr.username, usr.name
            FROM few
            CROSS JOIN LATERAL (
                SELECT * FROM user_account usr WHERE usr.id = few.user_id
                OFFSET 0  -- each by its key: else all names of the range are read, and joined
            ) usr
            WHERE (SELECT are_few FROM counted)
            AND {in_range}
            UNION ALL
            (SELECT usr.id, usr.username, usr.name
            FROM (SELECT * FROM user_account usr WHERE {in_range} ORDER BY usr.username LIMIT {MAX_INDEX_SCAN}) usr
            WHERE NOT (SELECT are_few FROM counted)
            AND EXISTS ({who} AND {user_id} = usr.id)
            ORDER BY usr.username
            LIMIT %(limit)s)
        ) found
        ORDER BY found.username
        LIMIT %(limit)s
    """


def suggest_mentions(channel: VisibleChannel, prefix: str, limit: int) -> list[Row]:
    """At most `limit` possible mentions whose name begins with `prefix`: {"kind", "id", "username", "name"}.

    - Members who see the channel, by username, in any case.
    - For moderators also, and first: `everyone` (its id is None) and the server's roles.
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
            for role in fetch_all(
                "SELECT id, name AS username FROM role"
                " WHERE server_id = %(server_id)s AND starts_with(name, %(prefix)s)"
                " ORDER BY name LIMIT %(limit)s",
                parameters,
            )
        ]
    sees = (_PRIVATE_CHANNEL_SQL, "mr.user_id") if channel.private else (_OPEN_CHANNEL_SQL, "mem.user_id")
    users = fetch_all(_users_sql(*sees), parameters)
    return [*groups, *({"kind": "user", **user} for user in users)][:limit]
