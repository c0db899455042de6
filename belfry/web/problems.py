"""Error responses: every error of the API has the shape of RFC 9457, which is made only here."""

import logging
from http import HTTPStatus
from itertools import islice
from typing import Any

from flask import Flask, Response, g, json
from peewee import IntegrityError, InterfaceError, OperationalError
from playhouse.pool import MaxConnectionsExceeded
from werkzeug.exceptions import HTTPException

from belfry.core.errors import (
    Conflict,
    DomainError,
    Forbidden,
    IdempotencyMismatch,
    Invalid,
    NotFound,
    Unauthenticated,
    truncate,
)

log = logging.getLogger(__name__)

STATUS = {
    Unauthenticated: 401,
    NotFound: 404,
    Forbidden: 403,
    Conflict: 409,
    IdempotencyMismatch: 422,
    Invalid: 422,
}
CODES = {
    400: "malformed_json",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    414: "uri_too_long",
    415: "unsupported_media_type",
    422: "invalid",
    429: "rate_limited",
    431: "headers_too_large",
    500: "internal",
    501: "not_implemented",
    503: "unavailable",
}


MAX_ERRORS = 20  # fields, and reasons of each
_FIELD_CHARACTERS = 30
_REASON_CHARACTERS = 200
_DETAIL_CHARACTERS = 500


class HttpProblem(Exception):
    """An error of HTTP and not of the domain: 400, 401, 403, 404, 408, 413, 415, 422, 429, 431."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


def problem(
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error response. `code` is by default that of the status; `errors` is {field: [reason, ...]}, shortened by
    `limited`."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": truncate(detail, _DETAIL_CHARACTERS),
        "code": code or CODES.get(status, "http_error"),
    }
    if errors is not None:
        body["errors"] = limited(errors)
    response = Response(json.dumps(body) + "\n", status, mimetype="application/problem+json")
    response.headers.update(headers or {})
    return response


def limited(errors: dict[str, list[str]]) -> dict[str, list[str]]:
    """The first MAX_ERRORS fields with at most MAX_ERRORS reasons each, shortened, and how many more there are.

    A response must not be much larger than its request.
    """
    shown: dict[str, list[str]] = {}
    for field, reasons in islice(errors.items(), MAX_ERRORS):
        more = len(reasons) - MAX_ERRORS
        shown.setdefault(truncate(field, _FIELD_CHARACTERS), []).extend(
            [truncate(reason, _REASON_CHARACTERS) for reason in reasons[:MAX_ERRORS]]
            + ([f"{more} more reasons are not shown."] if more > 0 else [])
        )
    if (more := len(errors) - MAX_ERRORS) > 0:
        shown.setdefault("_schema", []).append(f"{more} more invalid fields are not shown.")
    return shown


def register(app: Flask) -> None:
    """Register the error handlers: for the domain's errors, Flask's, the database's, and all others."""

    @app.errorhandler(DomainError)
    def refused(error: DomainError) -> Response:
        status = next(number for kind, number in STATUS.items() if isinstance(error, kind))
        errors = error.errors if isinstance(error, Invalid) else None
        detail = "A field is invalid; `errors` says which and why." if errors is not None else error.detail
        headers = {"WWW-Authenticate": 'Bearer realm="belfry"'} if isinstance(error, Unauthenticated) else None
        return problem(status, detail, code=error.code, errors=errors, headers=headers)

    @app.errorhandler(HttpProblem)
    def http_problem(error: HttpProblem) -> Response:
        return problem(error.status, error.detail, headers=error.headers)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After", "Location")}
        details = {
            404: "There is no such page.",
            405: "This method is not allowed here; the header Allow lists the allowed ones.",
            413: "The body is larger than 64 KiB.",
        }
        return problem(status, details.get(status, error.description or ""), headers=headers)

    @app.errorhandler(IntegrityError)
    def concurrent_change(error: IntegrityError) -> Response:
        log.warning("refused by a constraint: %s", error)
        return problem(409, "A row that this request needs was changed or deleted at the same time. Try again.")

    @app.errorhandler(OperationalError)
    @app.errorhandler(InterfaceError)
    @app.errorhandler(MaxConnectionsExceeded)
    def unavailable(error: Exception) -> Response:
        log.error("the database is unavailable: %s: %s", type(error).__name__, error)
        return problem(503, "The database is unavailable. Try again soon.")

    @app.errorhandler(Exception)
    def crashed(error: Exception) -> Response:
        log.error("request %s crashed", g.get("request_id"), exc_info=error)
        return problem(500, f"Internal error. It was logged as request {g.get('request_id')}.")
