"""Cursors: a client's place in the stream, as text and signed.

A cursor is one of PostgreSQL's snapshots: the transactions whose notifications the client was sent. The client keeps
it as the id of the last event and sends it back as `Last-Event-ID`. It is signed, so that clients cannot invent one.
"""

import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from functools import cached_property, lru_cache

from config import secret_key

_NUMBER = "[0-9]{1,18}"
_SNAPSHOT = f"{_NUMBER}:{_NUMBER}:(?:{_NUMBER}(?:,{_NUMBER})*)?"
_CURSOR = re.compile(
    f"([0-9]{{1,11}})-({_SNAPSHOT})(?:-({_NUMBER})-({_SNAPSHOT}))?(?:\\.([A-Za-z0-9_-]{{1,64}}))?"
)
_SIGNATURE_BYTES = 12


@dataclass(frozen=True)
class StreamCursor:
    """The client was sent everything that `snapshot` shows. `created_at` is in seconds since 1970.

    Between the events of one poll: the client was sent what `before` shows, and of the rest that `snapshot` shows the
    messages with ids up to `up_to`.

    The signature covers `epoch`, the database's at that time, because transaction ids repeat after a crash.
    `signature` is that of a cursor which a client sent; `is_genuine` checks it.
    """

    created_at: int
    snapshot: str
    before: str | None = None
    up_to: int = 0
    epoch: str = ""
    signature: str = ""

    def __str__(self) -> str:
        return f"{self._text()}.{_signature(self._text(), self.epoch)}"

    def _text(self) -> str:
        within = f"-{self.up_to}-{self.before}" if self.before else ""
        return f"{self.created_at}-{self.snapshot}{within}"

    @classmethod
    def parse(cls, text: str) -> "StreamCursor":
        """Parse a cursor, without checking its signature. Raises ValueError for any other text."""
        found = _CURSOR.fullmatch(text)
        if not found or not all(_is_snapshot(part) for part in (found[2], found[4]) if part):
            raise ValueError(f"{text[:50]!r} is not a cursor")
        return cls(int(found[1]), found[2], found[4], int(found[3] or 0), signature=found[5] or "")

    def is_genuine(self, epoch: str) -> bool:
        """Whether the signature is right for the current key and this epoch."""
        return hmac.compare_digest(self.signature, _signature(self._text(), epoch))

    @property
    def next_transaction(self) -> int:
        """The number from which on no transaction had begun."""
        return int(self.snapshot.split(":")[1])

    @property
    def first_unseen(self) -> int:
        """The number before which the client was sent what every transaction wrote."""
        return int((self.before or self.snapshot).split(":")[0])

    def shows(self, transaction: int, message_id: int) -> bool:
        """Whether a client at this cursor was sent what a transaction wrote about a message."""
        if self.before is None:
            return self._snapshot.shows(transaction)
        return self._before.shows(transaction) or (message_id <= self.up_to and self._snapshot.shows(transaction))

    @cached_property
    def _snapshot(self) -> "_Snapshot":
        return _Snapshot(self.snapshot)

    @cached_property
    def _before(self) -> "_Snapshot":
        return _Snapshot(self.before or self.snapshot)


class _Snapshot:
    """PostgreSQL's `pg_visible_in_snapshot` in Python, for thousands of transactions and many snapshots."""

    def __init__(self, text: str) -> None:
        least, following, in_progress = text.split(":")
        self._least, self._following = int(least), int(following)
        self._in_progress = frozenset(map(int, filter(None, in_progress.split(","))))

    def shows(self, transaction: int) -> bool:
        return transaction < self._least or (
            transaction < self._following and transaction not in self._in_progress
        )


def _is_snapshot(text: str) -> bool:
    """Whether PostgreSQL accepts this as a snapshot: least and next transaction, and those in progress between."""
    least, following, in_progress = text.split(":")
    numbers = [int(least), *map(int, filter(None, in_progress.split(",")))]
    in_order = numbers == sorted(numbers) and (len(numbers) == 1 or numbers[-1] < int(following))
    return in_order and 0 < int(least) <= int(following)


@lru_cache(maxsize=4096)  # many clients are sent the same event
def _signature(text: str, epoch: str) -> str:
    digest = hmac.digest(secret_key().encode(), f"cursor in the stream\0{epoch}\0{text}".encode(), "sha256")
    return urlsafe_b64encode(digest[:_SIGNATURE_BYTES]).decode()
