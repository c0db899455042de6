"""Each operation in /docs has an example, and the application answers each example as /docs shows."""

import json
import re
from typing import Any

import pytest

from belfry.web import openapi
from tests.fanout_helpers import crowd

STEPS: list[tuple[str, str, str, str, Any]] = [
    # (operation, user, method, path, body) in an order in which each works; "work" runs the queued jobs
    ("create_user", "ada", "POST", "/api/users", {"username": "robin", "name": "Robin"}),
    ("list_users", "ada", "GET", "/api/users?username=robin", None),
    ("get_user", "ada", "GET", "/api/users/8", None),
    ("update_user", "ada", "PATCH", "/api/users/8", {"name": "Robin Hood"}),
    ("put_subscription", "ada", "PUT", "/api/users/8/subscription", {"status": "active"}),
    ("get_subscription", "ada", "GET", "/api/users/8/subscription", None),
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
    ("post_message", "sam", "POST", "/api/messages", {"channel_id": 1, "content": "Gold breaks out, @vera"}),
    ("work", "", "", "", None),
    ("get_message", "sam", "GET", "/api/messages/1", None),
    ("list_messages", "vera", "GET", "/api/channels/1/messages?limit=1", None),
    ("get_run", "sam", "GET", "/api/runs/1", None),
    ("explain", "ada", "GET", "/api/messages/1/explain?user_id=5", None),
    ("list_notifications", "vera", "GET", "/api/notifications?unread=true", None),
    ("unread_count", "vera", "GET", "/api/notifications/unread-count", None),
    ("stream", "vera", "GET", "/api/notifications/stream", None),
    ("mark_read", "vera", "POST", "/api/notifications/read", {"ids": ["4-1"]}),
    ("dismiss", "vera", "DELETE", "/api/notifications/4-1", None),
    ("put_preference", "vera", "PUT", "/api/channels/1/preference", {"level": "mentions", "muted_until": None}),
    ("get_preference", "vera", "GET", "/api/channels/1/preference", None),
    ("edit_message", "sam", "PATCH", "/api/messages/1", {"content": "Gold breaks out, @moira"}),
    ("work", "", "", "", None),
    ("list_runs", "ada", "GET", "/api/runs?limit=1", None),
    ("replay", "ada", "POST", "/api/runs/1/replay", {"dry_run": False}),
    ("test_notification", "ada", "POST", "/api/test-notifications", {"audience": "me"}),
    ("work", "", "", "", None),
    ("remove_member", "ada", "DELETE", "/api/servers/1/members/8", None),
    ("delete_message", "sam", "DELETE", "/api/messages/1", None),
    ("end_own_sessions", "sam", "DELETE", "/api/me/sessions", None),
    ("revoke_own_token", "sam", "DELETE", "/api/me/tokens/3", None),
]
VARIABLE = {
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+(Z|\+00:00)": "2026-01-05T09:30:00Z",
    r"\bbelfry_[A-Za-z0-9_-]{43}": "belfry_TOKEN",
}
"""What differs between two runs of the same example, and what is shown for it."""


def stable(text: str) -> Any:
    for pattern, shown in VARIABLE.items():
        text = re.sub(pattern, shown, text)
    return json.loads(text) if text else None


@pytest.mark.usefixtures("override")
def test_the_application_answers_each_example_as_the_document_shows(api, cast, run_jobs, request):
    people = {person.username: api(person) for person in cast.everybody.values()}
    crowd(cast.server_id, 1)  # a user with an id between the cast's and the examples'
    recorded: dict[str, Any] = {}
    for operation, user, method, path, body in STEPS:
        if operation == "work":
            run_jobs()
            continue
        answer = people[user].open("HEAD" if operation == "stream" else method, path, json=body)
        assert answer.status_code < 300, (operation, answer.text)
        recorded[operation] = {"method": method, "path": path, "status": answer.status_code}
        if body is not None:
            recorded[operation]["body"] = body
        if answer.text:
            recorded[operation]["response"] = stable(answer.text)
    if request.config.getoption("--update-golden"):
        openapi.EXAMPLES_FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert json.loads(openapi.EXAMPLES_FILE.read_text()) == recorded


def test_each_operation_is_documented_with_an_example(client):
    operations = [one for path in client.get("/openapi.json").get_json()["paths"].values() for one in path.values()]
    assert {one["operationId"] for one in operations} == {name for name, *_ in STEPS} - {"work"}
    page = client.get("/docs").text
    for operation in operations:
        [sample] = operation["x-codeSamples"]
        assert sample["source"].startswith("curl "), operation["operationId"]
        section = re.search(rf'<section id="{operation["operationId"]}">.*?</section>', page, re.DOTALL)
        assert section
        assert '<pre class="request">curl ' in section[0]
        [success, *_] = operation["responses"].values()
        assert ("content" in success) == ('<pre class="response">' in section[0]), operation["operationId"]
