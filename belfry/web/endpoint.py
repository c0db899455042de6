"""The decorator of all JSON routes: authentication, loading, dumping, publishing of changes, pagination."""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

from flask import Blueprint, Response, g, json, request
from marshmallow import Schema, ValidationError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from belfry.core.db import LARGEST_ID
from belfry.core.errors import DomainError, Invalid, Unauthenticated
from belfry.identity.tokens import LOGIN_LINK_PREFIX, require_token
from belfry.stream.publish import publish
from belfry.web.problems import HttpProblem
from models import User
from schemas import Page

T = TypeVar("T")
View = TypeVar("View", bound=Callable[..., Any])
BODY_BYTES = 64 * 1024
READS = ("GET", "HEAD", "OPTIONS")
api = Blueprint("api", __name__, url_prefix="/api")
Publishes = Callable[..., dict[str, Any] | None]
"""What a write publishes to the streams (belfry/stream/publish.py), by the parameters of its path."""


def nothing(**_: int) -> None:
    """Publish nothing: a job publishes it, or no stream shows it."""


def own_counts(**_: int) -> dict[str, Any]:
    """The unread counts of the caller have changed."""
    return {"user_id": current_user().id}


def own_access(**_: int) -> dict[str, Any]:
    """Tokens or sessions of the caller have ended."""
    return {"access": current_user().id}


def access(user_id: int | None = None, **_: int) -> dict[str, Any]:
    """What a user may see has changed, or what any user may see."""
    return {"access": user_id or True}


def edited_message(message_id: int) -> dict[str, Any]:
    """A message was edited."""
    return {"messages": [message_id]}


def deleted_message(message_id: int) -> dict[str, Any]:
    """A message was deleted."""
    return {"message_id": message_id, "messages": [message_id]}


@dataclass(frozen=True)
class ApiResponse:
    """The result of a view with a status or headers of its own."""

    value: Any = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contract:
    """The input and output of a route, from which `belfry/web/openapi.py` writes the API document."""

    body: type[Schema] | None
    query: type[Schema] | None
    response: type[Schema] | None
    status: int
    many: bool
    admin: bool
    optional_body: bool
    publishes: Publishes | None


def endpoint(
    *,
    body: type[Schema] | None = None,
    query: type[Schema] | None = None,
    response: type[Schema] | None = None,
    status: int = 200,
    admin: bool = False,
    optional_body: bool = False,
    publishes: Publishes | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Response]]:
    """Turn a function into a view.

    The function is called with the path's parameters, and with the loaded `body` and `query` where they have a schema.
    Its result (a value, an ApiResponse, or for a `Page` query a list of items and the next cursor) is dumped by
    `response`. `publishes` is called with the path's parameters after success, and returns the change for the streams,
    None for none; every route that writes must give it. Errors: 401 without a valid token; 403 for `admin` routes; 415,
    400 and 422 for an invalid body or query.
    """
    paged = query is not None and issubclass(query, Page)
    load_body, load_query = body() if body else None, query() if query else None
    dump = response() if response else None

    def decorate(view: Callable[..., Any]) -> Callable[..., Response]:
        @wraps(view)
        def wrapped(**parts: Any) -> Response:
            current_user()
            if admin:
                require_admin()
            try:
                if load_query:
                    parts["query"] = _load(load_query, _query())
                if load_body:
                    parts["body"] = _load(load_body, _json_body(optional_body))
                result = view(**parts)
            except (DomainError, HttpProblem, HTTPException):
                if g.get("token_hash"):  # a token that has ended since it was cached is reported first: 401
                    require_token(g.token_hash)
                raise
            if publishes and (change := publishes(**(request.view_args or {}))):
                publish(**change)
            if isinstance(result, Response):
                return result
            return _respond(result if isinstance(result, ApiResponse) else ApiResponse(result), status, dump, paged)

        wrapped.contract = Contract(body, query, response, status, paged, admin, optional_body, publishes)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def defers_token_check(view: View) -> View:
    """Accept a cached user for the token: the view checks `g.token_hash`, and then calls `mark_token_checked`."""
    view.defers_token_check = True  # type: ignore[attr-defined]
    return view


def mark_token_checked() -> None:
    """Record that the statement of a view with `defers_token_check` has found the token valid."""
    g.token_hash = None


def authenticated_by(find_user: Callable[[bytes], User | None]) -> Callable[[View], View]:
    """Find the user of a request with a token by this function of the token's hash."""

    def mark(view: View) -> View:
        view.find_user = find_user  # type: ignore[attr-defined]
        return view

    return mark


def current_user() -> User:
    """The user of the request. Raises Unauthenticated without one."""
    user: User | None = g.get("user")
    if user is None:
        raise Unauthenticated("Send a valid token: Authorization: Bearer TOKEN.")
    return user


def require_admin() -> None:
    """Raises 403 unless the user is an admin, Unauthenticated without one."""
    if not current_user().is_admin:
        raise HttpProblem(403, "Only admins may do this.")


def bearer_token() -> str | None:
    """The request's bearer token; None without one, and for the secret of a login link."""
    match = re.fullmatch(r"bearer +(\S+) *", request.headers.get("Authorization", ""), re.IGNORECASE)
    return match[1] if match and not match[1].startswith(LOGIN_LINK_PREFIX) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object_without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a repeated field, of which only one would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def _json_body(optional: bool) -> dict[str, Any]:
    raw = request.get_data(cache=True)
    if len(raw) > BODY_BYTES:  # Werkzeug silently stops reading a chunked body there
        raise RequestEntityTooLarge
    if not raw and optional:
        return {}
    if request.mimetype != "application/json":
        raise HttpProblem(415, "Send JSON: Content-Type: application/json.")
    try:
        body = json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object_without_repetition
        )
    except (ValueError, RecursionError) as error:
        raise HttpProblem(400, f"The body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise HttpProblem(400, "The body must be a JSON object.")
    return body


def _query() -> dict[str, str]:
    repeated = {name: ["Must be given once."] for name, values in request.args.lists() if len(values) > 1}
    if repeated:
        raise Invalid(repeated)
    return request.args.to_dict()


def _load(schema: Schema, data: dict[str, Any]) -> Any:
    try:
        return schema.load(data)
    except ValidationError as error:
        raise Invalid(_flat(error.messages)) from None


def _flat(messages: Any, prefix: str = "") -> dict[str, list[str]]:
    """marshmallow's nested messages as {"a.b.0": ["reason", ...]}; a message about the whole object is `_schema`."""
    if isinstance(messages, list):
        return {prefix or "_schema": [str(message) for message in messages]}
    flat: dict[str, list[str]] = {}
    for name, inner in messages.items():
        path = prefix if name == "_schema" and prefix else f"{prefix}.{name}" if prefix else str(name)
        flat |= _flat(inner, path)
    return flat


def _respond(result: ApiResponse, status: int, dump: Schema | None, paged: bool) -> Response:
    status = result.status or status
    if status == 204:
        return Response(status=204, headers=result.headers)
    value = result.value
    if paged:
        items, cursor = value
        value = {"items": dump.dump(items, many=True) if dump else items, "next": cursor}
    elif dump and value is not None:
        value = dump.dump(value)
    return json_response(json.dumps(value, ensure_ascii=False), status, result.headers)


def json_response(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON text."""
    return Response(text + "\n", status, headers, mimetype="application/json")


def paginate(
    query: dict[str, Any], fetch: Callable[[int | None, int], Sequence[T]], key: Callable[[T], int]
) -> tuple[list[T], str | None]:
    """One page of a list, and the cursor of the next page, None on the last.

    `fetch(position, limit)` gets the key of the previous page's last item, None on the first page. Raises Invalid for
    an invalid cursor.
    """
    position = _read_cursor(query["cursor"]) if query["cursor"] is not None else None
    found = list(fetch(position, query["limit"] + 1))
    page = found[: query["limit"]]
    return page, _write_cursor(key(page[-1])) if len(found) > len(page) else None


def _write_cursor(position: int) -> str:
    return base64.urlsafe_b64encode(f"at {position}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        match = re.fullmatch(r"at ([0-9]{1,19})", text)
        if match and int(match[1]) <= LARGEST_ID:
            return int(match[1])
    except (binascii.Error, ValueError):
        pass
    raise Invalid({"cursor": ["Invalid cursor."]})
