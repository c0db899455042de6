"""Why somebody was, or was not, told of a message."""
from belfry.core.db import Row, fetch_one
from belfry.core.errors import Forbidden, NotFound
from belfry.core.partitions import oldest_retained_message_id
from belfry.fanout.decision import DECISIONS, NOTIFY_DECISIONS, FanoutMessage, decision_for, load_fanout_message
from belfry.messages.history import find_message
from belfry.servers.visibility import author_can_post, is_member
from models import User


def explain(reader: User | None, message_id: int, user_id: int) -> Row:
    """{"user_id", "message_id", "decision", "detail", "notified_at", "read_at"}.

    - Where a notification exists: the reason that counted when it was made, and since when it is read.
    - Else what the rules say now. The author and admins see the same answer as the member.

    `reader` None is an operator at the command line. Raises NotFound where the reader may not know of the
    message, or the person is no member of its server and never was told; Forbidden where a member asks
    about somebody else.
    """
    if reader is not None and not reader.is_admin:
        find_message(reader, message_id)
        if user_id != reader.id:
            raise Forbidden("Only admins ask about somebody else.")
    subject = load_fanout_message(message_id)
    if subject is None:
        raise NotFound(f"There is no message {message_id}.")
    told = fetch_one(
        "SELECT reason::text AS reason, created_at, read_at FROM notification"
        " WHERE user_id = %(user_id)s AND message_id = %(message_id)s",
        {"user_id": user_id, "message_id": message_id},
    )
    decision = told["reason"] if told else decision_for(subject, user_id)
    if decision is None:
        raise NotFound(f"Nobody with id {user_id} is a member of the message's server.")
    return {
        "user_id": user_id,
        "message_id": message_id,
        "decision": decision,
        "detail": _detail(decision, bool(told), subject, user_id),
        "notified_at": told["created_at"] if told else None,
        "read_at": told["read_at"] if told else None,
    }


def _detail(decision: str, told: bool, subject: FanoutMessage, user_id: int) -> str:
    sentences = [DECISIONS[decision]]
    if told and not is_member(user_id, subject.server_id):
        sentences.append("They have left the server since.")
    if not author_can_post(subject.message_id):
        sentences.append("Its author may no longer post in the channel: while that is so, it is shown to nobody.")
    if subject.deleted:
        sentences.append("The message has been deleted since, and is shown to nobody.")
    elif not told and subject.message_id < oldest_retained_message_id():
        sentences.append("This is what the rules say now: notifications of messages that old are not kept.")
    elif not told and decision in NOTIFY_DECISIONS:
        sentences.append("They have no notification yet: its run is not there yet, or the rules said no when it was.")
    return " ".join(sentences)
