"""Override settings and tuning for every module of this process, which share one object of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from config import settings, tuning


@contextmanager
def overridden(**values: Any) -> Iterator[None]:
    """Change these settings or values of `tuning` while the block runs. Raises KeyError for an unknown name."""
    owners = {field.name: owner for owner in (settings, tuning) for field in fields(owner)}
    before = {name: getattr(owners[name], name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(owners[name], name, value)  # the product's classes are frozen
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(owners[name], name, value)
