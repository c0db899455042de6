"""Messages: post, read, edit, delete, and explain who was notified."""

import re
from contextlib import suppress
from typing import Any

from flask import Response, g, json, request
from peewee import InterfaceError, OperationalError

import schemas
from belfry.core.errors import Invalid
from belfry.core.idempotency import IdempotentRequest, save_response
from belfry.messages import explanation, history, messages, search
from belfry.messages.mentions import AllowedMentions
from belfry.queue.queues import enqueue_run, queue_is_full
from belfry.web.endpoint import (
    ApiResponse,
    api,
    current_user,
    defers_token_check,
    deleted_message,
    edited_message,
    endpoint,
    json_response,
    mark_token_checked,
    nothing,
    paginate,
)
from belfry.web.rate_limit import limit_messages

_message = schemas.Message()


def _render(message: Any) -> str:
    return json.dumps(_message.dump(message), ensure_ascii=False)


def _once(body: dict[str, Any]) -> IdempotentRequest | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]{1,255}", key):
        raise Invalid({"Idempotency-Key": ["Must have 1 to 255 visible ASCII characters."]})
    return IdempotentRequest(current_user().id, key, request.get_json(), _render)


@api.post("/messages")
@defers_token_check
@limit_messages
@endpoint(body=schemas.MessageIn, response=schemas.Message, status=201, publishes=nothing)
def post_message(body: dict[str, Any]) -> ApiResponse | Response:
    """Post a message. A run notifies the members; the response does not wait for it."""
    allowed = body["allowed_mentions"]
    once = _once(body)
    pending = queue_is_full()
    posted = messages.post_message(
        current_user(),
        body["channel_id"],
        body["content"],
        AllowedMentions(frozenset(allowed["users"]), frozenset(allowed["roles"]), allowed["everyone"])
        if allowed
        else None,
        once,
        run_state="pending" if pending else "queued",
        token_hash=g.token_hash,
    )
    mark_token_checked()
    if posted.answer is not None:
        location = f"/api/messages/{json.loads(posted.answer)['id']}"
        return json_response(posted.answer, 201, {"Location": location, "Idempotency-Replayed": "true"})
    message = posted.message
    if not pending and not enqueue_run(posted.run_id):
        message["run"]["state"] = "pending"
        if once:
            with suppress(OperationalError, InterfaceError):  # the message is posted in any case
                save_response(once, message)
    return ApiResponse(message, headers={"Location": f"/api/messages/{message['id']}"})


@api.get("/channels/<id:channel_id>/messages")
@endpoint(query=schemas.Page, response=schemas.Message)
def list_messages(channel_id: int, query: dict[str, Any]) -> Any:
    """List a channel's messages, newest first. 404 for a channel that the caller cannot see."""
    return paginate(
        query,
        lambda before, limit: history.list_messages(current_user(), channel_id, before=before, limit=limit),
        lambda message: message["id"],
    )


@api.get("/messages/search")
@endpoint(query=schemas.SearchQuery, response=schemas.Message)
def search_messages(query: dict[str, Any]) -> Any:
    """Search the messages that the caller can see by their words. The newest are first."""
    found, cursor = paginate(
        query,
        lambda before, limit: search.search(
            current_user(), query["q"], channel_id=query["channel_id"], before=before, limit=limit
        ),
        lambda message: message["id"],
    )
    return history.serialize_messages(current_user(), found), cursor


@api.get("/messages/<id:message_id>")
@endpoint(response=schemas.Message)
def get_message(message_id: int) -> Any:
    """Get a message as it is now. `run` is its newest run, for the author and admins; null for others."""
    stored, _ = history.find_message(current_user(), message_id)
    return history.serialize_messages(current_user(), [stored])[0]


@api.patch("/messages/<id:message_id>")
@limit_messages
@endpoint(body=schemas.MessageChange, response=schemas.Message, publishes=edited_message)
def edit_message(message_id: int, body: dict[str, Any]) -> Any:
    """Edit one's own message. A run notifies new mentions, and retracts unread notifications of removed ones."""
    posted = messages.edit_message(current_user(), message_id, body["content"])
    message = posted.message
    if posted.run_id:
        enqueued = enqueue_run(posted.run_id)
        message["run"] = {"id": posted.run_id, "state": "queued" if enqueued else "pending"}
    return message


@api.delete("/messages/<id:message_id>")
@endpoint(response=schemas.DeletedMessage, publishes=deleted_message)
def delete_message(message_id: int) -> Any:
    """Delete a message, as its author, a moderator or an admin. Its notifications are not shown any more."""
    return messages.delete_message(current_user(), message_id)


@api.get("/messages/<id:message_id>/explain")
@endpoint(query=schemas.ExplainQuery, response=schemas.Explanation)
def explain(message_id: int, query: dict[str, Any]) -> Any:
    """Explain why a user was or was not notified. Admins may ask about any user, others about themselves."""
    return explanation.explain(current_user(), message_id, query["user_id"] or current_user().id)
