"""The HTML of the pages: access, contents, forms, and hostile texts."""

import re
from html.parser import HTMLParser

import pytest

from belfry.core.db import execute
from belfry.core.markdown import parse
from belfry.identity import sessions, tokens
from belfry.inbox import inbox
from belfry.messages import rendering, sidebar
from belfry.servers import servers
from models import ApiToken, Channel, Message, User
from tests.fanout_helpers import statements
from tests.people import csrf_of, make_person

POLICY = {
    "default-src": "'none'", "base-uri": "'none'", "frame-ancestors": "'none'", "form-action": "'self'",
    "script-src": "'self'", "style-src": "'self'", "img-src": "'self' data:", "connect-src": "'self'",
    "require-trusted-types-for": "'script'", "trusted-types": "'none'",
}  # fmt: skip
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\'{{ 7*7 }}'


@pytest.fixture
def browser(app):
    """`browser(person)`: a client that is signed in; `browser()`: one that is not."""

    def open_browser(person=None):
        client = app.test_client()
        if person:
            csrf = csrf_of(client.get("/login").text)
            assert client.post("/login", data={"csrf": csrf, "token": person.token}).status_code == 303
        return client

    return open_browser


@pytest.fixture
def post(api, cast):
    """`post("text")`: post over the API, by default in #general as sam; the message's id."""

    def post_message(content, channel_id=None, author=None):
        body = {"channel_id": channel_id or cast.general, "content": content}
        response = api(author or cast.subscriber).post("/api/messages", json=body)
        assert response.status_code == 201
        return response.json["id"]

    return post_message


def shown(html: str) -> list[int]:
    """The ids of the messages in the order of the page."""
    return [int(number) for number in re.findall(r'<li id="message-(\d+)"', html)]


def address(cast, channel_id, rest=""):
    return f"/servers/{cast.server_id}/channels/{channel_id}{rest}"


class Tags(HTMLParser):
    """Collects the elements of a page with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# Access ---------------------------------------------------------------------------------------------------


def test_a_visitor_signs_in_and_returns_to_the_requested_page(browser, cast):
    visitor = browser()
    assert visitor.get("/").location == "/login?next=/"
    for path in (address(cast, cast.general), address(cast, cast.general, "?around=7"), "/inbox", "/inbox?unread=1"):
        response = visitor.get(path)
        assert response.status_code == 303
        form = visitor.get(response.location).text
        signed_in = visitor.post(
            "/login",
            data={
                "csrf": csrf_of(form),
                "token": cast.subscriber.token,
                "next": re.search('name="next" value="([^"]+)"', form)[1],
            },
        )
        assert signed_in.location == path
        visitor = browser()


def test_a_script_gets_401_when_signed_out(browser, cast):
    for path in (address(cast, cast.general, "/messages"), "/inbox/notifications"):
        assert browser().get(path).status_code == 401
    assert browser().post("/inbox/read").status_code == 401


def test_the_home_page_is_the_first_visible_channel(browser, cast):
    home = browser(cast.subscriber).get("/")
    assert (home.status_code, home.location) == (303, address(cast, cast.general))


def test_a_user_without_a_server_is_shown_a_page_that_says_so(browser, cast):
    page = browser(cast.stranger).get("/")
    assert page.status_code == 200
    assert "not a member of any server" in page.text


def test_an_invisible_channel_is_404(browser, cast, subtests):
    expected = {
        "general": "200 200 200 200 200 404",
        "announcements": "200 200 200 200 200 404",
        "vault": "200 404 404 200 404 404",
    }
    for name, statuses in expected.items():
        for (who, person), status in zip(cast.everybody.items(), statuses.split(), strict=True):
            for rest in ("", "/messages"):
                with subtests.test(f"{who} {name}{rest}"):
                    response = browser(person).get(address(cast, getattr(cast, name), rest))
                    assert response.status_code == int(status)
                    assert response.mimetype == "text/html"
    sam = browser(cast.subscriber)
    hidden, nothing = (sam.get(address(cast, channel)).text for channel in (cast.vault, 987_654))
    assert hidden.replace(str(cast.vault), "N") == nothing.replace("987654", "N")


def test_a_channel_under_another_server_is_404(browser, cast):
    assert browser(cast.admin).get(f"/servers/{cast.server_id + 1}/channels/{cast.general}").status_code == 404


def test_the_sidebar_lists_the_visible_channels(browser, cast):
    open_channels = {"general", "announcements"}
    for person, names in ((cast.subscriber, open_channels), (cast.vip, open_channels | {"vault"})):
        page = browser(person).get(address(cast, cast.general)).text
        assert set(re.findall(r'class="name">#(\w+)<', page)) == names


def test_the_sidebar_of_an_admin_is_bounded(browser, cast):
    ada, general = browser(cast.admin), address(cast, cast.general)
    assert "Not all channels are listed" not in ada.get(general).text
    execute("INSERT INTO server (name) SELECT 'server ' || n FROM generate_series(1, 50) AS n")
    execute(
        "INSERT INTO channel (server_id, name, private, posting)"
        " SELECT v.id, 'many ' || n, false, 'members' FROM server v, generate_series(1, 10) AS n"
        " WHERE v.name LIKE 'server %%' ORDER BY v.id"
    )
    last = Channel.select().order_by(Channel.id.desc()).first()
    late = servers.create_channel(cast.server_id, "late", private=True, posting="members")

    def listed(person, path):
        page = browser(person).get(path).text
        return [int(id_) for id_ in re.findall(r'data-channel="(\d+)"[^>]*>\s*<span class="name">', page)]

    own = {cast.general, cast.announcements, cast.vault, late.id}
    found = listed(cast.admin, general)
    assert own < set(found)
    assert len(found) == len(own) + sidebar.MAX_OTHER_CHANNELS
    assert "Not all channels are listed" in ada.get(general).text
    viewed = f"/servers/{last.server_id}/channels/{last.id}"
    assert set(listed(cast.admin, viewed)) == {*found, last.id}
    assert set(listed(cast.vip, general)) == {cast.general, cast.announcements, cast.vault}
    assert "Not all channels are listed" not in browser(cast.vip).get(general).text


def test_the_page_says_why_the_reader_may_not_post(browser, cast):
    def reason(person, channel_id):
        page = browser(person).get(address(cast, channel_id)).text
        found = re.search(r'<p id="may-not-post">(.*?)</p>', page, re.DOTALL)
        assert bool(found) != ('id="compose"' in page)
        return found and found[1].strip()

    assert reason(cast.subscriber, cast.general) is None
    assert reason(cast.admin, cast.announcements) is None
    assert reason(cast.subscriber, cast.announcements).startswith("Only admins can post in #announcements.")
    assert reason(cast.lapsed, cast.general).startswith("Posting needs an active subscription.")


def test_a_session_ends_with_its_token(browser, cast):
    sam = browser(cast.subscriber)
    assert sam.get("/inbox").status_code == 200
    ApiToken.update(revoked_at=ApiToken.created_at).where(
        ApiToken.token_hash == tokens.hash_token(cast.subscriber.token)
    ).execute()
    assert sam.get("/inbox").status_code == 303


# Messages -------------------------------------------------------------------------------------------------


def test_a_page_of_long_messages_has_fewer_messages(browser, cast):
    ids = [
        Message.create(channel_id=cast.general, author_id=cast.subscriber.id, content="long " * 2_000).id
        for _ in range(30)
    ]
    sam = browser(cast.subscriber)
    page = sam.get(address(cast, cast.general)).text
    assert shown(page) == ids[-10:]
    assert len(page) < 130_000
    assert 'id="older"' in page
    assert shown(sam.get(address(cast, cast.general, f"?before={ids[-10]}")).text) == ids[-20:-10]
    after = sam.get(address(cast, cast.general, f"?after={ids[0]}")).text
    assert shown(after) == ids[1:11]
    assert "data-newer" in after
    around = sam.get(address(cast, cast.general, f"?around={ids[15]}")).text
    assert shown(around) == ids[11:21]
    assert "data-newer" in around
    assert "data-older" in around


def test_a_parsed_message_is_reused_until_it_is_edited(api, browser, cast, post, monkeypatch):
    parsed = []
    monkeypatch.setattr(rendering.markdown, "parse", lambda content, *rest: parsed.append(content) or parse(content))
    message_id = post("**gold**, @vera")
    for person in (cast.subscriber, cast.vip, cast.moderator, cast.subscriber):
        page = browser(person).get(address(cast, cast.general)).text
        assert ('<span class="mention me">@vera</span>' in page) == (person is cast.vip)
    assert parsed.count("**gold**, @vera") == 3  # for the post, for vera, and for all others
    api(cast.subscriber).patch(f"/api/messages/{message_id}", json={"content": "**silver**, @vera"})
    assert "<strong>silver</strong>" in browser(cast.vip).get(address(cast, cast.general)).text


def test_messages_are_in_order_and_older_ones_behind_a_link(browser, cast, post):
    ids = [post(f"number {number}") for number in range(120)]
    sam, read, path = browser(cast.subscriber), [], address(cast, cast.general)
    while path:
        page = sam.get(path).text
        read = shown(page) + read
        link = re.search(r'<a id="older" href="([^"]+)"', page)
        path = link and link[1]
    assert read == ids
    page = sam.get(address(cast, cast.general, f"?before={ids[50]}")).text
    newer = re.search(r'<a id="newer" href="([^"]+)"', page)[1]
    assert shown(sam.get(newer).text) == ids[50:100]


def test_a_permanent_link_shows_an_old_message(browser, cast, post):
    ids = [post(f"number {number}") for number in range(120)]
    sam = browser(cast.subscriber)
    for index, expected, newer in ((60, ids[36:86], True), (0, ids[:26], True), (119, ids[95:], False)):
        page = sam.get(address(cast, cast.general, f"?around={ids[index]}")).text
        assert shown(page) == expected
        assert ("data-newer" in page) == newer


def test_the_messages_route_returns_only_the_messages(browser, cast, post):
    first, second, third = (post(text) for text in ("one", "two", "three"))
    sam = browser(cast.subscriber)
    fragment = sam.get(address(cast, cast.general, f"/messages?after={first}")).text
    assert shown(fragment) == [second, third]
    assert "<nav" not in fragment
    assert shown(sam.get(address(cast, cast.general, f"/messages?after={third}")).text) == []


@pytest.mark.parametrize("position", ["x", "-1", "1.5", "٣", "9" * 19, "9" * 40, "", "%00"])
def test_an_invalid_position_is_ignored(browser, cast, post, position):
    post("hello")
    sam = browser(cast.subscriber)
    for name in ("before", "after", "around"):
        assert sam.get(address(cast, cast.general, f"?{name}={position}")).status_code == 200
    assert sam.get(f"/inbox?before={position}").status_code == 200


def test_messages_are_rendered_and_mentions_of_the_reader_marked(browser, cast, post):
    ids = [post("**gold** @vera", author=cast.admin), post("@vip", author=cast.admin), post("nobody")]
    page = browser(cast.vip).get(address(cast, cast.general)).text
    assert "<strong>gold</strong>" in page
    assert [bool(re.search(rf'<li id="message-{id_}"[^>]*names-me', page)) for id_ in ids] == [True, True, False]
    page = browser(cast.subscriber).get(address(cast, cast.general)).text
    assert "names-me" not in page


def test_the_run_is_offered_to_the_author_and_to_admins(browser, cast, post):
    post("hello")
    for name, offered in (("subscriber", True), ("admin", True), ("vip", False)):
        page = browser(cast.everybody[name]).get(address(cast, cast.general)).text
        assert ("data-run=" in page) == offered


def test_a_page_says_whether_the_reader_may_use_the_stream(browser, cast):
    for name, person in cast.everybody.items():
        for path in ("/inbox",) if name == "stranger" else ("/inbox", address(cast, cast.general)):
            assert ("data-can-stream" in browser(person).get(path).text) == (name not in ("lapsed", "stranger")), name


def test_the_effect_of_the_preference_is_shown(browser, api, cast):
    def effect(person, channel_id):
        page = browser(person).get(address(cast, channel_id)).text
        return re.search(r'<noscript><p class="notice">(.*?)\. ', page)[1]

    sam = api(cast.subscriber)
    path = f"/api/channels/{cast.general}/preference"
    assert effect(cast.subscriber, cast.general) == "You are notified of every message here"
    sam.put(path, json={"level": "mentions"})
    assert effect(cast.subscriber, cast.general).startswith("You are notified only of messages that mention you")
    sam.put(path, json={"muted_until": "2090-01-02T03:04:00Z"})
    assert effect(cast.subscriber, cast.general).startswith("Until 02 Jan 2090, 03:04 UTC you are notified only")
    sam.put(path, json={"muted_until": "2000-01-02T03:04:00Z"})
    assert effect(cast.subscriber, cast.general) == "You are notified of every message here"
    assert "active subscription" in effect(cast.lapsed, cast.general)
    assert "none of your roles opens this channel" in effect(cast.admin, cast.vault)


# The inbox ------------------------------------------------------------------------------------------------


def test_the_inbox_shows_the_notifications(browser, cast, post, run_jobs):
    plain, named = post("gold breaks out"), post("look, @vera")
    run_jobs()
    vera = browser(cast.vip)
    page = vera.get("/inbox").text
    items = re.findall(r'<li id="notification-(\S+)"[^>]*class="notification ([^"]+)"', page)
    assert items == [(f"{cast.vip.id}-{named}", "unread mention"), (f"{cast.vip.id}-{plain}", "unread")]
    assert f'href="{address(cast, cast.general)}?around={named}#message-{named}"' in page
    assert re.search(r'<a id="bell"[^>]*class="mentions".*?class="number">2<', page, re.DOTALL)
    assert "<title>(2) Inbox" in page
    assert re.search(r'class="count mentions"><span class="number">2<', page)


def test_the_forms_of_the_inbox_mark_read(browser, cast, post, run_jobs):
    first, second = post("one"), post("two")
    run_jobs()
    vera = browser(cast.vip)
    form = {"csrf": csrf_of(vera.get("/inbox").text)}
    assert vera.post("/inbox/read", data={**form, "id": f"{cast.vip.id}-{first}"}).location == "/inbox"
    page = vera.get("/inbox?unread=1").text
    assert re.findall(r'<li id="notification-\d+-(\d+)"', page) == [str(second)]
    assert vera.post("/inbox/read", data={**form, "id": f"{cast.subscriber.id}-{second}"}).status_code == 303
    assert "<title>(1)" in vera.get("/inbox").text
    assert vera.post("/inbox/read", data={**form, "all": "1"}).status_code == 303
    assert "<title>Inbox" in vera.get("/inbox").text
    assert vera.post("/inbox/read", data={**form, "id": "nothing"}).status_code == 404


def test_a_form_without_notifications_marks_nothing(browser, cast, post, run_jobs):
    name = f"{cast.vip.id}-{post('one')}"
    run_jobs()
    vera = browser(cast.vip)
    csrf = csrf_of(vera.get("/inbox").text)
    for form in ({}, {"id": name, "all": "1"}, {"all": ""}, {"all": "0"}):
        assert vera.post("/inbox/read", data={"csrf": csrf, **form}).status_code == 422, form
    assert "<title>(1)" in vera.get("/inbox").text
    forms = re.findall(r'<form method="post" action="/inbox/read".*?</form>', vera.get("/inbox").text, re.DOTALL)
    fields = [dict(re.findall(r'<input type="hidden" name="(id|all)" value="([^"]+)"', form)) for form in forms]
    assert fields == [{"all": "1"}, {"id": name}]


def test_a_form_of_another_session_marks_nothing(browser, cast, post, run_jobs):
    post("one")
    run_jobs()
    vera = browser(cast.vip)
    for form in ({}, {"csrf": ""}, {"csrf": csrf_of(browser(cast.subscriber).get("/inbox").text)}):
        assert vera.post("/inbox/read", data=form).status_code == 403
    assert "<title>(1)" in vera.get("/inbox").text


def test_older_notifications_are_behind_a_link(browser, cast, post, run_jobs):
    ids = [post(str(number)) for number in range(60)]
    run_jobs()
    vera, read, path = browser(cast.vip), [], "/inbox?unread=1"
    while path:
        page = vera.get(path).text
        read += [int(id_) for id_ in re.findall(r'<li id="notification-\d+-(\d+)"', page)]
        link = re.search(r'<a href="(/inbox\?before=[^"]+)"', page)
        path = link and link[1].replace("&amp;", "&")
    assert read == ids[::-1]


# Hostile texts and policies -------------------------------------------------------------------------------


def pages(cast):
    return [address(cast, cast.general), address(cast, cast.general, "/messages"), "/inbox", "/inbox/notifications"]


def test_the_policy_permits_only_own_scripts(browser, cast, post):
    sam = browser(cast.subscriber)
    responses = [sam.get(path) for path in [*pages(cast), "/", address(cast, cast.vault)]]
    responses += [browser(cast.stranger).get("/"), browser().get("/inbox"), sam.post("/inbox/read")]
    for response in responses:
        policy = response.headers["Content-Security-Policy"]
        assert dict(part.split(" ", 1) for part in policy.split("; ")) == POLICY
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"


def test_no_page_needs_more_than_the_policy_permits(browser, cast, post, run_jobs):
    post("hello")
    run_jobs()
    for path in pages(cast):
        for tag, attributes in Tags(browser(cast.admin).get(path).text).found:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
            assert tag not in ("style", "iframe", "object", "embed", "base")
            if tag == "script":
                assert attributes["src"].startswith("/static/page/")
            for name in ("src", "href", "action"):
                if value := attributes.get(name):
                    assert value[0] in "/#" and value[:2] != "//", (tag, value)  # noqa: PT018


def test_hostile_names_and_contents_are_text(browser, cast, post, run_jobs):
    servers.update_channel(cast.general, {"name": HOSTILE})
    User.update(name=HOSTILE).where(User.id == cast.subscriber.id).execute()
    Message.update(content=HOSTILE).where(Message.id == post("@vera")).execute()
    run_jobs()
    for person in (cast.subscriber, cast.vip, cast.admin):
        for path in pages(cast):
            page = browser(person).get(path).text
            assert ("{{ 7*7 }}" in page) or "inbox/notifications" in path, "template syntax is not evaluated"
            for tag, attributes in Tags(page).found:
                assert tag != "script" or attributes["src"].startswith("/static/page/")
                assert tag != "img"
                assert not [name for name in attributes if name.startswith("on")]


def test_the_number_of_statements_does_not_grow_with_the_page(browser, cast, post, run_jobs):
    ada = browser(cast.admin)
    paths = [*pages(cast), address(cast, cast.general, "?around=20")]
    post("one @vera @moira")
    run_jobs()
    counts = []
    for first_number in (0, 20):
        counts.append([])
        for path in paths:
            with statements() as executed:
                assert ada.get(path).status_code == 200
            counts[-1].append(len(executed))
        for number in range(60):
            post(f"number {number} @vera @moira")
        for number in range(first_number, first_number + 20):
            person = make_person(f"member-{number}")
            servers.put_member(cast.server_id, person.id, [cast.vip_role])
        run_jobs()
    assert counts[0] == counts[1] == [14, 6, 6, 3, 14]


# Errors ----------------------------------------------------------------------------------------------------


def test_an_error_is_a_page(browser, cast, monkeypatch, override):
    sam = browser(cast.subscriber)
    path = address(cast, cast.general)

    def assert_page(status, text):
        response = sam.get(path)
        assert (response.status_code, response.mimetype) == (status, "text/html")
        assert text in response.text
        assert response.headers["Content-Security-Policy"]
        return response

    override(rate_limit_default="1 per hour")
    sam.get(path)
    assert int(assert_page(429, "Too many requests").headers["Retry-After"]) > 3_500
    override(rate_limit_default="1200 per minute")
    with monkeypatch.context() as patch:
        patch.setattr(inbox, "unread_count", lambda user: 1 / 0)
        assert_page(500, "It was logged as request")
    with monkeypatch.context() as patch:
        end_own_session = "SELECT pg_terminate_backend(pg_backend_pid())"
        patch.setattr(sessions, "find_session", lambda session_id: execute(end_own_session))
        assert_page(503, "The database is unavailable")
    assert_page(200, "#general")
