"""The web page: channels, messages and the inbox, for browsers.

The HTML is readable without JavaScript. static/page/ adds live updates and writing, over the API.
"""

from collections.abc import Set
from datetime import UTC, date, datetime
from typing import Any

from flask import Blueprint, Response, g, redirect, render_template, request, url_for
from markupsafe import Markup
from werkzeug.wrappers import Response as AnyResponse

from belfry.core.db import LARGEST_ID, Row
from belfry.core.errors import Forbidden, Invalid, NotFound
from belfry.core.markdown import Budget
from belfry.core.plain_text import excerpt
from belfry.inbox import inbox
from belfry.inbox.inbox import parse_notification_id
from belfry.messages.history import PAGE_SIZE, load_page
from belfry.messages.mentions import EVERYONE
from belfry.messages.rendering import page_budget, render_in_page
from belfry.messages.search import MAX_QUERY_CHARACTERS, search
from belfry.messages.sidebar import sidebar_channels
from belfry.servers import preferences
from belfry.servers.servers import roles_of
from belfry.servers.visibility import (
    VisibleChannel,
    get_visible_channel,
    receives_notifications_in,
    require_posting,
    visible_channels,
)
from belfry.stream import updates
from belfry.stream.publish import publish
from belfry.web import auth
from belfry.web.endpoint import READS
from belfry.web.problems import HttpProblem
from config import settings
from models import User

PARTS = ("pages.messages", "pages.notifications")  # for the parts of a page that its scripts fetch
POLICY = auth.POLICY + (
    "; script-src 'self'; connect-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
)

SHORTCUTS = (
    ("?", "this list"),
    ("/", "search"),
    ("i", "the inbox"),
    ("m", "the message field"),
    ("n", "the newest messages"),
    ("↑", "in the empty message field: edit your last message"),
    ("Esc", "close a list, a dialog or an edit"),
    ("j, k", "in the inbox: the next and the previous notification"),
    ("e", "in the inbox: mark it read"),
    ("Delete", "in the inbox: remove it"),
    ("z", "in the inbox: undo that"),
)  # static/page/shortcuts.js, compose.js, inbox.js
SEARCH_EXCERPT = 300  # characters of each message that is found

blueprint = Blueprint("pages", __name__)


@blueprint.before_request
def _admit() -> AnyResponse | None:
    """Redirect to /login without a session; scripts get 401. A write must come from a form of this session."""
    if g.user is None:
        if request.endpoint in PARTS or request.method not in READS:
            raise HttpProblem(401, "You are signed out.")
        return redirect(url_for("sign_in.login", next=request.full_path.rstrip("?")), 303)
    if request.method not in READS and not auth.csrf_matches(request.form.get("csrf", "")):
        raise HttpProblem(403, "This form has expired. Go back and try again.")
    return None


@blueprint.after_request
def _protect(answer: Response) -> Response:
    """Allow only the scripts that are served here, and show errors as pages."""
    if answer.mimetype == "application/problem+json":
        problem = answer.get_json()
        answer.set_data(render_template("error.html", problem=problem))
        answer.mimetype = "text/html"
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["Referrer-Policy"] = "same-origin"
    return answer


@blueprint.get("/")
def home() -> AnyResponse | str:
    """303 to the first channel that the user can see."""
    channels = visible_channels(g.user, limit=1)
    return redirect(_address(channels[0]), 303) if channels else _page("no_channels.html")


@blueprint.get("/servers/<id:server_id>/channels/<id:channel_id>")
def channel(server_id: int, channel_id: int) -> str:
    """A channel: its messages `before`, `after` or `around` one; by default the first unread ones.

    Where nothing is unread, or with `newest`, the newest messages.
    """
    seen = _channel(server_id, channel_id)
    preference, effects = preferences.preference_of(g.user, channel_id), _effects(g.user, seen)
    count = inbox.unread_count(g.user)
    has_unread = any(one["channel_id"] == channel_id for one in count["channels"])
    return _page(
        "channel.html",
        channel=seen,
        count=count,
        **_message_page(seen, inbox.first_unread(g.user, channel_id) if has_unread else None),
        may_not_post=_posting_denied_reason(g.user, seen),
        preference=preference,
        effects=effects,
        effect=_effect(preference, effects),
    )


@blueprint.get("/servers/<id:server_id>/channels/<id:channel_id>/messages")
def messages(server_id: int, channel_id: int) -> str:
    """Only the messages of a channel's page, or the messages `ids`, with commas between them."""
    seen = _channel(server_id, channel_id)
    return render_template("messages.html", channel=seen, **_message_page(seen, None))


@blueprint.get("/search")
def search_page() -> str:
    """Search messages: `q`, in all visible channels or in one `channel`, from the top or `before` one."""
    query, channel_id = request.args.get("q", "").strip()[:MAX_QUERY_CHARACTERS], _position("channel")
    found, problem = [], None
    if query:
        try:
            found = search(g.user, query, channel_id=channel_id, before=_position("before"), limit=PAGE_SIZE + 1)
        except Invalid as error:
            problem = error.errors["q"][0]
    return _page(
        "search.html",
        query=query,
        problem=problem,
        searched_channel=channel_id,
        found=[one | {"excerpt": excerpt(one["content"], SEARCH_EXCERPT)} for one in found[:PAGE_SIZE]],
        more=len(found) > PAGE_SIZE,
    )


@blueprint.get("/inbox")
def inbox_page() -> str:
    """The inbox, newest first: all notifications, the `unread` ones, `mentions`, those of a `channel`, `before` one."""
    return _page("inbox.html", undo=request.args.get("undo"), **_notifications())


@blueprint.get("/inbox/notifications")
def notifications() -> str:
    """Only the notifications of the inbox."""
    return render_template("notifications.html", csrf=auth.csrf_token(), **_notifications())


@blueprint.post("/inbox/dismiss")
def dismiss() -> AnyResponse:
    """Remove the notification `id` from the inbox, or with `undo` restore it. 303 to the inbox."""
    try:
        key = parse_notification_id(request.form.get("id", ""))
    except ValueError:
        raise NotFound("There is no such notification.") from None
    undo = request.form.get("undo") == "1"
    (inbox.restore if undo else inbox.dismiss)(g.user, *key)
    publish(user_id=g.user.id)
    return redirect(url_for("pages.inbox_page", undo=None if undo else inbox.notification_id(*key)), 303)


@blueprint.post("/inbox/read")
def mark_read() -> AnyResponse:
    """Mark the notifications `id` read, with commas between them, or all. 303 to the inbox, or to `channel`.

    422 unless exactly one of the two is given.
    """
    names, everything = request.form.get("id"), request.form.get("all") == "1"
    if (names is not None) == everything:
        raise HttpProblem(422, "Give notifications to mark as read, or `all`.")
    if everything:
        inbox.mark_all_read(g.user)
    else:
        try:
            inbox.mark_read(g.user, ids=[parse_notification_id(name) for name in (names or "").split(",")[:PAGE_SIZE]])
        except ValueError:
            raise NotFound("There is no such notification.") from None
    publish(user_id=g.user.id)
    if channel_id := _id(request.form.get("channel", "")):
        seen = get_visible_channel(g.user, channel_id)
        return redirect(url_for("pages.channel", server_id=seen.server_id, channel_id=seen.id, _anchor="new"), 303)
    return redirect(url_for("pages.inbox_page"), 303)


def _page(template: str, *, count: Row | None = None, **context: Any) -> str:
    """A whole page, with the channels, their unread counts, and whether the user may use the stream."""
    count, current = count or inbox.unread_count(g.user), auth.current_session()
    by_channel = {channel["channel_id"]: channel for channel in count["channels"]}
    servers: dict[int, Row] = {}
    viewed: VisibleChannel | None = context.get("channel")
    channels, more_channels = sidebar_channels(g.user, viewed.id if viewed else None)
    for one in channels:
        server = servers.setdefault(one["server"]["id"], {**one["server"], "channels": []})
        server["channels"].append({**one, "address": _address(one), "count": by_channel.get(one["id"])})
    return render_template(
        template,
        user=g.user,
        csrf=auth.csrf_token(),
        servers=list(servers.values()),
        more_channels=more_channels,
        count=count,
        unread_here=by_channel[viewed.id]["unread"] if viewed and viewed.id in by_channel else 0,
        subscribe_url=settings.subscribe_url,
        shortcuts=SHORTCUTS,
        can_stream=current is not None and current.session_hash in updates.authorized_clients([current.session_hash]),
        **context,
    )


def _address(channel: Row) -> str:
    return url_for("pages.channel", server_id=channel["server"]["id"], channel_id=channel["id"])


def _channel(server_id: int, channel_id: int) -> VisibleChannel:
    seen = get_visible_channel(g.user, channel_id)
    if seen.server_id != server_id:
        raise NotFound(f"There is no channel {channel_id}.")
    return seen


def _id(text: str) -> int | None:
    """Parse a message's id; None for any other text."""
    return min(int(text), LARGEST_ID - 1) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _position(name: str) -> int | None:
    """A message's id in the query; None without one, or for any other text."""
    return _id(request.args.get(name, ""))


def _message_page(seen: VisibleChannel, first_unread: int | None) -> Row:
    """The messages that the query asks for, by default those around the first unread one; and the reader's names."""
    roles = roles_of(g.user.id, seen.server_id)
    before, after, around = map(_position, ("before", "after", "around"))
    ids = [_id(one) or 0 for one in request.args["ids"].split(",")] if "ids" in request.args else None
    if not {"newest", "before", "after", "around", "ids"} & request.args.keys():
        around = first_unread
    found = load_page(g.user, seen, before=before, after=after, around=around, ids=ids)
    return {
        "message_page": found,
        "first_unread": first_unread,
        "may_post": _posting_denied_reason(g.user, seen) is None,
        "budget": page_budget(len(found.messages)),
        "reader_names": frozenset((g.user.username, EVERYONE, *roles)),
    }


def _notifications() -> Row:
    """The notifications that the query asks for, in groups of a channel and a day, and the query as `filters`."""
    unread, mentions = (request.args.get(name) == "1" for name in ("unread", "mentions"))
    channel_id = _position("channel")
    found = inbox.list_notifications(
        g.user,
        before=_position("before"),
        limit=PAGE_SIZE + 1,
        unread=unread,
        mentions=mentions,
        channel_id=channel_id,
    )
    groups: dict[tuple[date, int], list[Row]] = {}
    for one in found[:PAGE_SIZE]:
        groups.setdefault((one["created_at"].date(), one["channel"]["id"]), []).append(one)
    filters = {"unread": 1 if unread else None, "mentions": 1 if mentions else None, "channel": channel_id}
    return {
        "notifications": found[:PAGE_SIZE],
        "groups": sorted(groups.values(), key=lambda group: group[0]["created_at"].date(), reverse=True),
        "more": len(found) > PAGE_SIZE,
        "filters": filters,
    }


def _posting_denied_reason(user: User, seen: VisibleChannel) -> str | None:
    try:
        require_posting(user, seen)
    except Forbidden as error:
        return error.detail
    return None


def _effects(user: User, seen: VisibleChannel) -> dict[str, str]:
    """What each preference does, in a sentence, by level, with ` muted` while the channel is muted until `TIME`.

    Where no preference leads to notifications, all say so.
    """
    if not seen.subscribed:
        nothing = "You get no notifications, whatever you choose here, without an active subscription."
    elif not receives_notifications_in(user, seen.id):
        nothing = "You get no notifications here, whatever you choose: none of your roles opens this channel."
    else:
        return PREFERENCE_HELP
    return dict.fromkeys(PREFERENCE_HELP, nothing)


def _effect(preference: Row, effects: dict[str, str]) -> str:
    """What the current preference does, for reading without JavaScript."""
    until = preference["muted_until"]
    if until is None or until <= datetime.now(UTC):
        return effects[preference["level"]]
    return effects[f"{preference['level']} muted"].replace("TIME", _utc(until))


PREFERENCE_HELP = {
    "all": "You are notified of every message here.",
    "mentions": "You are notified only of messages that mention you, one of your roles, or everyone.",
    "none": "You get no notifications here, not even for mentions.",
    "all muted": "Until TIME you are notified only if you are mentioned by name; after that, of every message.",
    "mentions muted": "Until TIME you are notified only if you are mentioned by name; after that, of all mentions.",
    "none muted": "You get no notifications here, not even for mentions.",
}


@blueprint.app_template_filter("utc")
def _utc(time: datetime) -> str:
    """For reading without JavaScript, which replaces it by the reader's own time."""
    return f"{time.astimezone(UTC):%d %b %Y, %H:%M} UTC"


@blueprint.app_template_filter("utc_day")
def _utc_day(time: datetime) -> str:
    """The day, for reading without JavaScript."""
    return f"{time.astimezone(UTC):%d %b %Y}"


@blueprint.app_template_filter("rfc3339")
def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


@blueprint.app_template_filter("rendered")
def _rendered(message: Row, reader_names: Set[str], budget: Budget) -> Markup:
    return render_in_page(message["content"], message["mentions"], reader_names, budget)
