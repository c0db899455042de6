"""Post, edit and delete messages, each together with the run that the change needs."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from peewee import OperationalError
from psycopg.types.json import Jsonb

from belfry.core import idempotency
from belfry.core.db import Row, execute, fetch_all, fetch_one, timed_transaction, transaction
from belfry.core.errors import Conflict, Forbidden
from belfry.core.failpoints import failpoint
from belfry.core.idempotency import IdempotentRequest
from belfry.fanout.claims import lock_message_exclusive
from belfry.fanout.runs import create_run
from belfry.identity import tokens
from belfry.messages import mentions
from belfry.messages.history import find_message, serialize_messages
from belfry.servers.visibility import (
    CAN_POST_SQL,
    VISIBLE_CHANNEL_SQL,
    VisibleChannel,
    access_parameters,
    get_visible_channel,
    require_posting,
)
from models import User

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PostResult:
    """The result of a post or an edit. `answer` is set where a stored response is repeated."""

    message: Row = field(default_factory=dict)
    run_id: int = 0
    answer: str | None = None


def post_message(
    author: User,
    channel_id: int,
    content: str,
    allowed: mentions.AllowedMentions | None = None,
    once: IdempotentRequest | None = None,
    *,
    run_state: str = "queued",
    token_hash: bytes | None = None,
) -> PostResult:
    """Insert a message and its run, both or neither. The caller enqueues the run, or leaves it `pending`.

    With `token_hash`, `author` is a cached user (`tokens.cached_user`), and the statement checks whether the token is
    valid and what its user may do now.

    Raises NotFound where the author cannot see the channel, Forbidden and SubscriptionRequired where they may not post,
    what `idempotency.begin` raises, and Unauthenticated for the token.
    """
    candidates = mentions.find_mentions(content)
    if token_hash and (once or candidates):  # more statements follow in any case
        author, token_hash = tokens.require_token(token_hash), None
    with timed_transaction() if once else nullcontext(0.0) as round_trip:  # one statement needs no transaction
        if once and (answer := idempotency.begin(once, round_trip)):
            return PostResult(answer=answer)
        found = mentions.NO_MENTIONS
        if candidates:
            channel = get_visible_channel(author, channel_id)
            require_posting(author, channel)
            found = resolve_mentions(channel, candidates, may_ping_groups=channel.moderates, allowed=allowed)
        written = _insert(author, token_hash, channel_id, content, allowed, found, run_state)
        run_id = written["run_id"]
        message = {
            "id": written["message_id"],
            "channel_id": channel_id,
            "author": {"id": author.id, "username": written["username"], "name": written["name"]},
            "content": content,
            "created_at": written["created_at"],
            "edited_at": None,
            "mentions": found,
            "warnings": found.warnings,
            "run": {"id": run_id, "state": run_state},  # the state right after the commit
        }
        if once:
            idempotency.save_response(once, message)
            failpoint("post.written", run_id)
    failpoint("post.committed", run_id)
    return PostResult(message, run_id)


_INSERT_SQL = f"""
    WITH viewer AS MATERIALIZED (
        SELECT usr.id, usr.username, usr.name, usr.is_admin
        FROM user_account usr
        WHERE usr.id = %(user_id)s
        AND (%(token_hash)s::bytea IS NULL OR EXISTS (
            SELECT FROM api_token token
            WHERE token.token_hash = %(token_hash)s
            AND token.user_id = usr.id
            AND {tokens.TOKEN_IS_VALID_SQL}
        ))
    ),
    seen AS ({VISIBLE_CHANNEL_SQL}),
    written AS (
        INSERT INTO message (channel_id, author_id, content, allowed_mentions,
            mentioned_users, mentioned_roles, mentions_everyone)
        SELECT seen.id, viewer.id, %(content)s, %(allowed)s::jsonb,
            %(users)s::bigint[], %(roles)s::bigint[], %(everyone)s
        FROM seen, viewer
        WHERE {CAN_POST_SQL}
        RETURNING id, created_at
    ),
    started AS (
        INSERT INTO run (message_id, kind, state)
        SELECT id, 'message', %(run_state)s FROM written
        RETURNING id
    )
    SELECT written.id AS message_id, written.created_at, started.id AS run_id, viewer.username, viewer.name
    FROM written, started, viewer
"""
"""Insert a message and its run, in one round trip and its own transaction. No row where the token is not valid, or the
user may not post."""


def _insert(
    author: User,
    token_hash: bytes | None,
    channel_id: int,
    content: str,
    allowed: mentions.AllowedMentions | None,
    found: mentions.Mentions,
    run_state: str,
) -> Row:
    """{"message_id", "created_at", "run_id", "username", "name"}. Raises as `post_message` does."""
    written = fetch_one(
        _INSERT_SQL,
        {
            **access_parameters(author, channel_id),
            "token_hash": token_hash,
            "content": content,
            "allowed": Jsonb(_allowed_json(allowed)) if allowed else None,
            **_mention_parameters(found),
            "run_state": run_state,
        },
    )
    if written is None:
        author = tokens.require_token(token_hash) if token_hash else author
        require_posting(author, get_visible_channel(author, channel_id))  # raises the reason
        raise Conflict("The permission to post here was changed at the same time. Try again.")
    return written


def resolve_mentions(
    channel: VisibleChannel,
    candidates: tuple[mentions.Candidate, ...],
    *,
    may_ping_groups: bool,
    allowed: mentions.AllowedMentions | None,
) -> mentions.Mentions:
    """Resolve a content's candidates among the members and roles of the channel's server."""
    names = sorted(mentions.possible_names(candidates))
    users_by_name: dict[str, mentions.MentionedUser] = {}
    roles: dict[str, mentions.MentionedRole] = {}
    if names:
        parameters = {"server_id": channel.server_id, "channel_id": channel.id, "names": names}
        for found in fetch_all(
            """
            SELECT usr.id, usr.username,
                NOT chan.private OR EXISTS (
                    SELECT FROM channel_role cr
                    JOIN member_role mr ON mr.role_id = cr.role_id AND mr.user_id = usr.id
                    WHERE cr.channel_id = chan.id
                ) AS sees_channel
            FROM user_account usr
            JOIN member mem ON mem.user_id = usr.id AND mem.server_id = %(server_id)s
            JOIN channel chan ON chan.id = %(channel_id)s
            WHERE usr.username = ANY(%(names)s::text[])
            """,
            parameters,
        ):
            users_by_name[found["username"]] = mentions.MentionedUser(**found)
        for found in fetch_all(
            "SELECT id, name FROM role WHERE server_id = %(server_id)s AND name = ANY(%(names)s::text[])",
            parameters,
        ):
            roles[found["name"]] = mentions.MentionedRole(**found)
    return mentions.resolve(candidates, users_by_name, roles, may_ping_groups=may_ping_groups, allowed=allowed)


def _mention_parameters(found: mentions.Mentions) -> dict[str, Any]:
    return {
        "users": sorted(user.id for user in found.users),
        "roles": sorted(role.id for role in found.roles),
        "everyone": found.everyone,
    }


def _allowed_json(allowed: mentions.AllowedMentions) -> dict[str, Any]:
    return {"users": sorted(allowed.users), "roles": sorted(allowed.roles), "everyone": allowed.everyone}


def _lock_to_change(
    user: User, message_id: int, require_right: Callable[[Row, VisibleChannel], None]
) -> tuple[Row, VisibleChannel]:
    """`find_message`, with no work item processed and no other change until the transaction ends.

    The right is checked twice: before locking, so that a user without it delays nobody, and after, as it is then.
    """
    require_right(*find_message(user, message_id))
    lock_message_exclusive(message_id)
    failpoint("message.locked")
    found = find_message(user, message_id)
    require_right(*found)
    return found


def edit_message(editor: User, message_id: int, content: str) -> PostResult:
    """Replace a message's content. `run_id` is 0 where the mentions do not change.

    Otherwise a run of kind `edit` notifies the newly mentioned, and retracts unread notifications of removed mentions.
    Raises NotFound; Forbidden unless the user is the author; what `post_message` raises.
    """
    def require_right(stored: Row, channel: VisibleChannel) -> None:
        if stored["author_id"] != editor.id:
            raise Forbidden("Only the author may edit a message.")
        require_posting(editor, channel)

    with transaction():
        stored, channel = _lock_to_change(editor, message_id, require_right)
        allowed = stored["allowed_mentions"]
        found = resolve_mentions(
            channel,
            mentions.find_mentions(content),
            may_ping_groups=channel.moderates,
            allowed=mentions.AllowedMentions(
                frozenset(allowed["users"]), frozenset(allowed["roles"]), allowed["everyone"]
            )
            if allowed
            else None,
        )
        now = _mention_parameters(found)
        written = fetch_one(
            """
            UPDATE message
            SET content = %(content)s,
                mentioned_users = %(users)s::bigint[],
                mentioned_roles = %(roles)s::bigint[],
                mentions_everyone = %(everyone)s,
                edited_at = now()
            WHERE id = %(message_id)s
            RETURNING edited_at
            """,
            {"content": content, "message_id": message_id, **now},
        )
        assert written is not None
        changes = _mention_diff(stored, now)
        run_id = create_run(message_id, "edit", changes) if any(changes.values()) else 0
        message = serialize_messages(editor, [{**stored, "content": content, "edited_at": written["edited_at"]}])[0]
        failpoint("edit.written", run_id)
    failpoint("edit.committed", run_id)
    return PostResult({**message, "mentions": found, "warnings": found.warnings}, run_id)


def _mention_diff(stored: Row, now: dict[str, Any]) -> dict[str, Any]:
    users, roles = set(stored["mentioned_users"]), set(stored["mentioned_roles"])
    return {
        "added_users": sorted(set(now["users"]) - users),
        "added_roles": sorted(set(now["roles"]) - roles),
        "added_everyone": now["everyone"] and not stored["mentions_everyone"],
        "removed_users": sorted(users - set(now["users"])),
        "removed_roles": sorted(roles - set(now["roles"])),
        "removed_everyone": stored["mentions_everyone"] and not now["everyone"],
    }


def delete_message(user: User, message_id: int) -> dict[str, int | None]:
    """Delete a message. From the commit on its notifications are not shown, and no work item notifies of it.

    Returns how many of them were unread, and are retracted by this, and how many had been read: {"retracted", "read"},
    with None where counting takes longer than COUNT_SECONDS. Raises NotFound; Forbidden unless the user is the author,
    a moderator or an admin.
    """
    def require_right(stored: Row, channel: VisibleChannel) -> None:
        if stored["author_id"] != user.id and not channel.moderates:
            raise Forbidden("Only the author, a moderator or an admin may delete a message.")

    with transaction():
        _, channel = _lock_to_change(user, message_id, require_right)
        execute("UPDATE message SET deleted_at = now() WHERE id = %(id)s", {"id": message_id})
        failpoint("delete.written")
    try:
        with transaction(statement_timeout=f"{COUNT_SECONDS}s"):
            return fetch_one(_COUNT_NOTIFICATIONS_SQL, {"message_id": message_id, "server_id": channel.server_id}) or {}
    except OperationalError as error:
        log.warning("the notifications of deleted message %s are not counted: %s", message_id, error)
        return {"retracted": None, "read": None}


COUNT_SECONDS = 2
_COUNT_NOTIFICATIONS_SQL = """
    SELECT count(*) FILTER (WHERE note.read_at IS NULL) AS retracted,
        count(*) FILTER (WHERE note.read_at IS NOT NULL) AS read
    FROM member
    JOIN notification note ON note.user_id = member.user_id AND note.message_id = %(message_id)s
    WHERE member.server_id = %(server_id)s
    AND note.dismissed_at IS NULL
"""
