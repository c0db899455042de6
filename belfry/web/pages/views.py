"""The page, for people with a browser: the channels, their messages, and the inbox.

What is here is read without JavaScript. static/page/ adds to the same HTML what is live and what writes, over the API.
"""

from collections.abc import Set
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, g, redirect, render_template, request, url_for
from markupsafe import Markup
from werkzeug.wrappers import Response as AnyResponse

from belfry.core.db import Row
from belfry.core.errors import Forbidden, NotFound
from belfry.inbox import inbox
from belfry.inbox.inbox import parse_notification_id
from belfry.messages.markdown import Budget
from belfry.messages.mentions import EVERYONE
from belfry.messages.rendering import page_budget, render_in_page
from belfry.messages.sidebar import sidebar_channels
from belfry.messages.timeline import PAGE_SIZE, load_page
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
from belfry.web import auth
from belfry.web.endpoint import READS
from belfry.web.problems import HttpProblem
from models import LARGEST_ID, User

PARTS = ("pages.messages", "pages.notifications")  # of a page, which its scripts ask for
POLICY = auth.POLICY + (
    "; script-src 'self'; connect-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
)

blueprint = Blueprint("pages", __name__)


@blueprint.before_request
def _admit() -> AnyResponse | None:
    """Nobody is sent to sign in; a script is told so, and what writes has come from a form of this session."""
    if g.user is None:
        if request.endpoint in PARTS or request.method not in READS:
            raise HttpProblem(401, "You are signed out.")
        return redirect(url_for("sign_in.login", next=request.full_path.rstrip("?")), 303)
    if request.method not in READS and not auth.csrf_matches(request.form.get("csrf", "")):
        raise HttpProblem(403, "This form was too old. Please go back and try again.")
    return None


@blueprint.after_request
def _protect(answer: Response) -> Response:
    """Nothing runs but what is served here; and what went wrong is a page as well."""
    if answer.mimetype == "application/problem+json":
        problem = answer.get_json()
        answer.set_data(render_template("refused.html", problem=problem))
        answer.mimetype = "text/html"
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["Referrer-Policy"] = "same-origin"
    return answer


@blueprint.get("/")
def home() -> AnyResponse | str:
    """303 to the first channel that one may see."""
    channels = visible_channels(g.user, limit=1)
    return redirect(_address(channels[0]), 303) if channels else _page("nowhere.html")


@blueprint.get("/servers/<id:server_id>/channels/<id:channel_id>")
def channel(server_id: int, channel_id: int) -> str:
    """A channel: its newest messages, or those `before`, `after` or `around` one."""
    seen = _channel(server_id, channel_id)
    preference, effects = preferences.preference_of(g.user, channel_id), _effects(g.user, seen)
    return _page(
        "channel.html",
        channel=seen,
        **_message_page(seen),
        may_not_post=_posting_denied_reason(g.user, seen),
        preference=preference,
        effects=effects,
        notified=effects is PREFERENCE_HELP,
        effect=_effect(preference, effects),
    )


@blueprint.get("/servers/<id:server_id>/channels/<id:channel_id>/messages")
def messages(server_id: int, channel_id: int) -> str:
    """The messages alone, as the channel's page has them."""
    seen = _channel(server_id, channel_id)
    return render_template("messages.html", channel=seen, **_message_page(seen))


@blueprint.get("/inbox")
def inbox_page() -> str:
    """What one was told, newest first: all or what is `unread`, from the top or `before` one."""
    return _page("inbox.html", **_notifications())


@blueprint.get("/inbox/notifications")
def notifications() -> str:
    """The notifications alone, as the inbox has them."""
    return render_template("notifications.html", csrf=auth.csrf_token(), **_notifications())


@blueprint.post("/inbox/read")
def mark_read() -> AnyResponse:
    """Mark one notification read, or all: 303 to the inbox. 422 where neither is said, or both: nothing is all."""
    name, everything = request.form.get("id"), request.form.get("all") == "1"
    if (name is not None) == everything:
        raise HttpProblem(422, "Say which notification to mark as read, or that all are meant.")
    if everything:
        inbox.mark_all_read(g.user)
    else:
        try:
            inbox.mark_read(g.user, ids=[parse_notification_id(name or "")])
        except ValueError:
            raise NotFound("There is no such notification.") from None
    return redirect(url_for("pages.inbox_page"), 303)


def _page(template: str, **context: Any) -> str:
    """A whole page: with the channels, what is unread in them, and whether the reader may hear the live stream."""
    count, current = inbox.unread_count(g.user), auth.current_session()
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
        hears=current is not None and current.session_hash in updates.authorized_clients([current.session_hash]),
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
    """A message's id. None for what could not be one."""
    return min(int(text), LARGEST_ID - 1) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _position(name: str) -> int | None:
    """A message's id in the address. None where there is none, or nothing that could be one."""
    return _id(request.args.get(name, ""))


def _message_page(seen: VisibleChannel) -> Row:
    """The messages that the address asks for, and by which names they may call the reader."""
    roles = roles_of(g.user.id, seen.server_id)
    found = load_page(g.user, seen, before=_position("before"), after=_position("after"), around=_position("around"))
    return {
        "stretch": found,
        "budget": page_budget(len(found.messages)),
        "mine": frozenset((g.user.username, EVERYONE, *roles)),
    }


def _notifications() -> Row:
    unread = request.args.get("unread") == "1"
    found = inbox.list_notifications(g.user, before=_position("before"), limit=PAGE_SIZE + 1, unread=unread)
    return {"notifications": found[:PAGE_SIZE], "more": len(found) > PAGE_SIZE, "unread_only": unread}


def _posting_denied_reason(user: User, seen: VisibleChannel) -> str | None:
    try:
        require_posting(user, seen)
    except Forbidden as error:
        return error.detail
    return None


def _effects(user: User, seen: VisibleChannel) -> dict[str, str]:
    """What each setting of a channel does, in a sentence: by its level, with ` muted` while it is, until `TIME`.

    Where nothing is told whatever is set, all of them say so.
    """
    if not seen.subscribed:
        nothing = "You are told of nothing, whatever you choose here: that needs an active subscription."
    elif not receives_notifications_in(user, seen.id):
        nothing = "You are told of nothing here, whatever you choose: no role of yours opens this channel."
    else:
        return PREFERENCE_HELP
    return dict.fromkeys(PREFERENCE_HELP, nothing)


def _effect(preference: Row, effects: dict[str, str]) -> str:
    """What the setting does now, for who reads without JavaScript."""
    until = preference["muted_until"]
    if until is None or until <= datetime.now(UTC):
        return effects[preference["level"]]
    return effects[f"{preference['level']} muted"].replace("TIME", _utc(until))


PREFERENCE_HELP = {
    "all": "You are told of every message here.",
    "mentions": "You are told only of messages that mention you, a role of yours, or everyone.",
    "none": "You are told of nothing here; a mention does not get through either.",
    "all muted": "Until TIME only a mention of your name gets through; after that, every message again.",
    "mentions muted": "Until TIME only a mention of your name gets through; after that, all that mention you again.",
    "none muted": "You are told of nothing here; a mention does not get through either.",
}


@blueprint.app_template_filter("utc")
def _utc(time: datetime) -> str:
    """For reading without JavaScript; with it, each reader's own time takes its place."""
    return f"{time.astimezone(UTC):%d %b %Y, %H:%M} UTC"


@blueprint.app_template_filter("rfc3339")
def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


@blueprint.app_template_filter("rendered")
def _rendered(message: Row, mine: Set[str], budget: Budget) -> Markup:
    return render_in_page(message["content"], message["mentions"], mine, budget)
