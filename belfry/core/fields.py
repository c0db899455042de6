"""marshmallow fields for Belfry's types. They are stricter than marshmallow's, which convert other types."""

import re
import unicodedata
from datetime import UTC, datetime
from typing import Any

from marshmallow import ValidationError, fields
from marshmallow.validate import Length, Range, Regexp

from belfry.core.db import LARGEST_ID


class Text(fields.String):
    """Text that PostgreSQL can store: valid UTF-8 without NUL."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        if "\0" in text:
            raise ValidationError("Must not contain NUL.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValidationError("Must be valid Unicode: a surrogate stands alone.") from None
        return text


class Trimmed(Text):
    """Text without surrounding white space, which is removed before other checks."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        return super()._deserialize(value, attr, data, **kwargs).strip()


class Id(fields.Integer):
    """The id of a row: a positive integer, and neither a string nor a boolean."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(strict=True, validate=Range(1, LARGEST_ID), **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, bool):
            raise self.make_error("invalid")
        return super()._deserialize(value, attr, data, **kwargs)


class QueryNumber(fields.Integer):
    """An integer of the query string: digits only."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if not re.fullmatch(r"[0-9]{1,19}", str(value)):
            raise self.make_error("invalid")
        return super()._deserialize(value, attr, data, **kwargs)


class Flag(fields.Boolean):
    """true or false, and no other type."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid")
        return value


class Time(fields.AwareDateTime):
    """A time of RFC 3339: input with any offset, output in UTC with `Z`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(format="iso", **kwargs)

    def _serialize(self, value: datetime | None, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else value.astimezone(UTC).isoformat().replace("+00:00", "Z")

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> datetime:
        if not isinstance(value, str) or not re.match(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d", value):
            raise ValidationError("Must be a time like 2026-01-31T12:00:00Z.")
        time: datetime = super()._deserialize(value.upper(), attr, data, **kwargs)
        if not 1970 <= time.year < 9999:
            raise ValidationError("Must be between the years 1970 and 9998.")
        return time


def about(description: str) -> dict[str, Any]:
    """The argument of a field for its description in the API document."""
    return {"metadata": {"description": description}}


def query_id(description: str) -> QueryNumber:
    """An optional id in the query string."""
    return QueryNumber(load_default=None, validate=Range(1, LARGEST_ID), **about(description))


def visible_name(**kwargs: Any) -> Trimmed:
    """The name of a user, server or channel."""
    description = "A name to show, which is trimmed. It must have a visible character."
    return Trimmed(validate=[Length(1, 100), _require_visible], **about(description), **kwargs)


def _require_visible(text: str) -> None:
    """Refuse a name of spaces and invisible characters only, because nobody could see or select it."""
    if not any(unicodedata.category(character)[0] in "LNPS" for character in text):
        raise ValidationError("Must have a visible character.")


def email_address(**kwargs: Any) -> Trimmed:
    """An e-mail address, or null."""
    pattern = Regexp(r"[^@\s]+@[^@\s]+$", error="Must be an e-mail address.")
    return Trimmed(allow_none=True, validate=[Length(3, 254), pattern], **about("E-mail; null for none."), **kwargs)
