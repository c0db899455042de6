"""Sign in and out with a browser: /login and /logout, and error pages.

The signed cookie carries the id of a session and a CSRF token. The session's row (belfry/identity/sessions.py) decides
whether it is open. Each sign-in creates a new id, and ends the session that the cookie had.
"""

import hmac
import re
import secrets

from flask import Blueprint, Response, g, make_response, redirect, render_template, request, session, url_for
from werkzeug.wrappers import Response as AnyResponse

from belfry.identity import sessions
from belfry.identity.sessions import Session
from belfry.identity.tokens import LOGIN_LINK_PREFIX
from belfry.stream.publish import publish
from models import User

BASE_POLICY = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; style-src 'self'; img-src 'self' data:"
POLICY = BASE_POLICY + "; form-action 'self'"

blueprint = Blueprint("sign_in", __name__)


@blueprint.get("/login")
def login() -> Response:
    """The form. A signed-in user also sees their name, and can sign out."""
    return page(200, "Sign in", form=True)


@blueprint.get("/login/link/<secret>")
def login_link(secret: str) -> Response:
    """The page of a login link. It is used by its button, so that programs that follow links do not use it."""
    return page(200, "Sign in", link=secret)


@blueprint.post("/login")
def submit_login() -> AnyResponse:
    """Open a session: 303 to `next` where that is a path of this site. 401 for an invalid token."""
    if not _csrf_holds():
        return page(403, "This form has expired. Try again.", "This form was too old. Please try again.", form=True)
    token = request.form.get("token", "").strip()
    session_id = sessions.open_session(token)
    if session_id is None and token.startswith(LOGIN_LINK_PREFIX):
        return page(401, "Sign in", "This link was used before, or has expired. Ask for another one.", form=True)
    if session_id is None:
        return page(401, "Sign in", "This token is unknown, or it was revoked or has expired.", form=True)
    _end_current_session()
    session.clear()
    session["id"] = session_id
    return redirect(_local(request.form.get("next", "")), 303)


@blueprint.post("/logout")
def logout() -> AnyResponse:
    """End the session, or with `everywhere=1` all sessions of the user: 303 to /login."""
    if not _csrf_holds():
        return page(403, "This form has expired. Try again.", "This form was too old. Please try again.")
    user = signed_in()
    if user and request.form.get("everywhere") == "1":
        sessions.end_all_sessions(user.id)
        publish(access=user.id)
    else:
        _end_current_session()
    session.clear()
    return redirect(url_for("sign_in.login"), 303)


def _end_current_session() -> None:
    """End the session of this request's cookie, if it is open, and its streams."""
    if current := current_session():
        sessions.end_session(current.session_hash)
        publish(signed_out=current.session_hash.hex())


def _csrf_holds() -> bool:
    """Whether the form was made for this session."""
    return csrf_matches(request.form.get("csrf", ""))


def csrf_token() -> str:
    """The session's CSRF token, which is created where there is none."""
    token: str = session.setdefault("csrf", secrets.token_urlsafe(32))
    return token


def csrf_matches(given: str) -> bool:
    """Whether this is the session's CSRF token. False where the session has none."""
    ours: str = session.get("csrf", "")
    return bool(ours) and hmac.compare_digest(ours.encode(), given.encode("utf-8", "surrogatepass"))


def _local(path: str) -> str:
    """The path, if no browser can take it for another site's, otherwise the page's."""
    return path if re.fullmatch(r"/[^\\\s\x00-\x1f\x7f]*", path) and "//" not in path else "/"


def page(status: int, title: str, detail: str = "", *, form: bool = False, link: str = "") -> Response:
    """A page with a message, the signed-in user with a button to sign out, and on request a form to sign in.

    `link`: the secret of a login link, which the form sends in place of a token.
    """
    text = render_template(
        "login.html",
        title=title,
        detail=detail,
        form=form,
        link=link,
        user=signed_in(),
        csrf=csrf_token(),
        target=_local(request.values.get("next", "")),
    )
    return make_response(text, status, {"Content-Security-Policy": POLICY})


def current_session() -> Session | None:
    """The open session of this request's cookie, None without one. At most one query a request."""
    if "session" not in g:
        session_id = session.get("id")
        g.session = sessions.find_session(session_id) if session_id else None
    found: Session | None = g.session
    return found


def signed_in() -> User | None:
    """The user of the session, None without an open one."""
    current = current_session()
    return current.user if current else None
