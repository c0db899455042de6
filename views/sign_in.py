"""Signing in with a browser: /login and /logout, and pages that say why not."""

import hashlib
import hmac
import re
import secrets

from flask import Blueprint, Response, make_response, redirect, render_template, request, session, url_for
from werkzeug.wrappers import Response as AnyResponse

from belfry import accounts
from models import User
from queues import announce

BASE_POLICY = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; style-src 'self'; img-src 'self' data:"
POLICY = BASE_POLICY + "; form-action 'self'"

blueprint = Blueprint("sign_in", __name__)


@blueprint.get("/login")
def login() -> Response:
    """The form. Those who are signed in see who they are, too, and can sign out."""
    return page(200, "Sign in", form=True)


@blueprint.post("/login")
def submit_login() -> AnyResponse:
    """Start a session: 303 to `next` where that is a path of this site. 401 for a token that is nobody's."""
    if not _csrf_holds():
        return page(403, "Sign in", "This form was too old. Please try again.", form=True)
    token = request.form.get("token", "").strip()
    if accounts.authenticate(token) is None:
        return page(401, "Sign in", "This token is unknown, or it was revoked or has expired.", form=True)
    session.clear()
    session["token"] = accounts.hash_token(token).hex()
    return redirect(_local(request.form.get("next", "")), 303)


@blueprint.post("/logout")
def logout() -> AnyResponse:
    """End the session: 303 to /login."""
    if not _csrf_holds():
        return page(403, "Sign out", "This form was too old. Please try again.")
    announce(signed_out=session_key())
    session.clear()
    return redirect(url_for("sign_in.login"), 303)


def _csrf_holds() -> bool:
    """Whether the form was given out in this session."""
    return csrf_matches(request.form.get("csrf", ""))


def csrf_token() -> str:
    """What proves that a page of this session asked; made where there is none yet."""
    token: str = session.setdefault("csrf", secrets.token_urlsafe(32))
    return token


def csrf_matches(given: str) -> bool:
    """Whether this is the session's CSRF token. False where none was given out."""
    ours: str = session.get("csrf", "")
    return bool(ours) and hmac.compare_digest(ours.encode(), given.encode("utf-8", "surrogatepass"))


def _local(path: str) -> str:
    """The path, if no browser can take it for another site's, else the page's."""
    return path if re.fullmatch(r"/[^\\\s\x00-\x1f\x7f]*", path) and "//" not in path else "/"


def page(status: int, title: str, detail: str = "", *, form: bool = False) -> Response:
    """What there is to say, who is signed in with the way out, and where asked for the form to sign in."""
    text = render_template(
        "login.html",
        title=title,
        detail=detail,
        form=form,
        user=signed_in(),
        csrf=csrf_token(),
        target=_local(request.values.get("next", "")),
    )
    return make_response(text, status, {"Content-Security-Policy": POLICY})


def session_key() -> str | None:
    """What tells this session from others, and is no secret; None before it has a CSRF token."""
    return hashlib.sha256(session["csrf"].encode()).hexdigest() if "csrf" in session else None


def token_hash() -> bytes | None:
    """Of the token that this session stands on; None for nobody's."""
    return bytes.fromhex(session["token"]) if "token" in session else None


def signed_in() -> User | None:
    """Whose session this is; None for nobody's, and once its token is revoked or has expired."""
    hashed = token_hash()
    return accounts.authenticate_hash(hashed) if hashed else None
