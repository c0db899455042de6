"""Administration over the API, and the routes for operators."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import create_app
from belfry.core.db import db, execute, fetch_one
from belfry.identity import tokens, users
from models import ApiToken, ChannelRole, Member, MemberRole, Subscription, User
from tests.fanout_helpers import statements
from tests.web.test_errors import METHODS, SHAPE, assert_problem

HOSTILE = (
    "'; DROP TABLE user_account; --", '" OR 1=1 #', "%s %(id)s %% {0} {name}", "{{ 7 * 7 }}{% raw %}",
    "${jndi:ldap://x}", "<script>alert(1)</script>", "../../etc/passwd", "\\x00 \\u0000 \\", "\u202eto the left",
    "\x01\x1b[31m", "null", "0",
)  # fmt: skip


@pytest.fixture
def admin(api, cast):
    return api(cast.admin)


@pytest.fixture
def server(cast):
    return f"/api/servers/{cast.server_id}"


# Users ----------------------------------------------------------------------------------------------------


def test_a_user_is_created_found_and_changed(admin, cast):
    response = admin.post("/api/users", json={"username": " Bob.B ", "name": " Bob ", "email": "bob@example.com"})
    person = response.get_json()
    assert response.status_code == 201
    assert response.headers["Location"] == f"/api/users/{person['id']}"
    assert list(person) == ["id", "username", "name", "email", "is_admin", "created_at"]
    assert (person["username"], person["name"], person["is_admin"]) == ("bob.b", "Bob", False)
    path = f"/api/users/{person['id']}"
    assert admin.get(path).get_json() == person
    assert admin.get("/api/users?username=BOB.b").get_json() == {"items": [person], "next": None}
    assert admin.get("/api/users?username=nobody").get_json() == {"items": [], "next": None}
    changed = {**person, "name": "Bobby", "email": None, "is_admin": True}
    assert admin.patch(path, json={"name": "Bobby", "email": None, "is_admin": True}).get_json() == changed
    assert admin.patch(path, json={}).get_json() == changed
    assert_problem(admin.patch(path, json={"username": "rob"}), 422, "invalid")
    assert admin.post("/api/users", json={"username": "rob"}).get_json()["name"] == "rob"


def test_a_change_of_one_field_keeps_what_another_request_changed_meanwhile(cast, at_failpoint):
    statement = "UPDATE user_account SET is_admin = true, email = 'new@example.org' WHERE id = %(id)s"
    at_failpoint("user.read", lambda: execute(statement, {"id": cast.vip.id}))
    users.update_user(cast.vip.id, {"name": "Another"})
    stored = fetch_one("SELECT name, email, is_admin FROM user_account WHERE id = %(id)s", {"id": cast.vip.id})
    assert stored == {"name": "Another", "email": "new@example.org", "is_admin": True}


def test_users_are_listed_in_pages(admin, cast):
    names, query = [], "limit=2"
    while query:
        page = admin.get(f"/api/users?{query}").get_json()
        names += [person["username"] for person in page["items"]]
        query = page["next"] and f"limit=2&cursor={page['next']}"
    assert names == ["ada", "moira", "sam", "vera", "lars", "stan"]


def test_invalid_usernames_are_refused(admin, server, subtests):
    for name in (
        "ab", "x" * 33, "bob.", "-bob", "bo b", "bób", "b@b", "everyone", "EVERYONE", "belfry", "", "  ", "a'; --",
    ):  # fmt: skip
        for path, field in (("/api/users", "username"), (f"{server}/roles", "name")):
            with subtests.test(name, field=field):
                assert list(assert_problem(admin.post(path, json={field: name}), 422, "invalid")["errors"]) == [field]
    for name in ("abc", "x" * 32, "0.0", "a_b-c.d"):
        assert admin.post("/api/users", json={"username": name}).status_code == 201
        assert admin.post(f"{server}/roles", json={"name": name}).status_code == 201
    for email in ("x", "a b@c", "@", "a@", "@b", "a@b@c", "x" * 250 + "@b.de"):
        response = admin.post("/api/users", json={"username": "new", "email": email})
        assert list(assert_problem(response, 422, "invalid")["errors"]) == ["email"]


def test_hostile_text_is_returned_as_text(admin, api, cast, server, subtests):
    """Hostile names are returned unchanged, and nothing else has changed."""
    for number, text in enumerate(HOSTILE):
        with subtests.test(text):
            created = admin.post("/api/users", json={"username": f"user-{number}", "name": text}).get_json()
            assert admin.get(f"/api/users/{created['id']}").get_json()["name"] == text
            assert admin.post("/api/servers", json={"name": text}).get_json()["name"] == text
            channel = admin.post(f"{server}/channels", json={"name": text}).get_json()
            assert admin.get(f"/api/channels/{channel['id']}").get_json()["name"] == text
            run = admin.post("/api/test-notifications", json={"channel_id": channel["id"], "content": text}).get_json()
            assert admin.get(f"/api/messages/{run['message_id']}").get_json()["content"] == text
            message = {"channel_id": channel["id"], "content": text}
            assert api(cast.subscriber).post("/api/messages", json=message).get_json()["content"] == text
            assert admin.get("/api/users", query_string={"username": text}).get_json()["items"] == []
    assert User.select().count() == 6 + len(HOSTILE) + 1  # and the system user, which sends test notifications


def test_me(api, cast):
    me = api(cast.vip).get("/api/me").get_json()
    assert list(me) == [
        "id", "username", "name", "email", "is_admin", "created_at", "subscription", "servers",
    ]  # fmt: skip
    assert me["subscription"]["status"] == "trialing"
    assert me["servers"] == [{"id": cast.server_id, "name": "Golden Signals"}]
    assert api(cast.admin).get("/api/me").get_json()["subscription"] is None


# Subscriptions and tokens ---------------------------------------------------------------------------------


def test_a_subscription_is_set(admin, cast):
    path = f"/api/users/{cast.admin.id}/subscription"
    assert admin.get(path).get_json() is None
    response = admin.put(path, json={"status": "past_due", "current_period_end": "2026-01-31T13:00:00+01:00"})
    assert (response.status_code, list(response.get_json())) == (200, ["status", "current_period_end", "updated_at"])
    assert response.get_json()["current_period_end"] == "2026-01-31T12:00:00Z"
    assert admin.get(path).data == response.data
    assert admin.put(path, json={"status": "active"}).get_json()["current_period_end"] is None
    assert Subscription.select().where(Subscription.user == cast.admin.id).count() == 1
    assert_problem(admin.put("/api/users/999/subscription", json={"status": "active"}), 404, "not_found")
    assert_problem(admin.put(path, json={"status": "Active"}), 422, "invalid")


def test_setting_the_same_subscription_again_changes_nothing(admin, cast):
    path = f"/api/users/{cast.admin.id}/subscription"
    for period_end in (None, "2026-01-31T12:00:00Z"):
        responses = [admin.put(path, json={"status": "active", "current_period_end": period_end}) for _ in range(2)]
        assert responses[0].data == responses[1].data
        assert admin.get(path).data == responses[0].data


def test_a_token_is_shown_once_and_only_its_hash_is_stored(admin, client, cast):
    path = f"/api/users/{cast.vip.id}/tokens"
    until = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    for body in (None, {"expires_at": until}):
        response = admin.post(path, json=body) if body else admin.post(path)
        created = response.get_json()
        assert response.status_code == 201
        assert created["expires_at"] == (until if body else None)
        header = {"Authorization": f"Bearer {created['token']}"}
        assert client.get("/api/me", headers=header).get_json()["username"] == "vera"
        listed = admin.get(path).get_json()["items"][-1]
        assert listed == {name: value for name, value in created.items() if name != "token"}
        assert bytes(ApiToken.get_by_id(created["id"]).token_hash) == tokens.hash_token(created["token"])
        stored = db.execute_sql("SELECT string_agg(t::text, ' ') FROM api_token t").fetchone()[0]
        assert created["token"] not in stored
        assert created["token"].encode().hex() not in stored
    assert_problem(admin.post("/api/users/999/tokens"), 404, "not_found")
    assert_problem(admin.get("/api/users/999/tokens"), 404, "not_found")


def test_a_revoked_token_stops_working_at_once_and_stays_listed(admin, api, cast):
    token_id = ApiToken.get(ApiToken.user == cast.vip.id).id
    assert_problem(admin.delete(f"/api/users/{cast.lapsed.id}/tokens/{token_id}"), 404, "not_found")
    assert api(cast.vip).get("/api/me").status_code == 200
    assert admin.delete(f"/api/users/{cast.vip.id}/tokens/{token_id}").status_code == 204
    assert_problem(api(cast.vip).get("/api/me"), 401, "unauthenticated")
    revoked = admin.get(f"/api/users/{cast.vip.id}/tokens").get_json()["items"]
    assert revoked[0]["revoked_at"]
    assert admin.delete(f"/api/users/{cast.vip.id}/tokens/{token_id}").status_code == 204
    assert admin.get(f"/api/users/{cast.vip.id}/tokens").get_json()["items"] == revoked


# Servers --------------------------------------------------------------------------------------------------


def test_servers(admin, cast):
    response = admin.post("/api/servers", json={"name": " Silver "})
    created = response.get_json()
    assert (response.status_code, response.headers["Location"]) == (201, f"/api/servers/{created['id']}")
    assert (list(created), created["name"]) == (["id", "name", "created_at"], "Silver")
    assert admin.get(f"/api/servers/{created['id']}").get_json() == created
    assert [found["name"] for found in admin.get("/api/servers").get_json()["items"]] == ["Golden Signals", "Silver"]


def test_members_and_their_roles(admin, cast, server):
    both = sorted([cast.vip_role, cast.moderators_role])
    response = admin.post(f"{server}/members", json={"user_id": cast.stranger.id, "role_ids": [*both, both[0]]})
    member = response.get_json()
    assert response.status_code == 201
    assert member["user"] == {"id": cast.stranger.id, "username": "stan", "name": "Stan"}
    assert member["role_ids"] == both
    path = f"{server}/members/{cast.stranger.id}"
    assert admin.put(path, json={"role_ids": both[:1]}).get_json() == {**member, "role_ids": both[:1]}
    assert admin.get(f"{server}/members?limit=100").get_json()["items"][-1] == {**member, "role_ids": both[:1]}
    page = admin.get(f"{server}/members?limit=5").get_json()
    assert [found["user"]["username"] for found in page["items"]] == ["ada", "moira", "sam", "vera", "lars"]
    assert admin.delete(path).status_code == 204
    assert_problem(admin.delete(path), 404, "not_found")
    assert MemberRole.select().where(MemberRole.user_id == cast.stranger.id).count() == 0
    assert_problem(admin.put(f"{server}/members/999", json={"role_ids": []}), 404, "not_found")
    assert_problem(admin.post("/api/servers/999/members", json={"user_id": cast.vip.id}), 404, "not_found")


def test_a_role_of_another_server_is_refused_and_changes_nothing(admin, cast, server):
    other_server = admin.post("/api/servers", json={"name": "Elsewhere"}).get_json()["id"]
    foreign = admin.post(f"/api/servers/{other_server}/roles", json={"name": "vip"}).get_json()["id"]
    for role in (foreign, 999):
        for method, path in (
            ("PUT", f"{server}/members/{cast.vip.id}"),
            ("PUT", f"{server}/members/{cast.stranger.id}"),
            ("PUT", f"/api/channels/{cast.vault}/roles"),
        ):
            problem = assert_problem(admin.open(method, path, json={"role_ids": [role]}), 422, "invalid")
            assert list(problem["errors"]) == ["role_ids"]
    assert_problem(admin.delete(f"{server}/roles/{foreign}"), 404, "not_found")
    assert [row.role_id for row in MemberRole.select().where(MemberRole.user_id == cast.vip.id)] == [cast.vip_role]
    assert [row.role_id for row in ChannelRole.select()] == [cast.vip_role]
    assert Member.select().where(Member.user == cast.stranger.id).count() == 0


def test_two_requests_set_the_roles_of_a_member_at_the_same_time(admin, api, cast, server):
    def put(path):
        return api(cast.admin).put(path, json={"role_ids": [cast.vip_role, cast.moderators_role]}).status_code

    for path in (f"/api/channels/{cast.vault}/roles", f"{server}/members/{cast.vip.id}"):
        with ThreadPoolExecutor(6) as threads:
            assert set(threads.map(put, [path] * 30)) == {200}
    assert {row.role_id for row in ChannelRole.select()} == {cast.vip_role, cast.moderators_role}


def test_roles(admin, api, cast, server):
    created = admin.post(f"{server}/roles", json={"name": " Police ", "moderator": True})
    assert (created.status_code, created.get_json()["name"], created.get_json()["moderator"]) == (201, "police", True)
    names = [role["name"] for role in admin.get(f"{server}/roles").get_json()["items"]]
    assert names == ["vip", "moderators", "police"]
    assert admin.delete(f"{server}/roles/{cast.vip_role}").status_code == 204
    assert_problem(admin.delete(f"{server}/roles/{cast.vip_role}"), 404, "not_found")
    assert_problem(api(cast.vip).get(f"/api/channels/{cast.vault}"), 404, "not_found")
    assert admin.get(f"/api/channels/{cast.vault}/roles").get_json() == {"items": [], "next": None}


def test_channels(admin, api, cast, server):
    response = admin.post(f"{server}/channels", json={"name": " café ", "private": True, "posting": "admins"})
    created = response.get_json()
    path = f"/api/channels/{created['id']}"
    assert (response.status_code, response.headers["Location"]) == (201, path)
    expected = {
        "id": created["id"], "name": "café", "private": True, "posting": "admins",
        "server": {"id": cast.server_id, "name": "Golden Signals"},
    }  # fmt: skip
    assert json.dumps(created) == json.dumps(expected)
    assert admin.get(path).get_json() == admin.get(f"{server}/channels").get_json()["items"][-1] == created
    assert_problem(api(cast.vip).get(path), 404, "not_found")
    channel_roles = admin.put(f"{path}/roles", json={"role_ids": [cast.vip_role, cast.vip_role]}).get_json()
    assert channel_roles == {"items": [{"id": cast.vip_role, "name": "vip", "moderator": False}], "next": None}
    assert admin.get(f"{path}/roles").get_json() == channel_roles
    assert api(cast.vip).get(path).get_json() == created
    renamed = {**created, "private": False, "name": "tea"}
    assert admin.patch(path, json={"private": False, "name": "tea"}).get_json() == renamed
    assert admin.patch(path, json={}).get_json() == renamed
    assert admin.delete(path).status_code == 204
    assert_problem(admin.get(path), 404, "not_found")
    api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "x"})
    assert_problem(admin.delete(f"/api/channels/{cast.general}"), 409, "conflict")
    assert_problem(admin.post("/api/servers/999/channels", json={"name": "x"}), 404, "not_found")


# For operators --------------------------------------------------------------------------------------------


def readiness(client) -> dict:
    """The errors of /readyz."""
    problem = client.get("/readyz")
    assert (problem.status_code, problem.mimetype) == (503, "application/problem+json")
    assert "Retry-After" in problem.headers
    assert set(problem.get_json()) == SHAPE | {"errors"}
    assert problem.get_json()["code"] == "unavailable"
    return problem.get_json()["errors"]


def test_readiness_names_the_part_that_is_not_ready(client, redis_unavailable, database_unavailable):
    parts = ("database", "redis", "migrations", "partitions", "recovery")
    ready = {"status": "ok", **dict.fromkeys(parts, "ok"), "warnings": []}
    assert (client.get("/readyz").status_code, client.get("/readyz").get_json()) == (200, ready)
    with redis_unavailable():
        assert list(readiness(client)) == ["redis"]
    execute("UPDATE schema_migration SET name = 'another' WHERE name LIKE '0002%%'")
    try:
        assert readiness(client) == {
            "migrations": ["missing: 0002_slices"],
            "partitions": ["unknown until the migrations are applied"],
        }
    finally:
        execute("UPDATE schema_migration SET name = '0002_slices' WHERE name = 'another'")
    with database_unavailable():
        assert list(readiness(client)) == ["database", "migrations", "partitions"]
        assert (client.get("/healthz").status_code, client.get("/healthz").get_json()) == (200, {"status": "ok"})
    assert client.get("/readyz").status_code == 200


def test_simultaneous_readiness_requests_share_one_check(override):
    override(readiness_cache_seconds=600)
    app = create_app()
    with statements() as executed, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: app.test_client().get("/readyz"), range(40)))
    assert [response.status_code for response in responses] == [200] * 40
    assert sum("SELECT 1" in sql for sql in executed) == 1


def test_metrics(api, cast, client, override):
    assert_problem(client.get("/metrics"), 401, "unauthenticated")
    assert_problem(client.get("/metrics", headers={"Authorization": "Bearer "}), 401, "unauthenticated")
    assert_problem(api(cast.subscriber).get("/metrics"), 403, "forbidden")
    api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "x"})
    families = {family.name: family for family in text_string_to_metric_families(api(cast.admin).get("/metrics").text)}
    assert {"belfry_dependency_up", "belfry_queue_jobs", "belfry_rq_workers", "belfry_runs"} <= set(families)
    queued = {tuple(sample.labels.values()): sample.value for sample in families["belfry_queue_jobs"].samples}
    assert (queued["notifications", "queued"], queued["bulk", "queued"]) == (1, 0)
    states = {sample.labels["state"]: sample.value for sample in families["belfry_runs"].samples}
    assert states == {"pending": 0, "queued": 1, "running": 0, "failed": 0}
    override(metrics_token="scrape-me")
    scraped = client.get("/metrics", headers={"Authorization": "Bearer scrape-me"})
    assert (scraped.status_code, scraped.mimetype) == (200, "text/plain")
    assert_problem(client.get("/metrics", headers={"Authorization": "Bearer scrape-m"}), 401, "unauthenticated")
    assert_problem(client.get("/api/me", headers={"Authorization": "Bearer scrape-me"}), 401, "unauthenticated")


def test_the_api_document_has_every_route_and_its_references_resolve(app, client):
    document = client.get("/openapi.json").get_json()
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        if rule.rule.startswith("/api/")
        for method in rule.methods & METHODS
    }
    documented = {(path, method): it for path, methods in document["paths"].items() for method, it in methods.items()}
    assert set(documented) == routes
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    names = [operation["operationId"] for operation in documented.values()]
    assert len(set(names)) == len(names)
    for (path, _), operation in documented.items():
        given = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"]
        assert given == re.findall(r"{(\w+)}", path)
        assert operation["summary"]
        assert {"401", "404", "429", "503"} <= set(operation["responses"])


def test_the_docs_page_loads_nothing_from_other_hosts(app, client):
    page = client.get("/docs")
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert not re.search(r"<script|<iframe|javascript:|\son\w+=|style=", page.text)
    assert all(re.match(r"[/#](?!/)", target) for target in re.findall(r'(?:src|href)="([^"]*)"', page.text))
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    for operation in ("post_message", "list_notifications", "put_subscription"):
        assert f'id="{operation}"' in page.text
    with client.get(re.search(r'rel="stylesheet" href="([^"]+)"', page.text)[1]) as style:
        assert style.status_code == 200
        assert not re.search(r"@import|url\(", style.text)
