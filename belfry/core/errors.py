"""The errors of the domain, each with its `code` in the API. The web and the commands present each in their own way."""


class DomainError(Exception):
    """A request that the rules do not permit. `code` is in the API's errors; `detail` is for the user."""

    code = "refused"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Unauthenticated(DomainError):
    """The caller is unknown: no token, or one that is unknown, revoked or expired."""

    code = "unauthenticated"


class NotFound(DomainError):
    """It does not exist, or the caller may not know that it does: the two must look the same."""

    code = "not_found"


class Forbidden(DomainError):
    """The caller may know of it, but does not have the right."""

    code = "forbidden"


class SubscriptionRequired(Forbidden):
    """The author is neither an admin nor an active subscriber."""

    code = "subscription_required"


class Conflict(DomainError):
    """It conflicts with something that exists or is in progress."""

    code = "conflict"


class IdempotencyMismatch(DomainError):
    """The idempotency key was used before with another body."""

    code = "idempotency_mismatch"


class Invalid(DomainError):
    """The request is well-formed, but a field is invalid. `errors` is {field: [reason, ...]}."""

    code = "invalid"

    def __init__(self, errors: dict[str, list[str]]) -> None:
        super().__init__("; ".join(f"{field}: {' '.join(why)}" for field, why in errors.items()))
        self.errors = errors


def truncate(text: str, characters: int) -> str:
    """Shorten a text to its first characters and `…`, so that the caller's text is not sent back whole."""
    return text if len(text) <= characters else f"{text[:characters]}…"
