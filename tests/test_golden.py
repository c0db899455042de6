"""Public interfaces, hot SQL statements and numbers of statements, compared with the files in `tests/golden`.

An intended change shows in the diff of these files: `make test ARGS="tests/test_golden.py --update-golden"` writes them
again. No module of the product is named here except `jobs` and `db`, so that moving code does not change the tests.
"""

import difflib
import json
import re
from pathlib import Path

import psycopg
import pytest

import jobs
from belfry.core.db import db, execute
from tests.people import csrf_of

GOLDEN = Path(__file__).parent / "golden"
FLASK_COMMANDS = {"routes", "run", "shell"}


@pytest.fixture
def assert_golden(request):
    """`assert_golden(name, text)`: assert that the text is that of `tests/golden/name`."""

    def compare(name: str, text: str) -> None:
        path, text = GOLDEN / name, text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        before = path.read_text()
        lines = difflib.unified_diff(before.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="")
        assert text == before, "\n".join(lines)

    return compare


@pytest.fixture
def executed(monkeypatch):
    """Record the SQL that psycopg sends from now on, one line for each statement."""
    seen: list[str] = []
    execute = psycopg.Cursor.execute

    def record(self, query, *arguments, **named):
        seen.append(" ".join(str(query).split()))
        return execute(self, query, *arguments, **named)

    monkeypatch.setattr(psycopg.Cursor, "execute", record)
    return seen


def test_the_api_document_is_unchanged(client, assert_golden):
    """The API document without the examples, which another test compares."""

    def without_examples(fields):
        return {name: value for name, value in fields.items() if name not in ("example", "x-codeSamples")}

    document = json.loads(client.get("/openapi.json").text, object_hook=without_examples)
    assert_golden("openapi.json", json.dumps(document, indent=1, sort_keys=True))


def test_the_help_of_every_command_is_unchanged(app, command, assert_golden):
    def helps(group, path=()):
        for name, one in sorted(group.commands.items()):
            if path or name not in FLASK_COMMANDS:
                yield f"$ {' '.join((*path, name))}\n{command(*path, name, '--help').output}"
                yield from helps(one, (*path, name)) if hasattr(one, "commands") else ()

    assert_golden("commands.txt", "\n".join(helps(app.cli)))


def test_the_metrics_are_unchanged(api, cast, assert_golden):
    lines = api(cast.admin).get("/metrics").text.splitlines()
    kinds = [line for line in lines if line.startswith("# TYPE belfry")]
    labels = {re.sub(r'="[^"]*"', "", line.rpartition(" ")[0]) for line in lines if line.startswith("belfry")}
    assert_golden("metrics.txt", "\n".join([*sorted(kinds), *sorted(labels)]))


def test_the_schema_is_unchanged(assert_golden):
    tables = """
        SELECT format('%%s.%%s %%s%%s%%s', table_name, column_name, udt_name,
            CASE is_nullable WHEN 'NO' THEN ' not null' ELSE '' END, ' default ' || column_default)
        FROM information_schema.columns WHERE table_schema = 'public'
        ORDER BY table_name, column_name
    """
    constraints = """
        SELECT format('%%s: %%s %%s', conrelid::regclass, conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
        ORDER BY conrelid::regclass::text, conname
    """
    indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY tablename, indexname"
    others = """
        SELECT format('%%s %%s: persistence %%s, options %%s', relkind, relname, relpersistence, reloptions)
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'S', 'v')
        ORDER BY relname
    """
    types = """
        SELECT format('enum %%s: %%s', enumtypid::regtype, enumlabel) FROM pg_enum
        ORDER BY enumtypid, enumsortorder
    """
    found = [line for query in (tables, constraints, indexes, others, types) for (line,) in db.execute_sql(query)]
    lines = [line for line in found if line is not None]
    others = re.compile("notification_before_(?!1000000)|_unread")
    assert_golden("schema.txt", "\n".join(line for line in lines if not others.search(line)))


def test_the_hot_statements_are_unchanged(api, cast, executed, set_slice_size, assert_golden):
    texts = []

    def section(title: str) -> None:
        texts.append("\n".join([f"--- {title}", *executed]))
        executed.clear()

    def post(content: str) -> int:
        response = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": content})
        assert response.status_code == 201
        return int(response.get_json()["run"]["id"])

    post("the first request opens connections")
    executed.clear()
    small = post("gold")
    section("POST /api/messages")
    jobs.run_batch(jobs.claim_batch(small))
    section("jobs.run_batch: a small message, and those that wait behind it")
    alone = post("gold alone")
    executed.clear()
    jobs.notify(alone)
    section("jobs.notify: a small message by itself, as by RQ's own worker")
    post("gold, @moira @everyone")
    section("POST /api/messages with mentions")
    set_slice_size(2)
    large = post("gold to many, @moira")
    executed.clear()
    jobs.notify(large)
    section("jobs.notify: a large message, which is divided into slices")
    [(after,)] = db.execute_sql("SELECT min(after_user_id) FROM slice")
    executed.clear()
    jobs.notify_slice(large, after)
    section("jobs.notify_slice")
    assert_golden("statements.sql", "\n\n".join(texts))


REQUESTS = (
    ("ada", "GET", "/api/me", None),
    ("ada", "GET", "/api/me/tokens", None),
    ("ada", "GET", "/api/channels", None),
    ("ada", "GET", "/api/channels/{general}", None),
    ("ada", "PATCH", "/api/channels/{general}", {"name": "general-2"}),
    ("sam", "GET", "/api/channels/{general}/mention-suggestions?q=m", None),
    ("sam", "GET", "/api/channels/{general}/messages", None),
    ("sam", "GET", "/api/channels/{general}/preference", None),
    ("sam", "PUT", "/api/channels/{general}/preference", {"level": "all", "muted_until": None}),
    ("ada", "GET", "/api/channels/{vault}/roles", None),
    ("ada", "PUT", "/api/channels/{vault}/roles", {"role_ids": ["{vip_role}"]}),
    ("sam", "POST", "/api/messages", {"channel_id": "{general}", "content": "gold, @moira"}),
    ("sam", "GET", "/api/messages/{message}", None),
    ("sam", "PATCH", "/api/messages/{message}", {"content": "silver"}),
    ("sam", "GET", "/api/messages/{message}/explain", None),
    ("sam", "GET", "/api/runs/{run}", None),
    ("ada", "GET", "/api/runs", None),
    ("ada", "POST", "/api/runs/{run}/replay", {"dry_run": True}),
    ("ada", "POST", "/api/runs/{run}/replay", {"dry_run": False}),
    ("ada", "POST", "/api/runs/{run}/retry", None),
    ("moira", "GET", "/api/notifications", None),
    ("moira", "GET", "/api/messages/search?q=gold", None),
    ("moira", "GET", "/api/notifications/unread-count", None),
    ("moira", "POST", "/api/notifications/read", {"ids": ["{moira}-{message}"]}),
    ("moira", "POST", "/api/notifications/read", {"all": True}),
    ("moira", "DELETE", "/api/notifications/{moira}-{message}", None),
    ("moira", "POST", "/api/notifications/{moira}-{message}/restore", None),
    ("moira", "HEAD", "/api/notifications/stream", None),
    ("sam", "DELETE", "/api/messages/{message}", None),
    ("ada", "GET", "/api/servers", None),
    ("ada", "POST", "/api/servers", {"name": "Silver"}),
    ("ada", "GET", "/api/servers/{server}", None),
    ("ada", "GET", "/api/servers/{server}/channels", None),
    ("ada", "POST", "/api/servers/{server}/channels", {"name": "extra"}),
    ("ada", "GET", "/api/servers/{server}/members", None),
    ("ada", "POST", "/api/servers/{server}/members", {"user_id": "{stan}"}),
    ("ada", "PUT", "/api/servers/{server}/members/{stan}", {"role_ids": ["{vip_role}"]}),
    ("ada", "DELETE", "/api/servers/{server}/members/{stan}", None),
    ("ada", "GET", "/api/servers/{server}/roles", None),
    ("ada", "POST", "/api/servers/{server}/roles", {"name": "extra"}),
    ("ada", "GET", "/api/users", None),
    ("ada", "POST", "/api/users", {"username": "nora", "name": "Nora"}),
    ("ada", "GET", "/api/users/{stan}", None),
    ("ada", "PATCH", "/api/users/{stan}", {"name": "Stanley"}),
    ("ada", "GET", "/api/users/{stan}/subscription", None),
    ("ada", "PUT", "/api/users/{stan}/subscription", {"status": "active"}),
    ("ada", "GET", "/api/users/{stan}/tokens", None),
    ("ada", "POST", "/api/users/{stan}/tokens", {}),
    ("ada", "DELETE", "/api/users/{stan}/tokens/{token}", None),
    ("stan", "DELETE", "/api/me/tokens/{own_token}", None),
    ("ada", "POST", "/api/test-notifications", {}),
    ("ada", "DELETE", "/api/me/sessions", None),
    ("ada", "DELETE", "/api/servers/{server}/roles/{vip_role}", None),
    ("ada", "DELETE", "/api/channels/{vault}", None),
    ("", "GET", "/healthz", None),
    ("", "GET", "/readyz", None),
    ("ada", "GET", "/metrics", None),
    ("", "GET", "/openapi.json", None),
    ("", "GET", "/docs", None),
    ("", "GET", "/login", None),
)
"""(user, request) in order: each route of the API at least once, and pages that need no session."""

PAGES = (
    ("GET", "/servers/{server}/channels/{general}"),
    ("GET", "/servers/{server}/channels/{general}/messages"),
    ("GET", "/inbox"),
    ("GET", "/inbox/notifications"),
    ("POST", "/inbox/read"),
    ("GET", "/"),
    ("GET", "/rq/"),
    ("POST", "/logout"),
)
"""Requests of a signed-in admin."""


def test_the_number_of_statements_is_unchanged(app, api, cast, executed, assert_golden):
    people = {person.username: person for person in vars(cast).values() if hasattr(person, "username")}
    names = {
        "general": cast.general, "vault": cast.vault, "server": cast.server_id, "vip_role": cast.vip_role,
        **{name: person.id for name, person in people.items()},
    }  # fmt: skip
    posted = api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"}).get_json()
    jobs.notify(posted["run"]["id"])
    names |= {"message": posted["id"], "run": posted["run"]["id"]}
    tokens = api(cast.admin).get(f"/api/users/{cast.stranger.id}/tokens").get_json()["items"]
    names["own_token"] = tokens[0]["id"]
    names["token"] = api(cast.admin).post(f"/api/users/{cast.stranger.id}/tokens", json={}).get_json()["id"]
    lines = []
    for username, method, path, body in REQUESTS:
        if path.endswith("/retry"):
            execute("UPDATE run SET state = 'failed', error = 'no' WHERE id = %(run)s", names)
        executed.clear()
        sent = {"json": _fill_in(body, names)} if body is not None else {}
        response = api(people.get(username)).open(method, path.format(**names), **sent)
        assert response.status_code < 400, (method, path, response.text)
        lines.append(f"{len(executed):3}  {method} {path}{' ' + json.dumps(body) if body else ''}")
    browser = app.test_client()
    csrf = csrf_of(browser.get("/login").text)
    executed.clear()
    response = browser.post("/login", data={"token": cast.admin.token, "csrf": csrf})
    assert response.status_code == 303, response.text
    lines.append(f"{len(executed):3}  POST /login")
    csrf = csrf_of(browser.get("/inbox").text)
    for method, path in PAGES:
        executed.clear()
        sent = {"data": {"csrf": csrf, "id": f"{cast.admin.id}-{posted['id']}"}} if method == "POST" else {}
        response = browser.open(path.format(**names), method=method, **sent)
        assert response.status_code < 400, (method, path, response.text)
        lines.append(f"{len(executed):3}  {method} {path}")
    requested = {(method.replace("HEAD", "GET"), path.partition("?")[0]) for _, method, path, _ in REQUESTS}
    routes = {
        (method, re.sub("<[^>]*>", "{}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.rule.startswith("/api/")
    }
    assert not routes - {(method, re.sub(r"\{[^/]*\}", "{}", path)) for method, path in requested}
    assert_golden("statement-counts.txt", "\n".join(lines))


def _fill_in(value, names):
    """`value` with each string "{name}" replaced by what it names."""
    if isinstance(value, dict):
        return {key: _fill_in(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_fill_in(one, names) for one in value]
    if isinstance(value, str) and "{" in value:
        filled = value.format(**names)
        return int(filled) if filled.isdigit() else filled
    return value
