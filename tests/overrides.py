"""Other values of settings, for every module of this process: there is one `settings`, which nothing else changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from config import settings


@contextmanager
def overridden(**values: Any) -> Iterator[None]:
    """While the block runs, these settings have other values. Raises KeyError for a setting that does not exist."""
    before = {field.name: getattr(settings, field.name) for field in fields(settings)}
    before = {name: before[name] for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(settings, name, value)  # the class is frozen, for the product
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(settings, name, value)
