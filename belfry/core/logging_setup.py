"""Logs as `text` or `json`, with the ids of the request, run and job on every line.

A log message may contain text from outside: a path, an error, an id. Both formats escape control characters, so that
such text cannot begin a line, control a terminal, or change the order in which a line is read.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

# C0, DEL and C1; marks that change the direction of text; line and paragraph separators; lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTINUED = "\n    "  # only the first line of an entry begins at the left edge, so that no text can pass for an entry
IDS = ("request_id", "run_id", "job_id")
_context: ContextVar[dict[str, Any]] = ContextVar("belfry_log_context", default={})  # noqa: B039 - never mutated


@contextmanager
def context(**ids: Any) -> Iterator[None]:
    """Add ids (of IDS; None is left out) to every line that is logged within the block."""
    token = bind(**ids)
    try:
        yield
    finally:
        _context.reset(token)


def bind(**ids: Any) -> Any:
    """Add ids to every line from now on; the token for `unbind`."""
    return _context.set(_context.get() | {name: value for name, value in ids.items() if value is not None})


def unbind(token: Any) -> None:
    """Undo one `bind`."""
    _context.reset(token)


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.ids = dict(_context.get())
        return True


def _escaped(text: str) -> str:
    """The text on one line, with control characters as in Python's literals."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _continued(text: str) -> str:
    """A traceback as indented lines of an entry."""
    return _CONTINUED + _CONTINUED.join(map(_escaped, text.rstrip("\n").split("\n")))


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message, further = record.getMessage(), []
        if str(record.msg).endswith("\n%s") and isinstance(record.args, tuple) and record.args:
            # RQ adds a traceback to the message like this.
            message = str(record.msg).removesuffix("\n%s") % record.args[:-1]
            further.append(str(record.args[-1]))
        if record.exc_info:
            further.append(self.formatException(record.exc_info))
        if record.stack_info:
            further.append(record.stack_info)
        ids = "".join(f" {name}={value}" for name, value in getattr(record, "ids", {}).items())
        head = f"{self.formatTime(record)} {record.levelname} {record.name}: {_escaped(message + ids)}"
        return head + "".join(map(_continued, further))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(line, ensure_ascii=False, default=str)
        return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def configure(level: str, style: str) -> None:
    """Log only to standard error from now on. Safe to call again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Filter())
    formatter = _Json() if style == "json" else _Text()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("rq.worker", "rq.job", "rq.scheduler", "gunicorn.error"):
        logger = logging.getLogger(chatty)
        logger.handlers[:] = []
        logger.propagate = True
    for access in logging.getLogger("gunicorn.access").handlers:  # where the operator asks for that log
        access.setFormatter(formatter)
