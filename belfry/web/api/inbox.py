"""The inbox, and what somebody wants to hear of a channel."""

from typing import Any

import schemas
from belfry.inbox import inbox
from belfry.inbox.inbox import parse_notification_id
from belfry.servers import preferences
from belfry.web.endpoint import api, current_user, endpoint, paginate
from belfry.web.problems import HttpProblem


@api.get("/notifications")
@endpoint(query=schemas.NotificationQuery, gives=schemas.Notification)
def list_notifications(query: dict[str, Any]) -> Any:
    """One's own notifications, newest message first."""
    return paginate(
        query,
        lambda before, limit: inbox.list_notifications(
            current_user(), before=before, limit=limit, unread=query["unread"], channel_id=query["channel_id"]
        ),
        lambda notification: notification["message_id"],
    )


@api.get("/notifications/unread-count")
@endpoint(gives=schemas.UnreadCount)
def unread_count() -> Any:
    """How many are unread: in all, of them mentions, and by channel. Exact, however many."""
    return inbox.unread_count(current_user())


@api.post("/notifications/read")
@endpoint(body=schemas.MarkRead, gives=schemas.Marked)
def mark_read(body: dict[str, Any]) -> Any:
    """Mark some, those up to one, a channel's, or all as read."""
    if body.get("all"):
        return inbox.mark_all_read(current_user())
    return inbox.mark_read(
        current_user(), ids=body.get("ids"), up_to=body.get("up_to"), channel_id=body.get("channel_id")
    )


@api.delete("/notifications/<notification_id>")
@endpoint(status=204)
def dismiss(notification_id: str) -> None:
    """Take one out of the inbox, for good."""
    try:
        user_id, message_id = parse_notification_id(notification_id)
    except ValueError:
        raise HttpProblem(404, "There is no such notification.") from None
    inbox.dismiss(current_user(), user_id, message_id)


@api.get("/channels/<id:channel_id>/preference")
@endpoint(gives=schemas.Preference)
def get_preference(channel_id: int) -> Any:
    """What one wants to hear of a channel; everything, if one never said."""
    return preferences.preference_of(current_user(), channel_id)


@api.put("/channels/<id:channel_id>/preference")
@endpoint(body=schemas.PreferenceIn, gives=schemas.Preference)
def put_preference(channel_id: int, body: dict[str, Any]) -> Any:
    """Say what one wants to hear of a channel: the level, and until when it is muted."""
    return preferences.set_preference(current_user(), channel_id, body["level"], body["muted_until"])
