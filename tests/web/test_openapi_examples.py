"""Each operation in /docs has an example, and the application gives the responses that /docs shows."""

import json
import re
import subprocess
from collections.abc import Iterable
from contextlib import ExitStack
from html import unescape
from typing import Any
from urllib.request import Request, urlopen

import pytest

from belfry.core.db import execute
from belfry.web import openapi
from tests.fanout_helpers import add_members
from tests.processes import web_process

STEPS: list[tuple[str, str, str, str, Any]] = [
    # (operation, user, method, path, body) in an order in which each works. "run jobs" runs the queued jobs,
    # "fail" makes run 1 fail, and "open the stream" makes the connection whose events the step "stream" records.
    ("create_user", "ada", "POST", "/api/users", {"username": "robin", "name": "Robin"}),
    ("list_users", "ada", "GET", "/api/users?username=robin", None),
    ("get_user", "ada", "GET", "/api/users/8", None),
    ("update_user", "ada", "PATCH", "/api/users/8", {"name": "Robin Hood"}),
    ("create_token", "ada", "POST", "/api/users/8/tokens", {"expires_at": "2090-01-01T00:00:00Z"}),
    ("list_tokens", "ada", "GET", "/api/users/8/tokens", None),
    ("revoke_token", "ada", "DELETE", "/api/users/8/tokens/7", None),
    ("create_server", "ada", "POST", "/api/servers", {"name": "Silver Signals"}),
    ("list_servers", "ada", "GET", "/api/servers?limit=2", None),
    ("get_server", "ada", "GET", "/api/servers/1", None),
    ("create_role", "ada", "POST", "/api/servers/1/roles", {"name": "analysts", "moderator": False}),
    ("list_roles", "ada", "GET", "/api/servers/1/roles", None),
    ("add_member", "ada", "POST", "/api/servers/1/members", {"user_id": 8, "role_ids": [3]}),
    ("put_member", "ada", "PUT", "/api/servers/1/members/8", {"role_ids": [1, 3]}),
    ("list_members", "ada", "GET", "/api/servers/1/members?limit=2", None),
    ("create_channel", "ada", "POST", "/api/servers/1/channels", {"name": "research", "private": True}),
    ("put_channel_roles", "ada", "PUT", "/api/channels/4/roles", {"role_ids": [3]}),
    ("list_channel_roles", "ada", "GET", "/api/channels/4/roles", None),
    ("list_channels", "ada", "GET", "/api/servers/1/channels?limit=2", None),
    ("update_channel", "ada", "PATCH", "/api/channels/4", {"name": "deep-research"}),
    ("delete_channel", "ada", "DELETE", "/api/channels/4", None),
    ("delete_role", "ada", "DELETE", "/api/servers/1/roles/3", None),
    ("me", "sam", "GET", "/api/me", None),
    ("list_own_tokens", "sam", "GET", "/api/me/tokens", None),
    ("list_own_channels", "sam", "GET", "/api/channels", None),
    ("get_channel", "sam", "GET", "/api/channels/1", None),
    ("list_mention_suggestions", "sam", "GET", "/api/channels/1/mention-suggestions?q=v", None),
    ("open the stream", "vera", "GET", "/api/notifications/stream", None),
    ("post_message", "sam", "POST", "/api/messages", {"channel_id": 1, "content": "Gold's trend is up, @vera"}),
    ("run jobs", "", "", "", None),
    ("get_message", "sam", "GET", "/api/messages/1", None),
    ("search_messages", "vera", "GET", "/api/messages/search?q=gold&limit=1", None),
    ("list_messages", "vera", "GET", "/api/channels/1/messages?limit=1", None),
    ("get_run", "sam", "GET", "/api/runs/1", None),
    ("explain", "ada", "GET", "/api/messages/1/explain?user_id=5", None),
    ("list_notifications", "vera", "GET", "/api/notifications?unread=true", None),
    ("unread_count", "vera", "GET", "/api/notifications/unread-count", None),
    ("stream", "vera", "GET", "/api/notifications/stream", None),
    ("mark_read", "vera", "POST", "/api/notifications/read", {"ids": ["4-1"]}),
    ("dismiss", "vera", "DELETE", "/api/notifications/4-1", None),
    ("restore", "vera", "POST", "/api/notifications/4-1/restore", None),
    ("put_preference", "vera", "PUT", "/api/channels/1/preference", {"level": "mentions", "muted_until": None}),
    ("get_preference", "vera", "GET", "/api/channels/1/preference", None),
    ("edit_message", "sam", "PATCH", "/api/messages/1", {"content": "Gold's trend is up, @moira"}),
    ("run jobs", "", "", "", None),
    ("list_runs", "ada", "GET", "/api/runs?limit=1", None),
    ("put_subscription", "ada", "PUT", "/api/users/8/subscription", {"status": "active"}),
    ("get_subscription", "ada", "GET", "/api/users/8/subscription", None),
    ("replay", "ada", "POST", "/api/runs/1/replay", {"dry_run": True}),
    ("replay", "ada", "POST", "/api/runs/1/replay", {"dry_run": False}),
    ("test_notification", "ada", "POST", "/api/test-notifications", {"audience": "me"}),
    ("run jobs", "", "", "", None),
    ("fail", "", "", "", None),
    ("retry", "ada", "POST", "/api/runs/1/retry", None),
    ("remove_member", "ada", "DELETE", "/api/servers/1/members/8", None),
    ("delete_message", "sam", "DELETE", "/api/messages/1", None),
    ("end_own_sessions", "sam", "DELETE", "/api/me/sessions", None),
    ("revoke_own_token", "sam", "DELETE", "/api/me/tokens/3", None),
]
VARIABLE = {
    r"\b202[0-9]-[0-9]{2}-[0-9]{2}T[0-9:.]+(Z|\+00:00)": "2026-01-05T09:30:00Z",
    r"\bbelfry_[A-Za-z0-9_-]{43}": "belfry_TOKEN",
    r"\bretry: [0-9]+": "retry: 2000",
    r"\bid: [0-9]+-.*": "id: CURSOR",
}
"""Values that differ between two runs of an example, and what the document shows for them."""


def stable(text: str) -> str:
    for pattern, shown in VARIABLE.items():
        text = re.sub(pattern, shown, text)
    return text


def read_events(stream: Iterable[bytes], number: int) -> str:
    """Read the stream until the end of this many more events."""
    lines: list[str] = []
    for line in stream:
        lines.append(line.decode())
        number -= line.startswith(b"data:")
        if number == 0 and not line.strip():
            break
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("override")
def test_each_example_of_the_document_is_the_applications_response(api, cast, run_jobs, request):
    people = {person.username: person for person in cast.everybody.values()}
    add_members(cast.server_id, 1)  # a user with an id between the cast's and the examples'
    recorded: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as processes:
        for operation, user, method, path, body in STEPS:
            if operation == "run jobs":
                run_jobs()
                continue
            if operation == "fail":
                execute("UPDATE run SET state = 'failed', error = 'Database unavailable' WHERE id = 1")
                continue
            if operation == "open the stream":
                web = processes.enter_context(web_process())
                opening = Request(web + path, headers={"Authorization": f"Bearer {people[user].token}"})
                stream = processes.enter_context(urlopen(opening))
                events = read_events(stream, 1)
                continue
            example: dict[str, Any] = {"method": method, "path": path}
            if body is not None:
                example["body"] = body
            if operation == "stream":
                example |= {"status": stream.status, "response": stable(events + read_events(stream, 2))}
            else:
                response = api(people[user]).open(method, path, json=body)
                assert response.status_code < 300, (operation, response.text)
                example["status"] = response.status_code
                if response.text:
                    example["response"] = json.loads(stable(response.text))
            recorded.setdefault(operation, []).append(example)
    text = json.dumps(recorded, indent=1, ensure_ascii=False) + "\n"  # in the order of the schemas' fields
    if request.config.getoption("--update-golden"):
        openapi.EXAMPLES_FILE.write_text(text)
    assert openapi.EXAMPLES_FILE.read_text() == text


@pytest.fixture
def document(client) -> dict[str, Any]:
    return client.get("/openapi.json").get_json()


@pytest.fixture
def operations(document) -> list[dict[str, Any]]:
    return [operation for methods in document["paths"].values() for operation in methods.values()]


def arguments_of(command: str) -> list[str]:
    """The arguments that a shell passes to curl."""
    shell = ["sh", "-c", f"curl() {{ printf '%s\\0' \"$@\"; }}; {command}"]
    variables = {"BELFRY": "http://belfry.test", "TOKEN": "belfry_TOKEN"}
    return subprocess.check_output(shell, env=variables, text=True).split("\0")


def test_each_operation_is_documented_with_examples_for_a_shell(client, operations):
    examples = json.loads(openapi.EXAMPLES_FILE.read_text())
    assert {operation["operationId"] for operation in operations} == examples.keys()
    page = client.get("/docs").text
    for operation in operations:
        name = operation["operationId"]
        section = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
        assert section
        assert section[0].count('<pre class="request">curl ') == len(examples[name])
        for example, sample in zip(examples[name], operation["x-codeSamples"], strict=True):
            arguments = arguments_of(sample["source"])
            assert f"http://belfry.test{example['path']}" in arguments
            assert "Authorization: Bearer belfry_TOKEN" in arguments
            if "body" in example:
                assert json.loads(arguments[arguments.index("-d") + 1]) == example["body"]
            [shown] = operation["responses"][str(example["status"])].get("content", {"": {}}).values()
            assert shown.get("example") == example.get("response")
        responses = re.findall(r'<pre class="response">(.*?)</pre>', section[0], re.DOTALL)
        recorded = [example["response"] for example in examples[name] if "response" in example]
        texts = [one if isinstance(one, str) else json.dumps(one, indent=2, ensure_ascii=False) for one in recorded]
        assert [unescape(response) for response in responses] == texts


def test_each_operation_parameter_response_and_field_of_a_body_is_described(document, operations):
    missing = []
    for operation in operations:
        parts = {"description": operation}
        parts |= {f"parameter {parameter['name']}": parameter for parameter in operation["parameters"]}
        for status, response in operation["responses"].items():
            shared = document["components"]["responses"]
            parts[f"response {status}"] = shared[status] if "$ref" in response else response
        if body := operation.get("requestBody"):
            schema = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            fields = document["components"]["schemas"][schema]["properties"]
            parts |= {f"field {field}": properties for field, properties in fields.items()}
        where = operation["operationId"]
        missing += [f"{where}: {name}" for name, part in parts.items() if not part.get("description")]
        assert operation["summary"]
    assert not missing, "\n".join(missing)
