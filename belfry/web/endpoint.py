"""What every JSON endpoint does the same way: who asks, what is taken, what is given, page by page."""

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

from belfry.core.errors import DomainError, Invalid, Unauthenticated
from belfry.identity.tokens import require_token
from belfry.web.problems import HttpProblem
from models import LARGEST_ID, User
from schemas import Page

T = TypeVar("T")
View = TypeVar("View", bound=Callable[..., Any])
BODY_BYTES = 64 * 1024
READS = ("GET", "HEAD", "OPTIONS")
api = Blueprint("api", __name__, url_prefix="/api")


@dataclass(frozen=True)
class ApiResponse:
    """What a view gives back where the value alone does not say it."""

    value: Any = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contract:
    """What an endpoint takes and gives; `belfry/web/openapi.py` writes the API document from it."""

    body: type[Schema] | None
    query: type[Schema] | None
    gives: type[Schema] | None
    status: int
    many: bool
    admin: bool
    optional_body: bool


def endpoint(
    *,
    body: type[Schema] | None = None,
    query: type[Schema] | None = None,
    gives: type[Schema] | None = None,
    status: int = 200,
    admin: bool = False,
    optional_body: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Response]]:
    """Make a view of a function.

    It is called with the address's parts, and with `body` and `query` as loaded where there is a schema for
    them. What it returns (a value, an Answer, or for a `Page` query a list of items and the next cursor) is
    dumped by `gives`. Raises, as the one error shape: 401 without a valid token; 403 for `admin` endpoints;
    415, 400 and 422 for bodies.
    """
    paged = query is not None and issubclass(query, Page)
    load_body, load_query = body() if body else None, query() if query else None
    dump = gives() if gives else None

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
                given = view(**parts)
            except (DomainError, HttpProblem, HTTPException):
                if g.get("token_hash"):  # a token that has ended since it was remembered is reported first: 401
                    require_token(g.token_hash)
                raise
            if isinstance(given, Response):
                return given
            answer = given if isinstance(given, ApiResponse) else ApiResponse(given)
            return _respond(answer, status, dump, paged)

        wrapped.contract = Contract(body, query, gives, status, paged, admin, optional_body)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def defers_token_check(view: View) -> View:
    """Whose token it is, may be as remembered: then it is in `g.token_hash`, and the view asks whether it is valid."""
    view.asks_for_itself = True  # type: ignore[attr-defined]
    return view


def authenticated_by(find_user: Callable[[bytes], User | None]) -> Callable[[View], View]:
    """Find the user of a request with a token by this function of the token's hash, which the view learns more from."""

    def mark(view: View) -> View:
        view.find_user = find_user  # type: ignore[attr-defined]
        return view

    return mark


def current_user() -> User:
    """Who is asking. Raises Unauthenticated for nobody."""
    user: User | None = g.get("user")
    if user is None:
        raise Unauthenticated("Send a valid token: Authorization: Bearer TOKEN.")
    return user


def require_admin() -> None:
    """Raises 403 for everybody but admins, Unauthenticated for nobody."""
    if not current_user().is_admin:
        raise HttpProblem(403, "Only admins may do this.")


def bearer_token() -> str | None:
    """The request's token; None where there is none."""
    match = re.fullmatch(r"bearer +(\S+) *", request.headers.get("Authorization", ""), re.IGNORECASE)
    return match[1] if match else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object_without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these fields. Raises ValueError where a field is given twice: only one of them would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def _json_body(optional: bool) -> dict[str, Any]:
    raw = request.get_data(cache=True)
    if len(raw) > BODY_BYTES:  # of a chunked body Werkzeug reads so far and no further, and says nothing
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
    """marshmallow's nested messages as {"a.b.0": ["why", ...]}; a message about the whole is `_schema`."""
    if isinstance(messages, list):
        return {prefix or "_schema": [str(message) for message in messages]}
    flat: dict[str, list[str]] = {}
    for name, inner in messages.items():
        path = prefix if name == "_schema" and prefix else f"{prefix}.{name}" if prefix else str(name)
        flat |= _flat(inner, path)
    return flat


def _respond(answer: ApiResponse, status: int, dump: Schema | None, paged: bool) -> Response:
    if paged:
        items, following = answer.value
        value: Any = {"items": dump.dump(items, many=True) if dump else items, "next": following}
    else:
        value = dump.dump(answer.value) if dump and answer.value is not None else answer.value
    number = answer.status or status
    if number == 204:
        return Response(status=204, headers=answer.headers)
    return json_response(json.dumps(value, ensure_ascii=False), number, answer.headers)


def json_response(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """JSON that is text already."""
    return Response(text + "\n", status, headers, mimetype="application/json")


def paginate(
    query: dict[str, Any], fetch: Callable[[int | None, int], Sequence[T]], key: Callable[[T], int]
) -> tuple[list[T], str | None]:
    """One page and the cursor of the next, or None on the last.

    `fetch(position, limit)` gets the last key of the page before (None on the first). Raises Invalid for a
    cursor that is broken.
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
    raise Invalid({"cursor": ["Is not one that was given out."]})
