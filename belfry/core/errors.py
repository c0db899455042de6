"""What the domain refuses, by the contract's codes. The web and the commands each say it in their own way."""


class DomainError(Exception):
    """A request that the rules do not allow. `code` is the contract's name; the text is for the person."""

    code = "refused"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Unauthenticated(DomainError):
    """Nobody, as far as can be told: no token, or one that is unknown, was revoked or has expired."""

    code = "unauthenticated"


class NotFound(DomainError):
    """It does not exist, or the caller may not know that it does: the two must look the same."""

    code = "not_found"


class Forbidden(DomainError):
    """The caller may know of it, but it is not theirs to do."""

    code = "forbidden"


class SubscriptionRequired(Forbidden):
    """The author is neither an admin nor an active subscriber."""

    code = "subscription_required"


class Conflict(DomainError):
    """It cannot be done beside something that exists, or is under way."""

    code = "conflict"


class IdempotencyMismatch(DomainError):
    """This key came before, with another body."""

    code = "idempotency_mismatch"


class Invalid(DomainError):
    """Well-formed, but a field is wrong. `errors` is {field: [why, ...]}."""

    code = "invalid"

    def __init__(self, errors: dict[str, list[str]]) -> None:
        super().__init__("; ".join(f"{field}: {' '.join(why)}" for field, why in errors.items()))
        self.errors = errors


def truncate(text: str, characters: int) -> str:
    """The text, or its first characters and `…` where it has more: what a caller sent is not sent back whole."""
    return text if len(text) <= characters else f"{text[:characters]}…"
