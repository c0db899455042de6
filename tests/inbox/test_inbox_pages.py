"""Pages of the inbox: no item is missed or repeated while the inbox changes, and each request takes a fixed number of
SQL statements."""

import threading

import pytest

from belfry.core.db import db, execute
from tests.fanout_helpers import post, post_and_notify, run_to_end, statements
from tests.inbox.test_unread import COUNT
from tests.web.test_errors import assert_problem

MANY = 10_000


def fill(cast, number):
    """Insert this number of unread notifications for the vip, half of general and half of the vault."""
    execute(
        "WITH made AS ("
        "  INSERT INTO message (channel_id, author_id, content)"
        "  SELECT CASE n %% 2 WHEN 0 THEN %(general)s ELSE %(vault)s END, %(author)s, 'gold'"
        "  FROM generate_series(1, %(number)s) AS n ORDER BY n RETURNING id)"
        " INSERT INTO notification (user_id, message_id, reason) SELECT %(vip)s, id, 'message' FROM made",
        {
            "general": cast.general,
            "vault": cast.vault,
            "author": cast.admin.id,
            "number": number,
            "vip": cast.vip.id,
        },
    )
    execute("ANALYZE message, notification")


@pytest.fixture
def posting_thread(cast):
    """A thread that posts messages and notifies users until the test ends."""
    stop, notified, errors = threading.Event(), [], []

    def notify():
        try:
            with db.connection_context():
                while not stop.is_set():
                    notified.append(post_and_notify(cast.subscriber, cast.general, "@vera @everyone"))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=notify)
    yield thread
    stop.set()
    thread.join()
    assert errors == []
    assert len(notified) > 5, "the thread posted during the test"


def message_ids(page):
    return [item["message_id"] for item in page["items"]]


@pytest.mark.parametrize("query", ["", "&unread=1", "&channel_id={general}", "&unread=1&channel_id={general}"])
def test_pages_miss_and_repeat_nothing_while_the_inbox_changes(api, cast, posting_thread, query):
    fill(cast, 120)
    query = query.format(general=cast.general)
    vera, removed, read = api(cast.vip), set(), set()
    present = list(range(120, 0, -1)) if "channel" not in query else list(range(120, 0, -2))
    page = vera.get(f"/api/notifications?limit=7{query}").get_json()
    posting_thread.start()
    seen = [one for one in message_ids(page) if one in present]
    while page["next"]:
        last, before = min(message_ids(page)), max(message_ids(page))
        for dismissed in (before, last - 4):  # one that a page has shown, and one that no page has shown
            if dismissed in present and dismissed not in removed:
                assert vera.delete(f"/api/notifications/{cast.vip.id}-{dismissed}").status_code == 204
                removed.add(dismissed)
        marked = {last, last - 2} & set(present)
        vera.post("/api/notifications/read", json={"ids": [f"{cast.vip.id}-{one}" for one in marked]})
        read |= marked
        page = vera.get(f"/api/notifications?limit=7{query}&cursor={page['next']}").get_json()
        seen += message_ids(page)
    assert seen == [one for one in present if one in seen], "each item once, newest first"
    missing = set(present) - set(seen)
    assert missing <= (removed | read if "unread" in query else removed), "only items that the user removed are missing"
    assert len(seen) > len(present) * 0.6


def test_a_late_notification_of_an_older_message_is_listed_by_message_id(api, cast):
    older, run_id = post(cast.subscriber, cast.general, "older")
    newer = [post_and_notify(cast.subscriber, cast.general, f"{n}") for n in range(3)]
    first = api(cast.vip).get("/api/notifications?limit=2").get_json()
    assert message_ids(first) == [newer[2], newer[1]]
    assert run_to_end(run_id) == "succeeded"
    second = api(cast.vip).get(f"/api/notifications?limit=2&cursor={first['next']}").get_json()
    assert (message_ids(second), second["next"]) == ([newer[0], older], None)


def test_the_last_page_has_no_cursor_and_a_cursor_survives_the_removal_of_its_item(api, cast):
    fill(cast, 4)
    vera = api(cast.vip)
    assert vera.get("/api/notifications?limit=4").get_json()["next"] is None
    page = vera.get("/api/notifications?limit=2").get_json()
    for message_id in (3, 2, 1):
        vera.delete(f"/api/notifications/{cast.vip.id}-{message_id}")
    assert vera.get(f"/api/notifications?cursor={page['next']}").get_json() == {"items": [], "next": None}


def test_a_page_has_between_one_and_a_hundred_items(api, cast, subtests):
    fill(cast, 120)
    for query, number in (("", 50), ("limit=1", 1), ("limit=100", 100)):
        assert len(message_ids(api(cast.vip).get(f"/api/notifications?{query}").get_json())) == number
    for query in (
        "limit=0", "limit=101", "limit=-1", "limit=", "limit=ten", "limit=1.5", "limit=1&limit=2", "limit=9" + "9" * 30,
        "cursor=", "cursor=x", "cursor=YXQgMQ%3D%3D%3D", "cursor=YXQgLTE", "cursor=YXQgOTk5OTk5OTk5OTk5OTk5OTk5OQ",
        "unread=maybe", "unread=", "unread=2", "channel_id=0", "channel_id=-1", "channel_id=x", "channel_id=",
        f"channel_id={2**63}", "unraed=1", "unread=1&unread=0",
    ):  # fmt: skip
        with subtests.test(query):
            problem = assert_problem(api(cast.vip).get(f"/api/notifications?{query}"), 422, "invalid")
            assert list(problem["errors"]) == [query.split("=")[0]]


def test_a_channel_that_the_user_cannot_see_is_not_found(api, cast):
    for channel_id in (cast.vault, 987_654):
        response = api(cast.subscriber).get(f"/api/notifications?channel_id={channel_id}")
        assert_problem(response, 404, "not_found")


REQUESTS = {
    "a page": ("GET", "/api/notifications?limit=100", None, 3),
    "a page in the middle": ("GET", "/api/notifications?limit=5&cursor={cursor}", None, 3),
    "a page of unread notifications": ("GET", "/api/notifications?unread=1", None, 3),
    "a page of a channel": ("GET", "/api/notifications?channel_id={general}", None, 4),
    "the unread count": ("GET", COUNT, None, 2),
    "dismiss one": ("DELETE", "/api/notifications/{vip}-1", None, 3),
    "mark two as read": ("POST", "/api/notifications/read", {"ids": ["{vip}-2", "{vip}-3"]}, 5),
    "mark as read up to one": ("POST", "/api/notifications/read", {"up_to": "{vip}-5"}, 5),
    "mark a channel as read": ("POST", "/api/notifications/read", {"channel_id": "{general}"}, 6),
    "mark all as read": ("POST", "/api/notifications/read", {"all": True}, 5),
}
"""Method, path, body, and the number of SQL statements: find the token, the visible channels, …"""


@pytest.mark.parametrize("number", [10, MANY])
def test_a_request_takes_a_fixed_number_of_statements_for_any_inbox_size(api, cast, number, subtests):
    fill(cast, number)
    vera = api(cast.vip)
    cursor = vera.get(f"/api/notifications?limit={5 if number == 10 else 100}").get_json()["next"]
    names = {"vip": cast.vip.id, "general": cast.general, "cursor": cursor}
    for name, (method, path, body, budget) in REQUESTS.items():
        with subtests.test(name), statements() as executed:
            options = {"json": filled(body, names)} if body else {}
            response = vera.open(method, path.format(**names), **options)
            assert response.status_code in (200, 204), response.get_json()
            assert len(executed) == budget, executed
    assert vera.get(COUNT).get_json()["unread"] == 0


def filled(value, names):
    """Replace {name} in all strings of a body; a string that is only a placeholder becomes the value itself."""
    if isinstance(value, dict):
        return {key: filled(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, names) for one in value]
    if isinstance(value, str):
        return names.get(value.strip("{}"), value.format(**names))
    return value
