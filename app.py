"""The web application: every route, and what happens before and after each request.

| routes | blueprint |
|---|---|
| `/api/messages`, `/api/channels/N/messages` | belfry/web/api/messages.py |
| `/api/runs`, `/api/test-notifications` | belfry/web/api/runs.py |
| `/api/notifications`, `/api/channels/N/preference` | belfry/web/api/inbox.py |
| `/api/notifications/stream` | belfry/web/api/stream.py, belfry/stream/hub.py |
| `/api/me`, `/api/users`, `/api/channels` | belfry/web/api/accounts.py |
| `/api/servers`, `/api/channels/N` | belfry/web/api/servers.py |
| `/`, `/servers/N/channels/N`, `/inbox` | belfry/web/pages/views.py |
| `/rq` | belfry/web/dashboard/guard.py, belfry/web/dashboard/rq_views.py |
| `/login`, `/logout` | belfry/web/auth.py |
| `/healthz`, `/readyz`, `/metrics` | belfry/web/health.py |
| `/openapi.json`, `/docs` | belfry/web/openapi.py |

Every error has one shape (belfry/web/problems.py); every response has an `X-Request-Id`.
"""

import logging
import re
import secrets
import time

from flask import Flask, Request, Response, abort, current_app, g, request
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface
from werkzeug.routing import IntegerConverter

from belfry.cli import commands
from belfry.core import logging_setup
from belfry.core.db import LARGEST_ID, db
from belfry.identity import tokens
from belfry.web import auth, health, openapi, problems, rate_limit
from belfry.web.api import accounts, inbox, messages, runs, servers, stream
from belfry.web.dashboard import guard
from belfry.web.endpoint import BODY_BYTES, READS, api, bearer_token
from belfry.web.pages import views
from belfry.web.problems import HttpProblem
from config import secret_key, settings

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5  # of a 503: a restart of PostgreSQL takes about that
IMPOSSIBLE_ID = -1
HSTS_SECONDS = 31_536_000  # a year, during which a browser uses https:// only
API_MODULES = (messages, runs, inbox, accounts, servers, stream)  # importing them registers their routes on `api`


class _Sessions(SecureCookieSessionInterface):
    """Flask's signed cookies, which are not read for API requests with a token."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        by_token = request.path.startswith("/api/") and "Authorization" in request.headers
        return None if by_token else super().open_session(app, request)


class _Id(IntegerConverter):
    """`<id:...>`: an id; IMPOSSIBLE_ID for a number that no row can have."""

    def to_python(self, value: str) -> int:
        return int(value) if len(value) <= 19 and 1 <= int(value) <= LARGEST_ID else IMPOSSIBLE_ID


def _refuse_impossible_ids() -> None:
    """404 for an id that cannot exist. If the converter refused it, other methods would get 405 by another route."""
    if IMPOSSIBLE_ID in (request.view_args or {}).values():
        abort(404)


def create_app() -> Flask:
    """The web application, with the settings of the environment. Exits the process without SECRET_KEY."""
    logging_setup.configure(settings.log_level, settings.log_format)
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=secret_key(),
        MAX_CONTENT_LENGTH=BODY_BYTES + 1,  # one more than allowed, so that a truncated body is seen to be too large
        SESSION_COOKIE_NAME="__Host-belfry" if settings.session_cookie_secure else "belfry",
        SESSION_COOKIE_PATH="/",  # `__Host-` requires this path, `Secure` and no domain
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=settings.session_cookie_secure,
    )
    app.session_interface = _Sessions()
    app.json.sort_keys = False  # type: ignore[attr-defined]  # decisions are in the contract's order
    app.url_map.converters["id"] = _Id
    app.url_map.strict_slashes = False
    problems.register(app)
    app.before_request(_identify)
    app.before_request(_authenticate)
    app.after_request(_finish_response)
    rate_limit.register(app)
    app.before_request(_require_csrf_token)
    app.before_request(_refuse_impossible_ids)
    app.teardown_request(_close_connection)
    app.register_blueprint(api)
    app.register_blueprint(health.blueprint)
    app.register_blueprint(openapi.blueprint)
    app.register_blueprint(views.blueprint)
    guard.register(app)
    commands.register(app)
    return app


def _identify() -> None:
    """Give the request an id: the proxy's X-Request-Id where it is valid, otherwise a new one."""
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if re.fullmatch(r"[A-Za-z0-9_.-]{8,64}", given) else secrets.token_hex(16)
    g.log_context = logging_setup.bind(request_id=g.request_id)
    g.began = time.perf_counter()


def _authenticate() -> None:
    """Set `g.user` to the user of the request, or None, by at most one query. Views require a user where they need one.

    1. Routes whose response is the same for everybody (`rate_limit.WITHOUT_USER`), and METRICS_TOKEN: None.
    2. Pages and /login: the session's user.
    3. Under /api with an Authorization header, and anywhere else with a bearer token: the token's user, or None.
    4. All others, unknown paths included: the session's user, or None.
    """
    g.user = g.token_hash = None
    if request.endpoint in rate_limit.WITHOUT_USER or health.is_scraper():
        return
    token = None if request.blueprint in (views.blueprint.name, auth.blueprint.name) else bearer_token()
    if token:
        token_hash = tokens.hash_token(token)
        view = current_app.view_functions.get(request.endpoint or "")
        if hasattr(view, "defers_token_check"):
            g.user = tokens.cached_user(token_hash)
            g.token_hash = token_hash if g.user else None
        g.user = g.user or getattr(view, "find_user", tokens.authenticate_hash)(token_hash)
    elif not (_is_api() and "Authorization" in request.headers):
        g.user = auth.signed_in()


def _require_csrf_token() -> None:
    """Refuse a session's write under /api without its CSRF token: 403. It counts towards the rate limit."""
    by_session = g.user and _is_api() and "Authorization" not in request.headers
    if by_session and request.method not in READS and not auth.csrf_matches(request.headers.get("X-CSRF-Token", "")):
        raise HttpProblem(403, "Send the page's CSRF token as X-CSRF-Token, or a token as Authorization.")


def _is_api() -> bool:
    return request.path.startswith("/api/")


def _finish_response(response: Response) -> Response:
    if g.get("token_hash"):
        tokens.evict(g.token_hash)  # the view has not checked it, so the next request must read it again
    response.headers["X-Request-Id"] = g.request_id
    log.info(
        "%s %s %s in %.1f ms",
        request.method,
        request.path,
        response.status_code,
        (time.perf_counter() - g.began) * 1000,
    )
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    if settings.session_cookie_secure and settings.public_url.startswith("https://"):
        response.headers["Strict-Transport-Security"] = f"max-age={HSTS_SECONDS}"
    if response.status_code == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if request.path.startswith("/api/"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _close_connection(_: BaseException | None) -> None:
    """Return the database connection to the pool, and end the log's context."""
    if not db.is_closed():
        db.close()
    if token := g.pop("log_context", None):
        logging_setup.unbind(token)
