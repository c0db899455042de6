"""Sessions of browsers: one row each, which decides whether a cookie is valid.

The cookie carries a random id of 256 bits; the row holds its SHA-256. A session ends with the first of:

1. signing out, signing in again with the same cookie, or signing out everywhere: the row is deleted;
2. the revocation or expiry of the token that opened it;
3. IDLE_DAYS without a request (an open stream is not a request), and AGE_DAYS after signing in;
4. PER_TOKEN later sessions of the same token: the one that was idle longest is deleted.
"""

import secrets
from dataclasses import dataclass

from belfry.core.db import execute, fetch_one
from belfry.identity.tokens import LOGIN_LINK_PREFIX, TOKEN_IS_VALID_SQL, hash_token, redeem_login_link
from models import User

IDLE_DAYS = 7
AGE_DAYS = 31
SEEN_MINUTES = 5  # between two updates of `last_seen_at`, so that not every request writes
PER_TOKEN = 50
SESSION_IS_OPEN_SQL = (
    f"(session.last_seen_at > now() - interval '{IDLE_DAYS} days'"
    f" AND session.created_at > now() - interval '{AGE_DAYS} days')"
)
"""Whether a `session` is neither idle nor too old."""

_FIND_SQL = f"""
    SELECT usr.id, usr.username, usr.name, usr.email, usr.is_admin, usr.created_at,
        token.token_hash,
        session.last_seen_at < now() - interval '{SEEN_MINUTES} minutes' AS is_stale
    FROM session
    JOIN api_token token ON token.id = session.token_id
    JOIN user_account usr ON usr.id = token.user_id
    WHERE session.session_hash = %(session_hash)s
    AND {SESSION_IS_OPEN_SQL}
    AND {TOKEN_IS_VALID_SQL}
"""
"""The open session with this hash, with its user and token. Locks nothing."""

_OPEN_SQL = f"""
    INSERT INTO session (session_hash, token_id)
    SELECT %(session_hash)s, token.id
    FROM api_token token
    WHERE token.token_hash = %(token_hash)s
    AND {TOKEN_IS_VALID_SQL}
    RETURNING token_id
"""
"""Insert a session, if the token is valid. Shares a lock on the token's row, for which its deletion waits."""

_DELETE_SURPLUS_SQL = """
    DELETE FROM session
    WHERE session_hash IN (
        SELECT session_hash
        FROM session
        WHERE token_id = %(token_id)s
        ORDER BY last_seen_at DESC
        OFFSET %(kept)s
    )
"""
"""Delete a token's sessions beyond the ones seen last. Locks the deleted rows."""


@dataclass(frozen=True)
class Session:
    """An open session: the hash of its id, its user, and the hash of the token that opened it."""

    session_hash: bytes
    user: User
    token_hash: bytes


def open_session(token: str) -> str | None:
    """Open a session with a token, or with the secret of a login link, which is used by that.

    Returns the session's id for the cookie, None where the token or the link is not valid.
    """
    if token.startswith(LOGIN_LINK_PREFIX):
        token = redeem_login_link(token, AGE_DAYS) or ""
    session_id = secrets.token_urlsafe(32)
    opened = fetch_one(_OPEN_SQL, {"session_hash": hash_token(session_id), "token_hash": hash_token(token)})
    if opened is None:
        return None
    execute(_DELETE_SURPLUS_SQL, {"token_id": opened["token_id"], "kept": PER_TOKEN})
    return session_id


def find_session(session_id: str) -> Session | None:
    """Find the open session with this id, in one query; None where there is none, or it has ended.

    Updates `last_seen_at` where it is older than SEEN_MINUTES.
    """
    session_hash = hash_token(session_id)
    found = fetch_one(_FIND_SQL, {"session_hash": session_hash})
    if found is None:
        return None
    token_hash = bytes(found.pop("token_hash"))
    if found.pop("is_stale"):
        execute(
            "UPDATE session SET last_seen_at = now() WHERE session_hash = %(session_hash)s",
            {"session_hash": session_hash},
        )
    return Session(session_hash, User(**found), token_hash)


def end_session(session_hash: bytes) -> None:
    """End one session. Does nothing where it has ended already."""
    execute("DELETE FROM session WHERE session_hash = %(session_hash)s", {"session_hash": session_hash})


def end_all_sessions(user_id: int) -> int:
    """End every session of a user; how many. The user's tokens stay valid."""
    return execute(
        "DELETE FROM session USING api_token token WHERE token.id = session.token_id AND token.user_id = %(user_id)s",
        {"user_id": user_id},
    )


def delete_idle_sessions(limit: int) -> int:
    """Delete up to `limit` idle sessions; how many.

    Sessions that ended by age, or with their token, are not used any more, so they are among these IDLE_DAYS later.
    """
    return execute(
        f"""
        DELETE FROM session WHERE session_hash IN (
            SELECT session_hash
            FROM session
            WHERE last_seen_at <= now() - interval '{IDLE_DAYS} days'
            ORDER BY last_seen_at
            LIMIT %(limit)s
        )
        """,
        {"limit": limit},
    )
