"""The queue dashboard at /rq, for admins alone, and the page to sign in to it with a browser.

The pages are rq-dashboard's. What it leaves open is closed here, and its code stays as it is:

- Every request asks anew whether the token still counts and its person is still an admin.
- Its scripts send no CSRF token: what a browser changes must come from a page of the same origin.
- Everything is read as JSON. The library reads some jobs with pickle, and so would run whatever somebody with
  access to Redis wrote there.
- It writes what jobs say into pages as it is. Texts are escaped in the JSON that its scripts show, the parts
  of an address are checked (it writes one into a script), and the policy admits no script but its own.
- An unknown job is 404, one that cannot be requeued 409, Redis out of reach 503; there it has 500, or 200.
"""

import hmac
import json
import re
import secrets
from contextlib import suppress
from html import escape
from math import ceil
from typing import Any

from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    current_app,
    g,
    jsonify,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from redis.exceptions import RedisError
from rq import Queue, Worker
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer
from rq_dashboard import web
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.wrappers import Response as AnyResponse

import jobs
from belfry import accounts
from models import User
from views.endpoint import bearer_token
from views.problems import RETRY_AFTER_SECONDS, HttpProblem, problem

LIBRARY = web.blueprint.name
READS = ("GET", "HEAD", "OPTIONS")
ADDRESS_PARTS = {
    "instance_number": "0",
    "queue_name": r"[A-Za-z0-9_.:-]{1,100}",
    "registry_name": "queued|scheduled|deferred|started|finished|failed|canceled",
    "job_id": r"[A-Za-z0-9_-]{1,100}",
    "order": "asc|dsc",
    "per_page": r"[1-9][0-9]{0,2}",
    "page": r"[1-9][0-9]{0,8}",
}
INLINE_SCRIPT = '<script type="text/javascript">'  # the only one of each of the library's pages
POLICY = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; style-src 'self'; img-src 'self' data:"
FORM_POLICY = POLICY + "; form-action 'self'"
# eval is how its templates are compiled in the browser. No handler in an attribute runs, and no other script.
PAGE_POLICY = POLICY + (
    "; form-action 'none'; connect-src 'self'; style-src-attr 'unsafe-inline';"
    " script-src 'self' 'nonce-{nonce}' 'unsafe-eval'"
)

sign_in = Blueprint("sign_in", __name__)


def register(app: Flask) -> None:
    """Mount the dashboard at /rq, and /login and /logout. Does not connect to Redis."""
    redis = jobs.redis_connection().connection_pool.connection_kwargs
    place = redis.get("path") or f"{redis.get('host', 'localhost')}:{redis.get('port', 6379)}"
    # Its pages show this, so it is no URL: a URL may have the password in it.
    app.config["RQ_DASHBOARD_REDIS_URL"] = (f"{place}, database {redis.get('db', 0)}",)
    app.redis_conn = jobs.redis_connection()  # type: ignore[attr-defined]  # where the library looks for it
    web.config.serializer = JSONSerializer
    app.register_blueprint(web.blueprint, url_prefix="/rq")
    app.register_blueprint(sign_in)
    # It would make new connections at each request, without a timeout, by an address that has the password.
    app.before_request_funcs[LIBRARY].remove(web.push_rq_connection)
    for view in REPLACED:
        app.view_functions[f"{LIBRARY}.{view.__name__}"] = view
    app.before_request(_admit)
    app.after_request(_protect)


# --- who may, and what a page may do


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
    g.user = accounts.authenticate(token) if token else _signed_in()
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


def _signed_in() -> User | None:
    """Whose session this is; None for nobody's, and once its token is revoked or has expired."""
    token_hash = session.get("token")
    return accounts.authenticate_hash(bytes.fromhex(token_hash)) if token_hash else None


def _same_origin() -> bool:
    """Whether a page of this site sent this. Browsers without Sec-Fetch-Site say it by Origin or Referer."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site == "same-origin"
    source = request.headers.get("Origin") or request.headers.get("Referer") or ""
    return source.split("/")[2:3] == [request.host]


def _protect(answer: Response) -> Response:
    """Keep these pages out of caches and frames, and every script but the library's own out of them."""
    if _under_rq() or request.blueprint == sign_in.name:
        answer.headers.setdefault("Cache-Control", "no-store")
        answer.headers["Referrer-Policy"] = "same-origin"
        if answer.mimetype == "text/html" and "Content-Security-Policy" not in answer.headers:
            nonce = secrets.token_urlsafe(16)
            page = answer.get_data(as_text=True).replace(INLINE_SCRIPT, f'<script nonce="{nonce}">')
            answer.set_data(page)
            answer.headers["Content-Security-Policy"] = PAGE_POLICY.format(nonce=nonce)
    return answer


# --- signing in


@sign_in.get("/login")
def login() -> Response:
    """The form. Those who are signed in see who they are, too, and can sign out."""
    return _page(200, "Sign in", form=True)


@sign_in.post("/login")
def submit_login() -> AnyResponse:
    """Start a session: 303 to `next` where that is a path of this site. 401 for a token that is nobody's."""
    if not _csrf_holds():
        return _page(403, "Sign in", "This form was too old. Please try again.", form=True)
    token = request.form.get("token", "").strip()
    if accounts.authenticate(token) is None:
        return _page(401, "Sign in", "This token is unknown, or it was revoked or has expired.", form=True)
    session.clear()
    session["token"] = accounts.hash_token(token).hex()
    return redirect(_local(request.form.get("next", "")), 303)


@sign_in.post("/logout")
def logout() -> AnyResponse:
    """End the session: 303 to /login."""
    if not _csrf_holds():
        return _page(403, "Sign out", "This form was too old. Please try again.")
    session.clear()
    return redirect(url_for("sign_in.login"), 303)


def _csrf_holds() -> bool:
    """Whether the form was given out in this session."""
    ours, theirs = session.get("csrf", ""), request.form.get("csrf", "")
    return bool(ours) and hmac.compare_digest(ours.encode(), theirs.encode())


def _local(path: str) -> str:
    """The path, if no browser can take it for another site's, else the dashboard's."""
    return path if re.fullmatch(r"/[^\\\s\x00-\x1f\x7f]*", path) and "//" not in path else "/rq/"


def _page(status: int, title: str, detail: str = "", *, form: bool = False) -> Response:
    page = render_template(
        "login.html",
        title=title,
        detail=detail,
        form=form,
        user=_signed_in(),
        csrf=session.setdefault("csrf", secrets.token_urlsafe(32)),
        target=_local(request.values.get("next", "")),
    )
    return make_response(page, status, {"Content-Security-Policy": FORM_POLICY})


def _refuse(status: int, detail: str) -> Response:
    """A page for a browser; the one error shape for everything else."""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return _page(status, detail)
    return problem(status, detail)


def _trouble(error: Exception) -> Response:
    """The answer to what the library's views run into."""
    if isinstance(error, NoSuchJobError):
        return _refuse(404, "There is no such job. Those that went well are not kept.")
    if isinstance(error, InvalidJobOperation):
        return _refuse(409, "This job has not failed, so it is not requeued.")
    answer = _refuse(503, "Redis is out of reach. No run is lost: the database has them. Try again soon.")
    answer.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return answer


for _kind in (NoSuchJobError, InvalidJobOperation, RedisError):
    web.blueprint.register_error_handler(_kind, _trouble)


# --- the library's views that get it wrong, by the library's names for them


class _LenientJson(JSONSerializer):  # type: ignore[misc]
    """For showing jobs: what is not JSON is said to be so, and does not take the page of all others away."""

    @staticmethod
    def loads(data: bytes) -> Any:
        try:
            return JSONSerializer.loads(data)
        except ValueError:
            return "(not JSON)"


class _SeenWorker(Worker):  # type: ignore[misc]
    """A worker looked at from outside."""

    def _set_connection(self, connection: Any) -> Any:
        return connection  # the library's would raise the timeout of the web's own connections to minutes


def _redis() -> Any:
    return current_app.redis_conn  # type: ignore[attr-defined]


def _queue(name: str) -> Any:
    return jobs.queue(name, _redis())


def _job(job_id: str, serializer: Any = JSONSerializer) -> Any:
    return Job.fetch(job_id, connection=_redis(), serializer=serializer)


def _source(queue_name: str, registry_name: str) -> Any:
    """The queue itself for `queued`, else the queue's registry of that name."""
    queue = _queue(queue_name)
    return queue if registry_name == "queued" else getattr(queue, f"{registry_name}_job_registry")


def _escaped(value: Any) -> Any:
    """The same with every text fit for HTML, into which the library's scripts write it as it is."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def _show(template: str, **values: Any) -> str:
    return render_template(
        f"rq_dashboard/{template}",
        current_instance=0,
        instance_list=current_app.config["RQ_DASHBOARD_REDIS_URL"],
        rq_url_prefix=url_for(f"{LIBRARY}.queues_overview"),
        rq_dashboard_version=web.rq_dashboard_version,
        rq_version=web.rq_version,
        enable_delete=True,
        **values,
    )


def workers_overview(instance_number: int) -> str:
    return _show("workers.html", active_tab="workers")


def jobs_overview(instance_number: int, queue_name: str | None, **how: Any) -> Any:
    """Without a name it is the queue that there is, and not the library's `default`."""
    return web.jobs_overview(instance_number, queue_name or jobs.NOTIFICATIONS, **how)


def job_view(instance_number: int, job_id: str) -> str:
    return _show("job.html", id=_job(job_id).id)


def list_queues(instance_number: int) -> Response:
    queues = web.serialize_queues(0, sorted(Queue.all(connection=_redis(), serializer=JSONSerializer)))
    return jsonify(queues=_escaped(queues))


def list_workers(instance_number: int) -> Response:
    """A job is called by its description: its arguments may be of any length, and not JSON."""
    workers = []
    for worker in _SeenWorker.all(connection=_redis(), serializer=JSONSerializer):
        shown = {name: getattr(worker, name) for name in WORKER_SHOWS}
        shown |= {"queues": worker.queue_names(), "state": worker.get_state(), "current_job": "idle"}
        shown = _escaped(shown)
        if job_id := worker.get_current_job_id():
            with suppress(NoSuchJobError):  # deleted while it runs, or done by now
                job = _job(job_id)
                shown["current_job"] = {
                    "job_id": job.id,
                    "description": job.description,  # the one text that the page escapes itself
                    "created_at": web.serialize_date(job.created_at),
                    "call_string": escape(job.description or job.id),
                }
        workers.append(shown)
    return jsonify(workers=sorted(workers, key=lambda one: (one["state"], one["queues"], one["name"])))


def list_jobs(
    instance_number: int, queue_name: str, registry_name: str, per_page: str, order: str, page: str
) -> Response:
    """The library's shows the same jobs on several pages. These texts the page escapes itself."""
    source, size, number = _source(queue_name, registry_name), int(per_page), int(page)
    total = source.count if registry_name == "queued" else source.get_job_count(cleanup=False)
    start = (number - 1) * size
    end = min(start + size, total)
    if order == "dsc":
        start, end = max(0, total - start - size), total - start
    read = _redis().lrange if registry_name == "queued" else _redis().zrange
    entries = read(source.key, start, end - 1) if start < end else []
    ids = [entry.decode("utf-8", "replace").split(":")[0] for entry in entries]
    ids = [job_id for job_id in ids if re.fullmatch(ADDRESS_PARTS["job_id"], job_id)]
    found = Job.fetch_many(ids, connection=_redis(), serializer=_LenientJson)
    shown = [web.serialize_job(job) for job in found if job]

    def link(to: int) -> dict[str, Any]:
        path = f"/0/view/jobs/{queue_name}/{registry_name}/{size}/{order}/{to}"
        return {"number": to, "url": url_for(f"{LIBRARY}.queues_overview").rstrip("/") + path}

    pages = ceil(total / size)
    pagination: dict[str, Any] = {
        "current_page": number,
        "num_pages": pages,
        "pages_in_window": [link(to) for to in web.pagination_window(total, number, size)],
        "first_page": link(1),
        "last_page": link(max(pages, 1)),
    }
    if number > 1:
        pagination["prev_page"] = link(number - 1)
    if number < pages:
        pagination["next_page"] = link(number + 1)
    jobs_shown = shown[::-1] if order == "dsc" else shown
    return jsonify(name=queue_name, registry_name=registry_name, jobs=jobs_shown, pagination=pagination)


def job_info(instance_number: int, job_id: str) -> Response:
    job = _job(job_id, _LenientJson)
    shown = web.serialize_job(job) | {
        "enqueued_at": web.serialize_date(job.enqueued_at),
        "origin": job.origin,
        "status": job.get_status(),
        "result": job.return_value(),
        "metadata": json.dumps(job.meta),
    }
    if needed := job.dependency_ids:
        shown["depends_on"] = needed
        shown["depends_on_status"] = ["active" if Job.exists(one, _redis()) else "expired" for one in needed]
    return jsonify(_escaped(shown))


def delete_job_view(job_id: str) -> Response:
    _job(job_id).delete()
    return jsonify(status="OK")


def requeue_job_view(job_id: str) -> Response:
    _job(job_id).requeue()
    return jsonify(status="OK")


def requeue_all(queue_name: str) -> Response:
    """Requeue what has failed and is still there; `count` says how many that were."""
    count = 0
    for job_id in _source(queue_name, "failed").get_job_ids(cleanup=False):
        with suppress(NoSuchJobError, InvalidJobOperation):  # expired, or somebody else was faster
            _job(job_id).requeue()
            count += 1
    return jsonify(status="OK", count=count)


def empty_queue(queue_name: str, registry_name: str) -> Response:
    """Delete the jobs of a queue or of one of its registries, and entries whose job is gone already."""
    source = _source(queue_name, registry_name)
    if registry_name == "queued":
        source.empty()
        return jsonify(status="OK")
    for entry in _redis().zrange(source.key, 0, -1):
        with suppress(NoSuchJobError):
            _job(source.parse_job_id(entry)).delete()
        _redis().zrem(source.key, entry)
    return jsonify(status="OK")


def compact_queue(queue_name: str) -> Response:
    """Remove entries whose job is gone. The library's takes the queue away meanwhile, and fails on none."""
    queue = _queue(queue_name)
    for job_id in queue.get_job_ids():
        if not Job.exists(job_id, _redis()):
            queue.remove(job_id)
    return jsonify(status="OK")


WORKER_SHOWS = (
    "name", "pid", "last_heartbeat", "birth_date", "successful_job_count", "failed_job_count",
    "total_working_time", "version", "python_version",
)  # fmt: skip
REPLACED = (
    workers_overview, jobs_overview, job_view, list_queues, list_workers, list_jobs, job_info,
    delete_job_view, requeue_job_view, requeue_all, empty_queue, compact_queue,
)  # fmt: skip
