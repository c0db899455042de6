"""The caller's inbox, and their preference for a channel."""

from typing import Any

import schemas
from belfry.inbox import inbox
from belfry.inbox.inbox import parse_notification_id
from belfry.servers import preferences
from belfry.web.endpoint import api, current_user, endpoint, nothing, own_counts, paginate
from belfry.web.problems import HttpProblem


@api.get("/notifications")
@endpoint(query=schemas.NotificationQuery, response=schemas.Notification)
def list_notifications(query: dict[str, Any]) -> Any:
    """List the caller's notifications. Those of the newest messages are first."""
    return paginate(
        query,
        lambda before, limit: inbox.list_notifications(
            current_user(),
            before=before,
            limit=limit,
            unread=query["unread"],
            mentions=query["mentions"],
            channel_id=query["channel_id"],
        ),
        lambda notification: notification["message_id"],
    )


@api.get("/notifications/unread-count")
@endpoint(response=schemas.UnreadCount)
def unread_count() -> Any:
    """Count the caller's unread notifications. The counts are exact: in total, mentions, and by channel."""
    return inbox.unread_count(current_user())


@api.post("/notifications/read")
@endpoint(body=schemas.MarkRead, response=schemas.Marked, publishes=own_counts)
def mark_read(body: dict[str, Any]) -> Any:
    """Mark notifications read. Give exactly one of `ids`, `up_to`, `channel_id` and `all`."""
    if body.get("all"):
        return inbox.mark_all_read(current_user())
    return inbox.mark_read(
        current_user(), ids=body.get("ids"), up_to=body.get("up_to"), channel_id=body.get("channel_id")
    )


@api.delete("/notifications/<notification_id>")
@endpoint(status=204, publishes=own_counts)
def dismiss(notification_id: str) -> None:
    """Remove a notification from the inbox. `restore` undoes it."""
    inbox.dismiss(current_user(), *_parsed(notification_id))


@api.post("/notifications/<notification_id>/restore")
@endpoint(status=204, publishes=own_counts)
def restore(notification_id: str) -> None:
    """Undo the removal of a notification from the inbox. 404 where it was not removed."""
    inbox.restore(current_user(), *_parsed(notification_id))


def _parsed(notification_id: str) -> tuple[int, int]:
    try:
        return parse_notification_id(notification_id)
    except ValueError:
        raise HttpProblem(404, "There is no such notification.") from None


@api.get("/channels/<id:channel_id>/preference")
@endpoint(response=schemas.Preference)
def get_preference(channel_id: int) -> Any:
    """Get the caller's preference for a channel. The level is `all` where none is stored."""
    return preferences.preference_of(current_user(), channel_id)


@api.put("/channels/<id:channel_id>/preference")
@endpoint(body=schemas.PreferenceIn, response=schemas.Preference, publishes=nothing)
def put_preference(channel_id: int, body: dict[str, Any]) -> Any:
    """Set the caller's preference for a channel. A field that is not given gets its default."""
    return preferences.set_preference(current_user(), channel_id, body["level"], body["muted_until"])
