"""Server-sent events: serialize what a stream sends."""

import json
from collections.abc import Iterable
from typing import Any

import schemas
from belfry.stream.cursor import StreamCursor
from belfry.stream.resuming import MAX_RESUMED_NOTIFICATIONS
from belfry.stream.updates import Updates

Serialized = dict[tuple[Any, ...], str]

_notification = schemas.Notification()


def event(name: str, text: str, cursor: StreamCursor) -> bytes:
    """Serialize an event. The cursor becomes the client's `Last-Event-ID`."""
    return f"event: {name}\nid: {cursor}\ndata: {text}\n\n".encode()


def events_of(
    found: Updates, here: StreamCursor, user_ids: Iterable[int], serialized: Serialized
) -> dict[int, list[bytes]]:
    """Serialize updates: {user id: events}.

    A notification that many users have in common is serialized once, except for its id, and kept in `serialized` for
    further calls.
    """
    if found.overflow:
        return {user_id: [event("reset", "{}", here)] for user_id in user_ids}
    events: dict[int, list[bytes]] = {}
    for user_id, sent in found.notifications.items():
        if len(sent) > MAX_RESUMED_NOTIFICATIONS:
            events[user_id] = [event("reset", "{}", here)]
            continue
        for cursor, notification in sent:
            key = tuple(notification[name] for name in ("message_id", "reason", "created_at", "read_at"))
            if key not in serialized:
                shape = _notification.dump(notification)
                del shape["id"]
                serialized[key] = json.dumps(shape, ensure_ascii=False)[1:]
            text = f'{{"id": "{notification["id"]}", {serialized[key]}'
            events.setdefault(user_id, []).append(event("notification", text, cursor))
    return events
