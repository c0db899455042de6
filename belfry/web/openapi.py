"""The API document, made from the endpoints' schemas and docstrings, with examples that a test runs."""

import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from flask import Blueprint, Response, current_app, json, render_template

import schemas
from belfry.web.endpoint import Contract, json_response

blueprint = Blueprint("openapi", __name__)
VERSION = "0.1.0"
EXAMPLES_FILE = Path(__file__).with_name("examples.json")
"""{operation: {"method", "path", "status", "body", "response"}}, recorded by tests/web/test_openapi_examples.py."""
_PROBLEMS = {
    400: "The body is not a JSON object.",
    401: "No token, or one that is unknown, revoked or expired.",
    403: "The caller may not do this.",
    404: "It does not exist, or the caller may not see it.",
    409: "It conflicts with something that exists or is in progress.",
    413: "The body is larger than 64 KiB.",
    415: "The content type is not application/json.",
    422: "A field is invalid.",
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
    examples = json.loads(EXAMPLES_FILE.read_text())
    for rule in sorted(current_app.url_map.iter_rules(), key=lambda rule: (rule.rule, sorted(rule.methods or ()))):
        view = current_app.view_functions[rule.endpoint]
        contract = getattr(view, "contract", None)
        if contract is None:
            continue
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            spec.path(path, operations={method.lower(): _operation(view, contract, path, examples)})
    made: dict[str, Any] = spec.to_dict()
    return made


def _curl(example: dict[str, Any]) -> str:
    """The example's request as a command for a shell with the variables BELFRY (a URL) and TOKEN."""
    method = "" if example["method"] == "GET" else f" -X {example['method']}"
    lines = [f'curl{method} "$BELFRY{example["path"]}"', '-H "Authorization: Bearer $TOKEN"']
    if "body" in example:
        lines += ["-H 'Content-Type: application/json'", f"-d '{json.dumps(example['body'], ensure_ascii=False)}'"]
    return " \\\n  ".join(lines)


def _operation(view: Any, contract: Contract, path: str, examples: dict[str, Any]) -> dict[str, Any]:
    summary, _, description = (view.__doc__ or "").strip().partition("\n")
    example = examples.get(view.__name__, {})
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
        "responses": {str(contract.status): _success(contract, example)},
    }
    if details := [textwrap.dedent(description).strip(), *(["Admins only."] if contract.admin else [])]:
        operation["description"] = " ".join(filter(None, details))
    if example:
        operation["x-codeSamples"] = [{"lang": "Shell", "source": _curl(example)}]
    if contract.query:
        operation["parameters"].append({"in": "query", "schema": contract.query})
    if view.__name__ == "post_message":
        operation["parameters"].append(
            {
                "in": "header",
                "name": "Idempotency-Key",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
                "description": "The same request within a day gets the first response again.",
            }
        )
    if contract.body:
        operation["requestBody"] = {
            "required": not contract.optional_body,
            "content": {"application/json": {"schema": contract.body, "example": example.get("body", {})}},
        }
    for status, about in _PROBLEMS.items():
        if status in (400, 409, 413, 415) and not contract.body:
            continue
        operation["responses"][str(status)] = {
            "description": about,
            "content": {"application/problem+json": {"schema": schemas.Problem}},
        }
    return operation


def _success(contract: Contract, example: dict[str, Any]) -> dict[str, Any]:
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
    content = {"schema": schema, "example": example.get("response")}
    return {"description": "OK", "content": {"application/json": content}}


@blueprint.get("/openapi.json")
def openapi_json() -> Response:
    """The API document."""
    return json_response(json.dumps(document(), indent=1), 200)


@blueprint.get("/docs")
def docs() -> Response:
    """The API document as one HTML page without scripts."""
    page = Response(render_template("docs.html", document=document()))
    policy = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    page.headers["Content-Security-Policy"] = policy
    return page
