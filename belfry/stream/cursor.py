"""Positions in the live stream: what they say, how they are written and signed.

A position is one of PostgreSQL's snapshots: the transactions whose notifications a client was sent. Clients keep it as
the id of the last event, and give it back. It is signed, so that nobody can ask for what they were never at.
"""

import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from functools import cached_property, lru_cache

from config import secret_key

_NUMBER = "[0-9]{1,18}"
_SNAPSHOT = f"{_NUMBER}:{_NUMBER}:(?:{_NUMBER}(?:,{_NUMBER})*)?"
_POSITION = re.compile(
    f"([0-9]{{1,11}})-({_SNAPSHOT})(?:-({_NUMBER})-({_SNAPSHOT}))?(?:\\.([A-Za-z0-9_-]{{1,64}}))?"
)
_SIGNATURE_BYTES = 12


@dataclass(frozen=True)
class StreamCursor:
    """A client was sent everything that `snapshot` shows. `taken`: when, in seconds since 1970.

    Within what one search found: the client was sent what `before` shows, and of the rest that `snapshot` shows the
    messages with ids up to `up_to`.

    `epoch` is the database's at that time, which the signature covers: after a crash transaction ids come again.
    `signature` is that of a position which was given back; `is_genuine` checks it.
    """

    taken: int
    snapshot: str
    before: str | None = None
    up_to: int = 0
    epoch: str = ""
    signature: str = ""

    def __str__(self) -> str:
        return f"{self._text()}.{_signature(self._text(), self.epoch)}"

    def _text(self) -> str:
        within = f"-{self.up_to}-{self.before}" if self.before else ""
        return f"{self.taken}-{self.snapshot}{within}"

    @classmethod
    def parse(cls, text: str) -> "StreamCursor":
        """Read a position. Raises ValueError for a text that is not one, whoever signed it."""
        found = _POSITION.fullmatch(text)
        if not found or not all(_is_snapshot(part) for part in (found[2], found[4]) if part):
            raise ValueError(f"{text[:50]!r} is no position in the stream")
        return cls(int(found[1]), found[2], found[4], int(found[3] or 0), signature=found[5] or "")

    def is_genuine(self, epoch: str) -> bool:
        """Return whether it was given back as we signed it, with the key of now and in this epoch."""
        return hmac.compare_digest(self.signature, _signature(self._text(), epoch))

    @property
    def next_transaction(self) -> int:
        """No transaction from this number on had begun."""
        return int(self.snapshot.split(":")[1])

    @property
    def first_unseen(self) -> int:
        """The client was sent what every transaction before this number wrote."""
        return int((self.before or self.snapshot).split(":")[0])

    def shows(self, transaction: int, message_id: int) -> bool:
        """Return whether a client at this position was sent what a transaction wrote about a message."""
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
    """PostgreSQL's `pg_visible_in_snapshot`, in Python: for thousands of transactions and many snapshots."""

    def __init__(self, text: str) -> None:
        least, following, in_progress = text.split(":")
        self._least, self._following = int(least), int(following)
        self._in_progress = frozenset(map(int, filter(None, in_progress.split(","))))

    def shows(self, transaction: int) -> bool:
        return transaction < self._least or (
            transaction < self._following and transaction not in self._in_progress
        )


def _is_snapshot(text: str) -> bool:
    """Return whether PostgreSQL takes this for one: the least and the next transaction, and between them those in
    progress."""
    least, following, in_progress = text.split(":")
    numbers = [int(least), *map(int, filter(None, in_progress.split(",")))]
    in_order = numbers == sorted(numbers) and (len(numbers) == 1 or numbers[-1] < int(following))
    return in_order and 0 < int(least) <= int(following)


@lru_cache(maxsize=4096)  # many clients are sent the same event
def _signature(text: str, epoch: str) -> str:
    digest = hmac.digest(secret_key().encode(), f"position in the stream\0{epoch}\0{text}".encode(), "sha256")
    return urlsafe_b64encode(digest[:_SIGNATURE_BYTES]).decode()
