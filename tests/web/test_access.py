"""Access rights: each user of the cast against each route, and that invisible resources look like missing ones."""

import re

import pytest

from belfry.servers import servers
from tests.people import make_person
from tests.web.test_errors import assert_problem

PEOPLE = ("admin", "moderator", "subscriber", "vip", "lapsed", "stranger", "nobody")
HELLO = {"content": "hello"}

# In {braces}: messages by the subscriber in #general, by the vip in #vault and by the admin in
# #announcements, their runs, an empty channel; the caller, and another user.
#
#                                                  admin moderator subscriber vip lapsed stranger nobody
TABLE = [
    ("GET /api/channels/{general}", None,                 "200 200 200 200 200 404 401"),
    ("GET /api/channels/{announcements}", None,           "200 200 200 200 200 404 401"),
    ("GET /api/channels/{vault}", None,                   "200 404 404 200 404 404 401"),
    ("GET /api/channels/{general}/mention-suggestions", None,         "200 200 200 200 200 404 401"),
    ("GET /api/channels/{vault}/mention-suggestions", None,           "200 404 404 200 404 404 401"),
    ("GET /api/channels/{general}/messages", None,        "200 200 200 200 200 404 401"),
    ("GET /api/channels/{vault}/messages", None,          "200 404 404 200 404 404 401"),
    ("GET /api/channels/{general}/preference", None,      "200 200 200 200 200 404 401"),
    ("GET /api/channels/{vault}/preference", None,        "200 404 404 200 404 404 401"),
    ("PUT /api/channels/{general}/preference", {},        "200 200 200 200 200 404 401"),
    ("PUT /api/channels/{vault}/preference", {},          "200 404 404 200 404 404 401"),
    ("GET /api/notifications?channel_id={general}", None, "200 200 200 200 200 404 401"),
    ("GET /api/notifications?channel_id={vault}", None,   "200 404 404 200 404 404 401"),
    ("POST /api/notifications/read", {"channel_id": "general"},           "200 200 200 200 200 404 401"),
    ("POST /api/notifications/read", {"channel_id": "vault"},             "200 404 404 200 404 404 401"),
    ("POST /api/messages", {"channel_id": "general", **HELLO},            "201 201 201 201 403 404 401"),
    ("POST /api/messages", {"channel_id": "announcements", **HELLO},      "201 403 403 403 403 404 401"),
    ("POST /api/messages", {"channel_id": "vault", **HELLO},              "201 404 404 201 404 404 401"),
    ("GET /api/messages/{in_general}", None,              "200 200 200 200 200 404 401"),
    ("GET /api/messages/{in_announcements}", None,        "200 200 200 200 200 404 401"),
    ("GET /api/messages/{in_vault}", None,                "200 404 404 200 404 404 401"),
    ("PATCH /api/messages/{in_general}", HELLO,           "403 403 200 403 403 404 401"),
    ("PATCH /api/messages/{in_announcements}", HELLO,     "200 403 403 403 403 404 401"),
    ("PATCH /api/messages/{in_vault}", HELLO,             "403 404 404 200 404 404 401"),
    ("DELETE /api/messages/{in_general}", None,           "200 200 200 403 403 404 401"),
    ("DELETE /api/messages/{in_announcements}", None,     "200 200 403 403 403 404 401"),
    ("DELETE /api/messages/{in_vault}", None,             "200 404 404 200 404 404 401"),
    ("GET /api/runs/{run_in_general}", None,              "200 404 200 404 404 404 401"),
    ("GET /api/runs/{run_in_vault}", None,                "200 404 404 200 404 404 401"),
    ("GET /api/messages/{in_general}/explain", None,      "200 200 200 200 200 404 401"),
    ("GET /api/messages/{in_vault}/explain", None,        "200 404 404 200 404 404 401"),
    ("GET /api/messages/{in_general}/explain?user_id={self}", None,       "200 200 200 200 200 404 401"),
    ("GET /api/messages/{in_general}/explain?user_id={other}", None,      "200 403 403 403 403 404 401"),
    ("GET /api/messages/{in_vault}/explain?user_id={other}", None,        "200 404 404 403 404 404 401"),
    ("PATCH /api/channels/{general}", {"posting": "members"},             "200 403 403 403 403 404 401"),
    ("PATCH /api/channels/{vault}", {"private": True},    "200 404 404 403 404 404 401"),
    ("DELETE /api/channels/{empty}", None,                "204 403 403 403 403 404 401"),
    ("DELETE /api/channels/{general}", None,              "409 403 403 403 403 404 401"),
    ("GET /api/channels/{general}/roles", None,           "200 403 403 403 403 404 401"),
    ("GET /api/channels/{vault}/roles", None,             "200 404 404 403 404 404 401"),
    ("PUT /api/channels/{general}/roles", {"role_ids": []},               "200 403 403 403 403 404 401"),
    ("GET /api/runs", None,                               "200 403 403 403 403 403 401"),
    ("POST /api/runs/{run_in_general}/replay", None,      "202 403 403 403 403 403 401"),
    ("POST /api/test-notifications", None,                "202 403 403 403 403 403 401"),
    ("GET /api/servers/{server}", None,                   "200 403 403 403 403 403 401"),
    ("GET /api/servers/{server}/members", None,           "200 403 403 403 403 403 401"),
    ("GET /api/users/{self}/tokens", None,                "200 403 403 403 403 403 401"),
    ("PUT /api/users/{self}/subscription", {"status": "active"},          "200 403 403 403 403 403 401"),
    ("PATCH /api/users/{self}", {"is_admin": True},       "200 403 403 403 403 403 401"),
    ("GET /api/me", None,                                 "200 200 200 200 200 200 401"),
    ("GET /api/channels", None,                           "200 200 200 200 200 200 401"),
    ("GET /api/notifications", None,                      "200 200 200 200 200 200 401"),
]  # fmt: skip


@pytest.fixture
def create_resources(api, cast):
    """`create_resources()`: create the resources that the table's {names} stand for."""

    def create() -> dict[str, int]:
        names = {name: getattr(cast, name) for name in ("general", "announcements", "vault")}
        for channel, author in (("general", "subscriber"), ("announcements", "admin"), ("vault", "vip")):
            response = api(getattr(cast, author)).post("/api/messages", json={"channel_id": names[channel], **HELLO})
            names[f"in_{channel}"] = response.get_json()["id"]
            names[f"run_in_{channel}"] = response.get_json()["run"]["id"]
        empty = servers.create_channel(cast.server_id, f"empty {names['in_vault']}", False, "members")
        return names | {"empty": empty.id, "server": cast.server_id, "self": cast.admin.id, "other": cast.vip.id}

    return create


def send(api, person, names, request: str, body):
    """The response to one of the table's requests, with `names` filled in."""
    method, address = request.split(" ")
    payload = {**body, "channel_id": names[body["channel_id"]]} if body and "channel_id" in body else body
    return api(person).open(method, address.format(**names), json=payload)


def test_each_role_may_do_what_the_table_says(api, cast, create_resources, subtests):
    names = create_resources()
    for request, body, expected in TABLE:
        with subtests.test(f"{request} {body or ''}"):
            statuses = []
            for person in [cast.everybody.get(name) for name in PEOPLE]:
                names["self"] = person.id if person else cast.admin.id
                names["other"] = cast.moderator.id if person is cast.vip else cast.vip.id
                response = send(api, person, names, request, body)
                statuses.append(str(response.status_code))
                if request.startswith("DELETE") and response.status_code < 300:  # create what was deleted again
                    names = create_resources()
            assert " ".join(statuses) == expected


def test_an_invisible_resource_gets_the_same_response_as_a_missing_one(api, cast, create_resources, subtests):
    """Both responses are the same except for the requested id."""
    names = create_resources()
    missing = dict.fromkeys(names, 987_654)
    for who in ("stranger", "subscriber"):
        hidden = [row for row in TABLE if row[2].split()[PEOPLE.index(who)] == "404"]
        assert len(hidden) > 10
        for request, body, _ in hidden:
            with subtests.test(f"{who} {request}"):
                responses = []
                for ids in (names, missing):
                    response = send(api, cast.everybody[who], ids, request, body)
                    problem = assert_problem(response, 404, "not_found")
                    headers = set(response.headers.keys())
                    responses.append(({**problem, "detail": re.sub(r"\d+", "N", problem["detail"])}, headers))
                assert responses[0] == responses[1]


def test_each_user_lists_the_channels_that_they_can_see(api, cast):
    open_channels = ["general", "announcements"]
    all_channels = [*open_channels, "vault"]
    expected = {"admin": all_channels, "moderator": open_channels, "subscriber": open_channels, "vip": all_channels}
    expected |= {"lapsed": open_channels, "stranger": []}
    for name, channels in expected.items():
        listed = api(cast.everybody[name]).get("/api/channels").get_json()["items"]
        assert [channel["name"] for channel in listed] == channels
    assert len(api(cast.stranger).get("/api/me").get_json()["servers"]) == 0


def test_a_run_is_visible_to_the_author_and_admins(api, cast, create_resources):
    message = create_resources()["in_general"]
    for name, person in cast.everybody.items():
        if name != "stranger":
            run = api(person).get(f"/api/messages/{message}").get_json()["run"]
            listed = api(person).get(f"/api/channels/{cast.general}/messages").get_json()["items"][0]["run"]
            assert run == listed
            assert (run is not None) == (name in ("admin", "subscriber"))


def test_a_role_of_another_server_opens_nothing(api, cast):
    other_server = api(cast.admin).post("/api/servers", json={"name": "Elsewhere"}).get_json()["id"]
    role = servers.create_role(other_server, "vip", moderator=True)
    visitor = make_person("vic")
    servers.put_member(other_server, visitor.id, [role.id])
    assert_problem(api(visitor).get(f"/api/channels/{cast.vault}"), 404, "not_found")
    assert_problem(api(visitor).get(f"/api/channels/{cast.general}"), 404, "not_found")


def test_a_moderator_of_another_server_does_not_moderate_here(api, cast, create_resources):
    other_server = api(cast.admin).post("/api/servers", json={"name": "Elsewhere"}).get_json()["id"]
    role = servers.create_role(other_server, "police", moderator=True)
    servers.put_member(other_server, cast.vip.id, [role.id])
    message = create_resources()["in_general"]
    assert_problem(api(cast.vip).delete(f"/api/messages/{message}"), 403, "forbidden")


def test_a_removed_member_loses_access_at_once(api, cast, create_resources):
    names = create_resources()
    servers.remove_member(cast.server_id, cast.subscriber.id)
    sam = api(cast.subscriber)
    for path in ("channels/{general}", "channels/{general}/messages", "messages/{in_general}"):
        assert_problem(sam.get("/api/" + path.format(**names)), 404, "not_found")
    assert_problem(sam.patch(f"/api/messages/{names['in_general']}", json=HELLO), 404, "not_found")
    assert_problem(sam.delete(f"/api/messages/{names['in_general']}"), 404, "not_found")
    assert sam.get("/api/channels").get_json()["items"] == []


def test_a_test_message_is_visible_only_to_its_caller(api, cast):
    run = api(cast.admin).post("/api/test-notifications", json={"channel_id": cast.general}).get_json()
    path = f"/api/messages/{run['message_id']}"
    assert api(cast.admin).get(path).status_code == 200
    other_admin = make_person("abe", admin=True)
    for person in (cast.subscriber, cast.moderator, other_admin):
        assert_problem(api(person).get(path), 404, "not_found")
        assert api(person).get(f"/api/channels/{cast.general}/messages").get_json()["items"] == []
    assert_problem(api(cast.moderator).delete(path), 404, "not_found")
    assert_problem(api(cast.subscriber).get(f"{path}/explain"), 404, "not_found")


def test_a_user_cannot_make_themselves_an_admin(api, cast):
    assert_problem(api(cast.subscriber).patch("/api/me", json={"is_admin": True}), 405, "method_not_allowed")
    assert_problem(api(cast.subscriber).post("/api/users", json={"username": "eve"}), 403, "forbidden")
    assert api(cast.subscriber).get("/api/me").get_json()["is_admin"] is False
