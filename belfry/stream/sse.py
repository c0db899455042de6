"""Server-sent events: how the live stream puts into words what is new."""

import json
from collections.abc import Iterable
from typing import Any

import schemas
from belfry.stream.cursor import StreamCursor
from belfry.stream.resuming import MAX_RESUMED_NOTIFICATIONS
from belfry.stream.updates import Updates

Dumped = dict[tuple[Any, ...], str]

_notification = schemas.Notification()


def event(kind: str, text: str, position: StreamCursor) -> bytes:
    """A server-sent event. The position is what `Last-Event-ID` will say."""
    return f"event: {kind}\nid: {position}\ndata: {text}\n\n".encode()


def events_of(found: Updates, here: StreamCursor, user_ids: Iterable[int], dumped: Dumped) -> dict[int, list[bytes]]:
    """What to send to whom. A notification that many users have alike is serialized once, but for its id, and kept in
    `dumped` for further calls."""
    if found.overflow:
        return {user_id: [event("reset", "{}", here)] for user_id in user_ids}
    events: dict[int, list[bytes]] = {}
    for user_id, sent in found.notifications.items():
        if len(sent) > MAX_RESUMED_NOTIFICATIONS:
            events[user_id] = [event("reset", "{}", here)]
            continue
        for position, notification in sent:
            alike = tuple(notification[name] for name in ("message_id", "reason", "created_at", "read_at"))
            if alike not in dumped:
                shape = _notification.dump(notification)
                del shape["id"]
                dumped[alike] = json.dumps(shape, ensure_ascii=False)[1:]
            text = f'{{"id": "{notification["id"]}", {dumped[alike]}'
            events.setdefault(user_id, []).append(event("notification", text, position))
    return events
