"""Users: create, find, change and list them."""

from typing import Any

from peewee import IntegrityError, fn

from belfry.core.db import db
from belfry.core.errors import Conflict, NotFound
from belfry.core.failpoints import failpoint
from models import User

SYSTEM_USERNAME = "belfry"  # the account that sends Belfry's own messages


def create_user(username: str, name: str | None = None, email: str | None = None, *, is_admin: bool = False) -> User:
    """Create a user. Raises Conflict where the username is taken."""
    try:
        with db.atomic():
            return User.create(username=username, name=name or username, email=email, is_admin=is_admin)
    except IntegrityError:
        raise Conflict(f"The username {username} is taken.") from None


def find_user(user_id: int) -> User:
    """Find a user by id. Raises NotFound."""
    user = User.get_or_none(User.id == user_id)
    if user is None:
        raise NotFound(f"There is no user {user_id}.")
    return user


def _lower(username: str) -> str:
    """Lower the case of ASCII letters only: the lower case of the Kelvin sign is `k`, but it is another character."""
    return username.lower() if username.isascii() else username


def find_user_by_username(username: str) -> User:
    """Find a user by username, in any case. Raises NotFound."""
    user = User.get_or_none(User.username == _lower(username))
    if user is None:
        raise NotFound(f"There is no user {username}.")
    return user


def update_user(user_id: int, changes: dict[str, Any]) -> User:
    """Change name, email or is_admin. Raises NotFound."""
    user = find_user(user_id)
    failpoint("user.read")
    if changes.get("is_admin", user.is_admin) != user.is_admin:
        user.admin_changed_at = fn.now()  # by the database's clock
    for column, value in changes.items():
        setattr(user, column, value)
    user.save()
    return user


def list_users(*, after: int, limit: int, username: str | None = None) -> list[User]:
    """List users by id, above id `after`; only the one with `username`, if given."""
    found = User.select().where(User.id > after).order_by(User.id).limit(limit)
    return list(found.where(User.username == _lower(username)) if username is not None else found)
