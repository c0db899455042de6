"""The queue dashboard at /rq, for admins alone, and the page to sign in to it with a browser.

The pages are rq-dashboard's. What it leaves open is closed here, and its code stays as it is:

- Every request asks anew whether the token still counts and its person is still an admin.
- Its scripts send no CSRF token: what a browser changes must come from a page of the same origin.
- Everything is read as JSON. The library reads some jobs with pickle, and so would run whatever somebody with
  access to Redis wrote there.
- It writes what jobs say into pages as it is. Texts are escaped in the JSON that its scripts show, the parts
  of an address are checked (it writes one into a script), and the policy admits no script but its own.
- An unknown job is 404, one that cannot be requeued 409, Redis unavailable 503; there it has 500, or 200.
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
INLINE_SCRIPT = '<script type="text/javascript">'  # the only one of each of the library's pages
# eval is how its templates are compiled in the browser. No handler in an attribute runs, and no other script.
PAGE_POLICY = (
    auth.BASE_POLICY + "; form-action 'none'; connect-src 'self'; style-src-attr 'unsafe-inline';"
    " script-src 'self' 'nonce-{nonce}' 'unsafe-eval'"
)


def register(app: Flask) -> None:
    """Mount the dashboard at /rq, and /login and /logout. Does not connect to Redis."""
    redis = redis_connection().connection_pool.connection_kwargs
    place = redis.get("path") or f"{redis.get('host', 'localhost')}:{redis.get('port', 6379)}"
    # Its pages show this, so it is no URL: a URL may have the password in it.
    app.config["RQ_DASHBOARD_REDIS_URL"] = (f"{place}, database {redis.get('db', 0)}",)
    app.redis_conn = redis_connection()  # type: ignore[attr-defined]  # where the library looks for it
    web.config.serializer = JSONSerializer
    app.register_blueprint(web.blueprint, url_prefix="/rq")
    app.register_blueprint(auth.blueprint)
    # It would make new connections at each request, without a timeout, by an address that has the password.
    app.before_request_funcs[LIBRARY].remove(web.push_rq_connection)
    for view in rq_views.REPLACED:
        app.view_functions[f"{LIBRARY}.{view.__name__}"] = view
    app.before_request(_admit)
    app.after_request(_protect)


def _under_rq() -> bool:
    return request.blueprint == LIBRARY or re.match("/rq(/|$)", request.path) is not None


def _admit() -> AnyResponse | None:
    """Let admins pass to what is under /rq, and nobody else.

    - With a bearer token, its person counts, whatever the session says.
    - Nobody: those who read are sent to /login; 401 for a wrong token, and for changes.
    - Not an admin: 403. A change that no page of this site asked for: 403; not asked of bearer tokens, which
      no browser sends by itself.
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
        raise MethodNotAllowed(["POST"])  # the library acts on GET as well
    for name, part in (request.view_args or {}).items():
        if name in ADDRESS_PARTS and part is not None and not re.fullmatch(ADDRESS_PARTS[name], str(part)):
            abort(404)
    if request.blueprint == LIBRARY and request.endpoint != f"{LIBRARY}.static":
        current_app.redis_conn.ping()  # type: ignore[attr-defined]  # else a page is 200, and never fills
    return None


def _same_origin() -> bool:
    """Whether a page of this site sent this. Browsers without Sec-Fetch-Site say it by Origin or Referer."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site == "same-origin"
    source = request.headers.get("Origin") or request.headers.get("Referer") or ""
    return source.split("/")[2:3] == [request.host]


def _protect(answer: Response) -> Response:
    """Keep these pages out of caches and frames, and every script but the library's own out of them."""
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
    """A page for a browser; the one error shape for everything else."""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return auth.page(status, detail)
    return problem(status, detail)


def _trouble(error: Exception) -> Response:
    """The answer to what the library's views run into."""
    if isinstance(error, NoSuchJobError):
        return _refuse(404, "There is no such job. Finished jobs are kept for a day, and at most 10,000 of a queue.")
    if isinstance(error, InvalidJobOperation):
        return _refuse(409, "This job has not failed, so it is not requeued.")
    return _refuse(503, "Redis is unavailable. No run is lost: the database has them. Try again soon.")


for _kind in (NoSuchJobError, InvalidJobOperation, RedisError):
    web.blueprint.register_error_handler(_kind, _trouble)
