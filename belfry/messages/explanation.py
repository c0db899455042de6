"""Explain why a user was or was not notified of a message."""
from belfry.core.db import Row, fetch_one
from belfry.core.errors import Forbidden, NotFound
from belfry.core.partitions import oldest_retained_message_id
from belfry.fanout.decision import DECISIONS, NOTIFY_DECISIONS, FanoutMessage, decision_for, load_fanout_message
from belfry.messages.history import find_message
from belfry.servers.visibility import author_can_post, is_member
from models import User


def explain(viewer: User | None, message_id: int, user_id: int) -> Row:
    """{"user_id", "message_id", "decision", "detail", "notified_at", "read_at"}.

    Where a notification exists, its reason is the decision; otherwise the rules of now decide. The author and admins
    see the same answer as the member. `viewer` None is an operator at the command line.

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
        "SELECT reason::text AS reason, created_at, read_at FROM notification"
        " WHERE user_id = %(user_id)s AND message_id = %(message_id)s",
        {"user_id": user_id, "message_id": message_id},
    )
    decision = notification["reason"] if notification else decision_for(message, user_id)
    if decision is None:
        raise NotFound(f"There is no member {user_id} in the message's server.")
    return {
        "user_id": user_id,
        "message_id": message_id,
        "decision": decision,
        "detail": _detail(decision, bool(notification), message, user_id),
        "notified_at": notification["created_at"] if notification else None,
        "read_at": notification["read_at"] if notification else None,
    }


def _detail(decision: str, notified: bool, message: FanoutMessage, user_id: int) -> str:
    sentences = [DECISIONS[decision]]
    if notified and not is_member(user_id, message.server_id):
        sentences.append("They have left the server since.")
    if not author_can_post(message.message_id):
        sentences.append("The author may no longer post in the channel, so nobody is shown the message.")
    if message.deleted:
        sentences.append("The message has been deleted since, so nobody is shown it.")
    elif not notified and message.message_id < oldest_retained_message_id():
        sentences.append("This is the decision by the rules of now: notifications of messages that old are not kept.")
    elif not notified and decision in NOTIFY_DECISIONS:
        sentences.append("There is no notification yet: the run has not reached them, or decided otherwise.")
    return " ".join(sentences)
