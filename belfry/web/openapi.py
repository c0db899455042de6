"""The API document, made from the endpoints' schemas and docstrings, with examples that a test runs."""

import re
import shlex
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
"""{operation: [{"method", "path", "body", "status", "response"}]}, recorded by tests/web/test_openapi_examples.py."""
_HEADERS: dict[str, dict[str, Any]] = {
    "post_message": {
        "name": "Idempotency-Key",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        "description": "A text that the client chooses. The same request within a day gets the first response again.",
    },
    "stream": {
        "name": "Last-Event-ID",
        "schema": {"type": "string"},
        "description": "The id of the last event that the client received. The stream continues after it.",
    },
}
_SUCCESSES = {
    200: "Success.",
    201: "Created.",
    202: "Accepted: a worker executes the run.",
    204: "Success. The response has no body.",
}
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
    for status, about in _PROBLEMS.items():
        content = {"application/problem+json": {"schema": schemas.Problem}}
        spec.components.response(str(status), {"description": about, "content": content})
    examples = json.loads(EXAMPLES_FILE.read_text())
    for rule in sorted(current_app.url_map.iter_rules(), key=lambda rule: (rule.rule, sorted(rule.methods or ()))):
        view = current_app.view_functions[rule.endpoint]
        contract = getattr(view, "contract", None)
        if contract is None:
            continue
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            operation = _operation(view, contract, path, examples.get(view.__name__, []))
            spec.path(path, operations={method.lower(): operation})
    made: dict[str, Any] = spec.to_dict()
    return made


def _curl(example: dict[str, Any]) -> str:
    """The example's request as a command for a shell with the variables BELFRY (a URL) and TOKEN."""
    method = "" if example["method"] == "GET" else f" -X {example['method']}"
    unbuffered = " -N" if isinstance(example.get("response"), str) else ""
    lines = [f'curl{unbuffered}{method} "$BELFRY"{shlex.quote(example["path"])}', '-H "Authorization: Bearer $TOKEN"']
    if "body" in example:
        body = shlex.quote(json.dumps(example["body"], ensure_ascii=False))
        lines += ["-H 'Content-Type: application/json'", f"-d {body}"]
    return " \\\n  ".join(lines)


def _operation(view: Any, contract: Contract, path: str, examples: list[dict[str, Any]]) -> dict[str, Any]:
    summary, *details = re.split(r"(?<=\.)\s+", view.__doc__.strip(), maxsplit=1)
    operation: dict[str, Any] = {
        "operationId": view.__name__,
        "summary": summary,
        "description": " ".join([*" ".join(details).split(), *(["Admins only."] if contract.admin else [])]),
        "tags": [path.split("/")[2]],
        "parameters": [
            {
                "in": "path",
                "name": name,
                "required": True,
                "schema": {"type": "string" if name == "notification_id" else "integer"},
                "description": f"The {name.removesuffix('_id')}'s id.",
            }
            for name in re.findall(r"{(\w+)}", path)
        ],
        "responses": {str(example["status"]): _success(contract, example) for example in examples},
        "x-codeSamples": [
            {"lang": "Shell", "label": str(example["status"]), "source": _curl(example)} for example in examples
        ],
    }
    if contract.query:
        operation["parameters"].append({"in": "query", "schema": contract.query})
    if header := _HEADERS.get(view.__name__):
        operation["parameters"].append({"in": "header", **header})
    if contract.body:
        content = {"schema": contract.body, "example": examples[0]["body"] if examples else {}}
        operation["requestBody"] = {"required": not contract.optional_body, "content": {"application/json": content}}
    for status in _PROBLEMS:
        if (contract.body or status not in (400, 413, 415)) and (contract.publishes or status != 409):
            operation["responses"][str(status)] = str(status)  # a reference to the component
    return operation


def _success(contract: Contract, example: dict[str, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _SUCCESSES[example["status"]]}
    schema: Any = contract.response or {"type": "string"}
    if contract.many:
        schema = {
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": contract.response},
                "next": {"type": ["string", "null"], "description": "The cursor of the next page; null on the last."},
            },
        }
    if "response" in example:
        media_type = "application/json" if contract.response else "text/event-stream"
        response["content"] = {media_type: {"schema": schema, "example": example["response"]}}
    return response


@blueprint.get("/openapi.json")
def openapi_json() -> Response:
    """The API document."""
    return json_response(json.dumps(document(), indent=1), 200)


@blueprint.get("/docs")
def docs() -> Response:
    """The API document as one HTML page without scripts."""
    page = Response(render_template("docs.html", document=document(), dumps=json.dumps))
    policy = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    page.headers["Content-Security-Policy"] = policy
    return page
