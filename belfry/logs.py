"""Logs for people (`text`) or machines (`json`), with the request's, run's and job's ids on every line."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

IDS = ("request_id", "run_id", "job_id")
_context: ContextVar[dict[str, Any]] = ContextVar("belfry_log_context", default={})  # noqa: B039 - never mutated


@contextmanager
def context(**ids: Any) -> Iterator[None]:
    """Put ids (of IDS; None is left out) on every line that is logged inside."""
    token = bind(**ids)
    try:
        yield
    finally:
        _context.reset(token)


def bind(**ids: Any) -> Any:
    """Put ids on every line from here on; answers the token that `unbind` takes."""
    return _context.set(_context.get() | {name: value for name, value in ids.items() if value is not None})


def unbind(token: Any) -> None:
    """Undo one `bind`."""
    _context.reset(token)


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.ids = dict(_context.get())
        return True


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ids = "".join(f" {name}={value}" for name, value in getattr(record, "ids", {}).items())
        line = super().format(record)
        head, newline, tail = line.partition("\n")
        return f"{head}{ids}{newline}{tail}"


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
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str, style: str) -> None:
    """Log to standard error from here on, and nowhere else. Safe to call again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Filter())
    handler.setFormatter(_Json() if style == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("rq.worker", "rq.job", "rq.scheduler", "gunicorn.error"):
        logger = logging.getLogger(chatty)
        logger.handlers[:] = []
        logger.propagate = True
