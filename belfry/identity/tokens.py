"""API tokens: create, list, revoke, and find the user of one. Only a token's hash is stored."""

import hashlib
import secrets
from datetime import datetime

from belfry.core.db import Row, execute, fetch_all, fetch_one
from belfry.core.errors import Forbidden, NotFound, Unauthenticated
from belfry.identity.users import SYSTEM_USERNAME, find_user
from config import tuning
from models import User

TOKEN_IS_VALID_SQL = "(token.revoked_at IS NULL AND (token.expires_at IS NULL OR token.expires_at > now()))"  # noqa: S105
"""Of a row of `api_token t`: neither revoked nor expired."""
_cache: dict[bytes, User] = {}  # by a token's hash
TOKEN_PREFIX = "belfry_"  # so that a leaked one can be recognised  # noqa: S105


def hash_token(token: str) -> bytes:
    """What is stored of a token. It has 256 random bits: a plain hash is enough, and one lookup finds it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def create_token(user: User, expires_at: datetime | None = None) -> tuple[Row, str]:
    """A new token: what is stored of it, and the token itself, which cannot be had again.

    Raises Forbidden for Belfry's own account: nobody signs in with it.
    """
    if user.username == SYSTEM_USERNAME:
        raise Forbidden("This account is Belfry's own: nobody signs in with it.")
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    made = fetch_one(
        "INSERT INTO api_token (user_id, token_hash, expires_at)"
        " VALUES (%(user_id)s, %(token_hash)s, %(expires_at)s)"
        " RETURNING id, created_at, expires_at, revoked_at",
        {"user_id": user.id, "token_hash": hash_token(token), "expires_at": expires_at},
    )
    assert made is not None
    return made, token


def list_tokens(user_id: int, *, after: int, limit: int, current: bytes = b"") -> list[Row]:
    """List a user's tokens by id, without the tokens themselves; `current` is true for the one with that hash.

    Raises NotFound for the user.
    """
    find_user(user_id)
    return fetch_all(
        "SELECT id, created_at, expires_at, revoked_at, token_hash = %(current)s AS current FROM api_token"
        " WHERE user_id = %(user_id)s AND id > %(after)s ORDER BY id LIMIT %(limit)s",
        {"user_id": user_id, "after": after, "limit": limit, "current": current},
    )


def revoke_token(user_id: int, token_id: int) -> None:
    """End a token, now. Raises NotFound; ending one twice is no error."""
    found = execute(
        "UPDATE api_token SET revoked_at = COALESCE(revoked_at, now()) WHERE id = %(id)s AND user_id = %(user_id)s",
        {"id": token_id, "user_id": user_id},
    )
    if not found:
        raise NotFound(f"There is no token {token_id} of user {user_id}.")


def authenticate(token: str) -> User | None:
    """Whose token this is; None where it is unknown, revoked or expired. One query."""
    return authenticate_hash(hash_token(token))


def authenticate_hash(token_hash: bytes) -> User | None:
    """As `authenticate`, for a session that keeps the hash."""
    found = fetch_one(  # as SQL: every request asks this, and peewee would put it together anew each time
        f"""
        SELECT usr.id, usr.username, usr.name, usr.email, usr.is_admin, usr.created_at
        FROM api_token token
        JOIN user_account usr ON usr.id = token.user_id
        WHERE token.token_hash = %(token_hash)s
        AND {TOKEN_IS_VALID_SQL}
        """,
        {"token_hash": token_hash},
    )
    if found is None:
        evict(token_hash)
        return None
    if len(_cache) >= tuning.token_cache_size:
        _cache.clear()
    user = _cache[token_hash] = User(**found)
    return user


def require_token(token_hash: bytes) -> User:
    """Whose token this is. Raises Unauthenticated where `authenticate` finds nobody."""
    user = authenticate_hash(token_hash)
    if user is None:
        raise Unauthenticated("This token is unknown, or it was revoked or has expired.")
    return user


def cached_user(token_hash: bytes) -> User | None:
    """Whose token this was when it was last asked for; None where that is forgotten. No query.

    It never becomes another's. Whether it is valid still, and what its person may, is not known by this: whoever goes
    by it asks for that in the statement that does something, as `messages.post_message` does.
    """
    return _cache.get(token_hash)


def evict(token_hash: bytes) -> None:
    """Whoever comes with this token is asked for anew."""
    _cache.pop(token_hash, None)
