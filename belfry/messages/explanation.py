"""Explain why a user was or was not notified of a message."""

from belfry.core.db import Row, fetch_one
from belfry.core.errors import Forbidden, NotFound
from belfry.core.partitions import oldest_retained_message_id
from belfry.fanout.decision import DECISIONS, NOTIFY_DECISIONS, FanoutMessage, decision_for, load_fanout_message
from belfry.fanout.runs import runs_of_messages
from belfry.messages.history import find_message
from belfry.servers.visibility import author_can_post, is_member
from models import User


def explain(viewer: User | None, message_id: int, user_id: int) -> Row:
    """{"user_id", "message_id", "decision", "detail", "notified_at", "read_at"}.

    Where a notification exists, its reason is the decision. Otherwise nothing was recorded for the user, so the rules
    and settings of now decide, and `detail` says so. Every viewer gets the same answer. `viewer` None is an operator at
    the command line.

    Raises NotFound where the viewer cannot see the message, or the user is not a member of its server and was never
    notified; Forbidden where a member asks about another user.
    """
    if viewer is not None and not viewer.is_admin:
        find_message(viewer, message_id)
        if user_id != viewer.id:
            raise Forbidden("Only admins may ask about other users.")
    message = load_fanout_message(message_id)
    if message is None:
        raise NotFound(f"There is no message {message_id}.")
    notification = fetch_one(
        "SELECT reason::text AS reason, created_at, read_at, dismissed_at FROM notification"
        " WHERE user_id = %(user_id)s AND message_id = %(message_id)s",
        {"user_id": user_id, "message_id": message_id},
    )
    decision = notification["reason"] if notification else decision_for(message, user_id)
    if decision is None:
        if message.visible_to_user_id not in (None, user_id):
            raise NotFound(f"Message {message_id} is a test message for another user.")
        raise NotFound(f"There is no member {user_id} in the message's server.")
    return {
        "user_id": user_id,
        "message_id": message_id,
        "decision": decision,
        "detail": _detail(decision, notification, message, user_id),
        "notified_at": notification["created_at"] if notification else None,
        "read_at": notification["read_at"] if notification else None,
    }


def _detail(decision: str, notification: Row | None, message: FanoutMessage, user_id: int) -> str:
    sentences = [DECISIONS[decision]]
    if notification:
        if not is_member(user_id, message.server_id):
            sentences.append("They have left the server since.")
        if notification["dismissed_at"]:
            sentences.append("They have removed the notification from their inbox.")
    if not author_can_post(message.message_id):
        sentences.append("The author may no longer post in the channel, so nobody is shown the message.")
    if message.deleted:
        sentences.append("The message has been deleted since, so nobody is shown it.")
    if not notification and decision != "author":
        sentences.append(_without_notification(decision, message))
    return " ".join(sentences)


def _without_notification(decision: str, message: FanoutMessage) -> str:
    """Why there is no notification, where the rules of now alone do not say it."""
    if message.message_id < oldest_retained_message_id():
        return "Notifications of messages that old are not kept: this is the decision by the rules of now."
    run = runs_of_messages([message.message_id]).get(message.message_id)
    if decision in NOTIFY_DECISIONS and run and not message.deleted:
        if run["state"] == "failed":
            return "They are not notified yet: the fan-out failed."
        if run["state"] != "succeeded":
            return "They are not notified yet: the fan-out is not finished."
    return "They have no notification, so this is the decision by the rules and settings of now."
