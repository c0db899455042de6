"""A user's preference for a channel. No row means all messages."""

from datetime import datetime

from belfry.core.db import Row, execute, fetch_one
from belfry.core.failpoints import failpoint
from belfry.servers.visibility import get_visible_channel
from models import User


def preference_of(user: User, channel_id: int) -> Row:
    """{"level", "muted_until"}; the defaults where none is stored. Raises NotFound for an invisible channel."""
    get_visible_channel(user, channel_id)
    found = fetch_one(
        "SELECT level, muted_until FROM preference"
        " WHERE channel_id = %(channel_id)s AND user_id = %(user_id)s",
        {"channel_id": channel_id, "user_id": user.id},
    )
    return found or {"level": "all", "muted_until": None}


def set_preference(user: User, channel_id: int, level: str, muted_until: datetime | None) -> Row:
    """Set level and mute; the stored preference. Raises NotFound for a channel that the user cannot see."""
    get_visible_channel(user, channel_id)
    execute(
        "INSERT INTO preference (channel_id, user_id, level, muted_until)"
        " VALUES (%(channel_id)s, %(user_id)s, %(level)s, %(muted_until)s)"
        " ON CONFLICT (channel_id, user_id) DO UPDATE"
        " SET level = EXCLUDED.level, muted_until = EXCLUDED.muted_until, updated_at = now()",
        {"channel_id": channel_id, "user_id": user.id, "level": level, "muted_until": muted_until},
    )
    failpoint("preference.written")
    return {"level": level, "muted_until": muted_until}
