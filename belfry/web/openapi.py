"""The API document, written from the endpoints themselves: their schemas, and their docstrings' first lines."""

import re
from functools import cache
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from flask import Blueprint, Response, current_app, json, render_template

import schemas
from belfry.web.endpoint import Contract, json_response

blueprint = Blueprint("openapi", __name__)
VERSION = "0.1.0"
_PROBLEMS = {
    400: "The body is not a JSON object.",
    401: "No token, or one that is unknown, revoked or expired.",
    403: "Known to the caller, but not theirs to do.",
    404: "Does not exist, or the caller may not know that it does.",
    409: "It cannot be done beside something that exists, or is under way.",
    413: "The body is larger than 64 KiB.",
    415: "The body is not said to be JSON.",
    422: "A field is wrong.",
    429: "Too many requests.",
    503: "The database is unavailable.",
}


def _name(schema: Any) -> str:
    return str(schema.__class__.__name__ if not isinstance(schema, type) else schema.__name__).strip("_")


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of every endpoint under /api. Needs an app context the first time."""
    spec = APISpec(
        title="Belfry",
        version=VERSION,
        openapi_version="3.1.0",
        info={"description": "Message posting and notification fan-out API."},
        plugins=[MarshmallowPlugin(schema_name_resolver=_name)],
        security=[{"token": []}],
    )
    spec.components.security_scheme("token", {"type": "http", "scheme": "bearer"})
    for rule in sorted(current_app.url_map.iter_rules(), key=lambda rule: (rule.rule, sorted(rule.methods or ()))):
        view = current_app.view_functions[rule.endpoint]
        contract = getattr(view, "contract", None)
        if contract is None:
            continue
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            spec.path(path, operations={method.lower(): _operation(view, contract, path)})
    made: dict[str, Any] = spec.to_dict()
    return made


def _operation(view: Any, contract: Contract, path: str) -> dict[str, Any]:
    summary = (view.__doc__ or "").strip().splitlines()[0]
    operation: dict[str, Any] = {
        "operationId": view.__name__,
        "summary": summary,
        "tags": [path.split("/")[2]],
        "parameters": [
            {
                "in": "path",
                "name": name,
                "required": True,
                "schema": {"type": "string" if name == "notification_id" else "integer"},
            }
            for name in re.findall(r"{(\w+)}", path)
        ],
        "responses": {str(contract.status): _success(contract)},
    }
    if contract.admin:
        operation["description"] = "Admins only."
    if contract.query:
        operation["parameters"].append({"in": "query", "schema": contract.query})
    if view.__name__ == "post_message":
        operation["parameters"].append(
            {
                "in": "header",
                "name": "Idempotency-Key",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
                "description": "The same request again, within a day, gets the first answer again.",
            }
        )
    if contract.body:
        operation["requestBody"] = {
            "required": not contract.optional_body,
            "content": {"application/json": {"schema": contract.body}},
        }
    for status, about in _PROBLEMS.items():
        if status in (400, 409, 413, 415) and not contract.body:
            continue
        operation["responses"][str(status)] = {
            "description": about,
            "content": {"application/problem+json": {"schema": schemas.Problem}},
        }
    return operation


def _success(contract: Contract) -> dict[str, Any]:
    if contract.response is None:
        return {"description": "Done."}
    schema: Any = contract.response
    if contract.many:
        schema = {
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": contract.response},
                "next": {"type": ["string", "null"]},
            },
        }
    return {"description": "As asked.", "content": {"application/json": {"schema": schema}}}


@blueprint.get("/openapi.json")
def openapi_json() -> Response:
    """The API document."""
    return json_response(json.dumps(document(), indent=1), 200)


@blueprint.get("/docs")
def docs() -> Response:
    """The API document for people: one page, nothing loaded from elsewhere, no script."""
    page = Response(render_template("docs.html", document=document()))
    policy = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    page.headers["Content-Security-Policy"] = policy
    return page
