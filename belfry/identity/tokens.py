"""API tokens: create, list, revoke, and find the user of one. Only a token's hash is stored."""

import hashlib
import secrets
from datetime import UTC, datetime, timedelta

from belfry.core.db import Row, execute, fetch_all, fetch_one
from belfry.core.errors import Forbidden, NotFound, Unauthenticated
from belfry.identity.users import SYSTEM_USERNAME, find_user
from config import tuning
from models import User

TOKEN_IS_VALID_SQL = "(token.revoked_at IS NULL AND (token.expires_at IS NULL OR token.expires_at > now()))"  # noqa: S105
"""Whether an `api_token token` is neither revoked nor expired."""
_cache: dict[bytes, User] = {}  # {token's hash: user}
TOKEN_PREFIX = "belfry_"  # makes a leaked token recognisable  # noqa: S105
LOGIN_LINK_PREFIX = "belfry-link_"
LOGIN_LINK_MINUTES = 10


def hash_token(token: str) -> bytes:
    """The hash that is stored of a token. A token has 256 random bits, so a plain hash is safe."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def create_token(
    user: User, expires_at: datetime | None = None, prefix: str = TOKEN_PREFIX
) -> tuple[Row, str]:
    """Create a token; (its stored row, the token, which cannot be read again).

    Raises Forbidden for Belfry's own account, with which nobody signs in.
    """
    if user.username == SYSTEM_USERNAME:
        raise Forbidden("This is Belfry's own account. It cannot sign in.")
    token = prefix + secrets.token_urlsafe(32)
    made = fetch_one(
        "INSERT INTO api_token (user_id, token_hash, expires_at)"
        " VALUES (%(user_id)s, %(token_hash)s, %(expires_at)s)"
        " RETURNING id, created_at, expires_at, revoked_at",
        {"user_id": user.id, "token_hash": hash_token(token), "expires_at": expires_at},
    )
    assert made is not None
    return made, token


def create_login_link(user: User) -> str:
    """Create the secret of a link that signs a user in once, within LOGIN_LINK_MINUTES.

    It is stored as a token, but does not authenticate requests: `bearer_token` does not accept its prefix. Raises as
    `create_token`.
    """
    expires_at = datetime.now(UTC) + timedelta(minutes=LOGIN_LINK_MINUTES)
    return create_token(user, expires_at, prefix=LOGIN_LINK_PREFIX)[1]


def redeem_login_link(secret: str, days: int) -> str | None:
    """Exchange the secret of a login link for a token of this many days; None where it was used, or has expired."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    redeemed = execute(
        f"""
        WITH used AS (
            UPDATE api_token token SET revoked_at = now()
            WHERE token.token_hash = %(link)s
            AND {TOKEN_IS_VALID_SQL}
            RETURNING user_id
        )
        INSERT INTO api_token (user_id, token_hash, expires_at)
        SELECT user_id, %(token)s, now() + make_interval(days => %(days)s) FROM used
        """,
        {"link": hash_token(secret), "token": hash_token(token), "days": days},
    )
    return token if redeemed else None


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
    """Revoke a token at once. Does nothing where it is revoked already. Raises NotFound."""
    found = execute(
        "UPDATE api_token SET revoked_at = COALESCE(revoked_at, now()) WHERE id = %(id)s AND user_id = %(user_id)s",
        {"id": token_id, "user_id": user_id},
    )
    if not found:
        raise NotFound(f"There is no token {token_id} of user {user_id}.")


def authenticate(token: str) -> User | None:
    """Find the user of a token, in one query; None where it is unknown, revoked or expired."""
    return authenticate_hash(hash_token(token))


def authenticate_hash(token_hash: bytes) -> User | None:
    """As `authenticate`, by the token's hash."""
    found = fetch_one(  # as SQL: every request executes this, and peewee would build it each time
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
    """As `authenticate`, but raises Unauthenticated where there is no user."""
    user = authenticate_hash(token_hash)
    if user is None:
        raise Unauthenticated("This token is unknown, or it was revoked or has expired.")
    return user


def cached_user(token_hash: bytes) -> User | None:
    """The cached user of a token, without a query; None where it is not cached.

    A token never changes its user. The cache does not know whether the token is still valid and what the user may do:
    the statement that does something must check it, as `messages.post_message` does.
    """
    return _cache.get(token_hash)


def evict(token_hash: bytes) -> None:
    """Remove a token from the cache."""
    _cache.pop(token_hash, None)
