"""The dashboard of the queues at /rq, for admins only, and its registration.

The pages are rq-dashboard's. Its gaps are closed here, and its code is not changed:

- Each request checks whether the token or session is valid and its user an admin.
- The library's scripts send no CSRF token, so a browser's write must come from a page of the same origin.
- Everything is read as JSON. The library reads some jobs with pickle, which would run what a writer to Redis stored.
- The library writes texts of jobs into pages unescaped. Texts are escaped in the JSON that its scripts show, the parts
  of a path are checked (it writes one into a script), and the policy allows only its own script.
- An unknown job is 404; a job that cannot be requeued or deleted is 409; without Redis it is 503.
"""

import re
import secrets

from flask import (
    Flask,
    Response,
    abort,
    current_app,
    g,
    redirect,
    request,
    url_for,
)
from redis.exceptions import RedisError
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer
from rq_dashboard import web
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.wrappers import Response as AnyResponse

from belfry.core.redis import redis_connection
from belfry.web import auth
from belfry.web.dashboard import rq_views
from belfry.web.endpoint import READS, bearer_token
from belfry.web.problems import HttpProblem, problem

LIBRARY = rq_views.LIBRARY
ADDRESS_PARTS = {
    "instance_number": "0",
    "queue_name": r"[A-Za-z0-9_.:-]{1,100}",
    "registry_name": "queued|scheduled|deferred|started|finished|failed|canceled",
    "job_id": rq_views.JOB_ID,
    "order": "asc|dsc",
    "per_page": r"[1-9][0-9]{0,2}",
    "page": r"[1-9][0-9]{0,8}",
}
INLINE_SCRIPT = '<script type="text/javascript">'  # the only script of each of the library's pages
# Its templates are compiled with eval in the browser. No other script and no handler in an attribute runs.
PAGE_POLICY = (
    auth.BASE_POLICY + "; form-action 'none'; connect-src 'self'; style-src-attr 'unsafe-inline';"
    " script-src 'self' 'nonce-{nonce}' 'unsafe-eval'"
)


def register(app: Flask) -> None:
    """Mount the dashboard at /rq, and /login and /logout. Does not connect to Redis."""
    redis = redis_connection().connection_pool.connection_kwargs
    place = redis.get("path") or f"{redis.get('host', 'localhost')}:{redis.get('port', 6379)}"
    # Its pages show this, so it is not a URL, which may contain the password.
    app.config["RQ_DASHBOARD_REDIS_URL"] = (f"{place}, database {redis.get('db', 0)}",)
    app.redis_conn = redis_connection()  # type: ignore[attr-defined]  # where the library looks for it
    web.config.serializer = JSONSerializer
    app.register_blueprint(web.blueprint, url_prefix="/rq")
    app.register_blueprint(auth.blueprint)
    # It would open connections at each request, without a time-out, and with a URL that contains the password.
    app.before_request_funcs[LIBRARY].remove(web.push_rq_connection)
    for view in rq_views.REPLACED:
        app.view_functions[f"{LIBRARY}.{view.__name__}"] = view
    app.before_request(_admit)
    app.after_request(_protect)


def _under_rq() -> bool:
    return request.blueprint == LIBRARY or re.match("/rq(/|$)", request.path) is not None


def _admit() -> AnyResponse | None:
    """Allow only admins below /rq.

    - A bearer token counts before the session.
    - Without a user: redirect to /login; 401 for an invalid token, and for writes.
    - 403 for users who are not admins, and for a browser's write that no page of this site sent.
    """
    if not _under_rq():
        return None
    token = bearer_token()
    if g.user is None:
        if token or request.method not in READS:
            raise HttpProblem(401, "Send an admin's token.", {"WWW-Authenticate": 'Bearer realm="belfry"'})
        return redirect(url_for("sign_in.login", next=request.full_path.rstrip("?")), 303)
    if not g.user.is_admin:
        return _refuse(403, "Only admins may see the queues.")
    if request.method not in READS and not token and not _same_origin():
        return _refuse(403, "No page of the dashboard asked for this.")
    if request.endpoint == f"{LIBRARY}.requeue_all" and request.method != "POST":
        raise MethodNotAllowed(["POST"])  # the library's view accepts GET as well
    for name, part in (request.view_args or {}).items():
        if name in ADDRESS_PARTS and part is not None and not re.fullmatch(ADDRESS_PARTS[name], str(part)):
            abort(404)
    if request.blueprint == LIBRARY and request.endpoint != f"{LIBRARY}.static":
        current_app.redis_conn.ping()  # type: ignore[attr-defined]  # else a page is 200, and never fills
    return None


def _same_origin() -> bool:
    """Whether a page of this site sent the request, by Sec-Fetch-Site, Origin or Referer."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site == "same-origin"
    source = request.headers.get("Origin") or request.headers.get("Referer") or ""
    return source.split("/")[2:3] == [request.host]


def _protect(answer: Response) -> Response:
    """Forbid caching and framing, and every script but the library's own."""
    if _under_rq() or request.blueprint == auth.blueprint.name:
        answer.headers.setdefault("Cache-Control", "no-store")
        answer.headers["Referrer-Policy"] = "same-origin"
        if answer.mimetype == "text/html" and "Content-Security-Policy" not in answer.headers:
            nonce = secrets.token_urlsafe(16)
            page = answer.get_data(as_text=True).replace(INLINE_SCRIPT, f'<script nonce="{nonce}">')
            answer.set_data(page)
            answer.headers["Content-Security-Policy"] = PAGE_POLICY.format(nonce=nonce)
    return answer


def _refuse(status: int, detail: str) -> Response:
    """A page for a browser; the one error shape for all others."""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return auth.page(status, detail)
    return problem(status, detail)


def _error_response(error: Exception) -> Response:
    """The response to an error of the library's views."""
    if isinstance(error, NoSuchJobError):
        return _refuse(404, "There is no such job. Finished jobs are kept for a day, at most 10,000 in each queue.")
    if isinstance(error, rq_views.UnfinishedRun):
        detail = f"Run {error} is unfinished, so its job would be enqueued again. To stop it, delete the message."
        return _refuse(409, detail)
    if isinstance(error, InvalidJobOperation):
        return _refuse(409, "This job has not failed, so it cannot be requeued.")
    return _refuse(503, "Redis is unavailable. No run is lost, because the database stores them. Try again soon.")


for _kind in (NoSuchJobError, InvalidJobOperation, rq_views.UnfinishedRun, RedisError):
    web.blueprint.register_error_handler(_kind, _error_response)
