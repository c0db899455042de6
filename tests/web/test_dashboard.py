"""The dashboard of the queues: access, sign-in, what it shows and does, and hostile jobs.

The tests enqueue real jobs on Belfry's queues, and a worker of RQ runs them.
"""

import base64
import json
import pickle
import re
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from flask import Flask
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from rq import Queue, SimpleWorker, Worker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq_dashboard import web

from app import create_app
from belfry.queue import queues
from belfry.web.dashboard import guard
from config import settings
from models import ApiToken, User
from tests.people import csrf_of

NO_RETRY = Retry(NoBackoff(), 0)
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SCRIPT = "<script>alert(1)</script>"
JOBS = "/rq/0/data/jobs/bulk"
PAGES = (
    "/rq",
    "/rq/",
    "/rq/0/view/workers",
    "/rq/0/view/jobs",
    "/rq/0/view/jobs/bulk/failed/8/asc/1",
    "/rq/0/data/queues.json",
    "/rq/0/data/workers.json",
    "/rq/0/data/jobs/bulk/queued/8/asc/1.json",
    "/rq/favicon.ico",
    "/rq/static/css/main.css",
    "/rq/static/js/underscore-umd-min.js",
)
ACTIONS = (
    "/rq/job/some-id/delete",
    "/rq/job/some-id/requeue",
    "/rq/requeue/bulk",
    "/rq/queue/bulk/failed/empty",
    "/rq/queue/bulk/compact",
)


@pytest.fixture(autouse=True)
def _cookies_without_https(app, monkeypatch):
    monkeypatch.setitem(app.config, "SESSION_COOKIE_SECURE", False)


@pytest.fixture
def queue(redis):
    """An RQ queue as RQ creates it, because the dashboard shows any job in Redis."""
    return Queue(queues.BULK, connection=redis, serializer="json")


@pytest.fixture
def admin(api, cast):
    """A client of the dashboard with an admin's token."""
    return api(cast.admin)


@pytest.fixture
def run_worker(redis):
    """Run the queued jobs, on a separate connection, because a worker changes its connection's time-outs."""

    def run(**arguments: Any) -> None:
        with Redis.from_url(settings.redis_url) as connection:
            worker = SimpleWorker([queues.BULK], connection=connection, serializer="json", **arguments)
            worker.work(burst=True, logging_level="CRITICAL")

    return run


@pytest.fixture
def failed(queue, run_worker):
    """The id of a failed job."""
    job = queue.enqueue("math.sqrt", -1, description="run 7")
    run_worker()
    assert job.get_status() == "failed"
    return job.id


def sign_in(client, token: str, next_path: str = "/rq/", **options):
    form = {"csrf": csrf_of(client.get("/login", **options).text), "token": token, "next": next_path}
    return client.post("/login", data=form, **options)


def listed(admin, registry: str, size: int = 8, order: str = "asc", page: int = 1) -> list[str]:
    response = admin.get(f"{JOBS}/{registry}/{size}/{order}/{page}.json")
    assert response.status_code == 200
    return [job["id"] for job in response.json["jobs"]]


# --- access


@pytest.mark.parametrize("path", [*PAGES, "/rq/0/view/job/x", "/rq/nothing/here", "/rq/requeue/bulk"])
def test_an_unauthenticated_visitor_is_redirected_to_the_login(client, path):
    response = client.get(path)
    assert response.status_code == 303
    assert unquote(response.location) == f"/login?next={path}"


@pytest.mark.parametrize("path", ACTIONS)
def test_an_unauthenticated_visitor_changes_nothing(client, path):
    response = client.post(path, headers=SAME_ORIGIN)
    assert (response.status_code, response.json["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize("person", ["subscriber", "lapsed", "stranger"])
def test_users_who_are_not_admins_are_refused(client, api, cast, person):
    token = cast.everybody[person].token
    assert sign_in(client, token).status_code == 303
    for path in (*PAGES, "/rq/nothing/here"):
        assert client.get(path).status_code == 403, path
        assert api(cast.everybody[person]).get(path).status_code == 403, path
    for path in ACTIONS:
        assert client.post(path, headers=SAME_ORIGIN).status_code == 403, path
        assert api(cast.everybody[person]).post(path).status_code == 403, path
    assert client.get("/rq/").json["code"] == "forbidden"
    page = client.get("/rq/", headers=BROWSER)
    assert page.status_code == 403
    assert "Only admins" in page.text
    assert f"Signed in as <strong>{cast.everybody[person].username}</strong>" in page.text


@pytest.mark.parametrize("path", PAGES)
def test_an_admin_sees_every_page(client, admin, cast, path):
    assert sign_in(client, cast.admin.token).status_code == 303
    assert client.get(path, buffered=True).status_code == 200
    assert admin.get(path, buffered=True).status_code == 200


def test_a_wrong_token_is_refused_even_beside_a_good_session(client, cast):
    sign_in(client, cast.admin.token)
    response = client.get("/rq/", headers={"Authorization": "Bearer belfry_wrong"})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    response = client.get("/rq/", headers={"Authorization": f"Bearer {cast.stranger.token}"})
    assert response.status_code == 403


@pytest.mark.parametrize("change", ["revoked", "expired", "demoted"])
def test_access_ends_with_the_token_or_the_admin_right(client, cast, change):
    sign_in(client, cast.admin.token)
    assert client.get("/rq/").status_code == 200
    if change == "demoted":
        User.update(is_admin=False).where(User.id == cast.admin.id).execute()
    else:
        past = datetime.now(UTC) - timedelta(seconds=1)
        ended = {"revoked_at": past} if change == "revoked" else {"expires_at": past}
        ApiToken.update(**ended).where(ApiToken.user == cast.admin.id).execute()
    assert client.get("/rq/").status_code == (403 if change == "demoted" else 303)
    assert client.post(ACTIONS[0], headers=SAME_ORIGIN).status_code == (403 if change == "demoted" else 401)


# --- signing in


def test_the_form_is_accessible_and_runs_no_script(client):
    response = client.get("/login")
    assert response.status_code == 200
    assert '<label for="token">' in response.text
    assert re.search(r'<input type="password" id="token" name="token"', response.text)
    assert "<script" not in response.text
    assert "<style" not in response.text
    assert "style=" not in response.text
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert response.headers["Cache-Control"] == "no-store"
    stylesheet = re.search(r'<link rel="stylesheet" href="([^"]+)"', response.text)[1]
    assert client.get(stylesheet, buffered=True).mimetype == "text/css"


@pytest.mark.parametrize("token", ["", "belfry_wrong", "ü", "\x00", "a" * 10_000])
def test_a_wrong_token_shows_the_form_again_with_the_reason(client, token):
    response = sign_in(client, token, "/rq/0/view/workers")
    assert response.status_code == 401
    assert "This token is unknown, or it was revoked or has expired." in response.text
    assert 'name="next" value="/rq/0/view/workers"' in response.text
    assert client.get("/rq/").status_code == 303


@pytest.mark.parametrize("csrf", [None, "", "wrong", "ü"])
def test_signing_in_and_out_needs_this_sessions_csrf_token(client, cast, csrf):
    form = {"token": cast.admin.token} | ({"csrf": csrf} if csrf is not None else {})
    assert client.post("/login", data=form).status_code == 403
    client.get("/login")
    assert client.post("/login", data=form).status_code == 403
    assert client.get("/rq/").status_code == 303
    sign_in(client, cast.admin.token)
    assert client.post("/logout", data=form).status_code == 403
    assert client.get("/rq/").status_code == 200


def test_a_csrf_token_from_before_signing_in_is_invalid_afterwards(client, cast):
    old = csrf_of(client.get("/login").text)
    client.post("/login", data={"csrf": old, "token": cast.admin.token})
    assert client.post("/logout", data={"csrf": old}).status_code == 403


def test_signing_out_ends_the_session(client, cast):
    sign_in(client, cast.admin.token)
    page = client.get("/login")
    assert "Signed in as <strong>ada</strong>" in page.text
    response = client.post("/logout", data={"csrf": csrf_of(page.text)})
    assert (response.status_code, response.location) == (303, "/login")
    assert client.get("/rq/").status_code == 303
    assert client.get("/logout").status_code == 405


@pytest.mark.parametrize("secure", [True, False])
def test_the_cookie_is_httponly_and_samesite(app, client, cast, monkeypatch, secure):
    monkeypatch.setitem(app.config, "SESSION_COOKIE_SECURE", secure)
    base_url = "https://localhost" if secure else "http://localhost"
    response = sign_in(client, cast.admin.token, base_url=base_url)
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert ("Secure" in cookie) == secure
    with client.session_transaction(base_url=base_url) as session:
        assert list(session) == ["id"]
        assert cast.admin.token not in str(session)


def test_a_secure_cookie_has_the_host_prefix(cast, override):
    override(session_cookie_secure=True)
    response = sign_in(create_app().test_client(), cast.admin.token, base_url="https://localhost")
    name, *attributes = response.headers["Set-Cookie"].split("; ")
    assert name.startswith("__Host-belfry=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} == set(attributes), "there is no Domain attribute"


@pytest.mark.parametrize("path", ["/rq/", "/rq/0/view/workers", "/docs", "/rq/0/view/job/x?y=1#z"])
def test_signing_in_redirects_to_the_requested_page(client, cast, path):
    response = sign_in(client, cast.admin.token, path)
    assert (response.status_code, response.location) == (303, path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "rq/",
        "//evil.example/",
        "///evil.example/",
        "/rq//evil.example",
        "/\\evil.example/",
        "\\\\evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        " /rq/",
        "https://evil.example/",
        "https:evil.example",
        "javascript:alert(1)",
        "/rq/\r\nSet-Cookie: a=b",
    ],
)
def test_signing_in_never_redirects_to_another_site(client, cast, path):
    assert sign_in(client, cast.admin.token, path).location == "/"
    assert 'name="next" value="/"' in client.get("/login", query_string={"next": path}).text


# --- requests from other sites


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (SAME_ORIGIN, 200),
        ({"Origin": "http://localhost"}, 200),
        ({"Referer": "http://localhost/rq/0/view/jobs"}, 200),
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "http://localhost:8000"}, 403),
        ({"Referer": "http://evil.example/localhost"}, 403),
        ({"Referer": "http://["}, 403),
    ],
)
def test_a_change_must_come_from_a_page_of_this_site(client, cast, failed, headers, status):
    sign_in(client, cast.admin.token)
    assert client.post("/rq/requeue/bulk", headers=headers).status_code == status
    assert queues.queue(queues.BULK).count == (1 if status == 200 else 0)


def test_a_bearer_token_is_accepted_from_any_origin(admin, failed):
    assert admin.post("/rq/requeue/bulk", headers={"Origin": "http://evil.example"}).json["count"] == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_get_requests_never_requeue(client, cast, failed, method):
    sign_in(client, cast.admin.token)
    response = client.open("/rq/requeue/bulk", method=method, headers=SAME_ORIGIN)
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
    assert queues.queue(queues.BULK).count == 0


# --- views


def test_the_overview_counts_every_registry(admin, queue, failed):
    queue.enqueue("math.sqrt", 4)
    queue.enqueue_in(timedelta(hours=1), "math.sqrt", 4)
    [shown] = admin.get("/rq/0/data/queues.json").json["queues"]
    counts = {name: count for name, count in shown.items() if name.endswith("count") and count}
    assert shown["name"] == "bulk"
    assert counts == {"count": 1, "failed_job_registry_count": 1, "scheduled_job_registry_count": 1}


def test_jobs_in_every_state_have_a_page(admin, queue, run_worker, failed):
    finished = queue.enqueue("math.sqrt", 4, description="run 8", meta={"slice": 3})
    run_worker()
    waiting = queue.enqueue("math.sqrt", 4)
    later = queue.enqueue_in(timedelta(hours=1), "math.sqrt", 4)
    canceled = queue.enqueue("math.sqrt", 4)
    canceled.cancel()
    for job_id, state in (
        (failed, "failed"),
        (finished.id, "finished"),
        (waiting.id, "queued"),
        (later.id, "scheduled"),
        (canceled.id, "canceled"),
    ):
        assert job_id in admin.get(f"/rq/0/view/job/{job_id}").text
        assert admin.get(f"/rq/0/data/job/{job_id}.json").json["status"] == state
        assert listed(admin, state) == [job_id]
    shown = admin.get(f"/rq/0/data/job/{finished.id}.json").json
    assert (shown["result"], shown["description"], shown["metadata"]) == (
        2.0,
        "run 8",
        "{&quot;slice&quot;: 3}",
    )
    assert "ValueError" in admin.get(f"/rq/0/data/job/{failed}.json").json["exc_info"]


def test_a_job_with_dependencies_has_a_page(admin, queue):
    first, second = queue.enqueue("math.sqrt", 4), queue.enqueue("math.sqrt", 9)
    waiting = queue.enqueue("math.sqrt", 16, depends_on=[first, second])
    second.delete()
    shown = admin.get(f"/rq/0/data/job/{waiting.id}.json").json
    assert dict(zip(shown["depends_on"], shown["depends_on_status"], strict=True)) == {
        first.id: "active",
        second.id: "expired",
    }
    assert admin.get(f"/rq/0/view/job/{waiting.id}").status_code == 200
    assert listed(admin, "deferred") == [waiting.id]


@pytest.mark.parametrize("registry", ["queued", "canceled"])
def test_the_pages_of_a_list_neither_repeat_nor_skip_jobs(admin, queue, registry):
    jobs = [queue.enqueue("math.sqrt", number, job_id=f"job-{number:02}") for number in range(20)]
    if registry == "canceled":
        for job in jobs:
            job.cancel()
    ids = [job.id for job in jobs]
    assert [listed(admin, registry, 8, "asc", page) for page in (1, 2, 3, 4)] == [
        ids[:8],
        ids[8:16],
        ids[16:],
        [],
    ]
    assert [listed(admin, registry, 8, "dsc", page) for page in (1, 2, 3, 4)] == [
        ids[12:][::-1],
        ids[4:12][::-1],
        ids[:4][::-1],
        [],
    ]
    pagination = admin.get(f"{JOBS}/{registry}/8/asc/2.json").json["pagination"]
    assert pagination["num_pages"] == 3
    assert [page["number"] for page in pagination["pages_in_window"]] == [1, 2, 3]
    for page in (pagination["prev_page"], pagination["next_page"], *pagination["pages_in_window"]):
        assert admin.get(page["url"]).status_code == 200


def test_a_job_list_without_a_queue_name_shows_the_first_queue(admin):
    assert "<strong>notifications</strong>" in admin.get("/rq/0/view/jobs").text


_job_results: list[Any] = []


def request_dashboard() -> None:
    """A job that requests the dashboard while it runs."""
    paths = ("/rq/0/data/workers.json", f"{JOBS}/started/8/asc/1.json")
    _job_results.append([get_as_admin(path) for path in paths])


def get_as_admin(path: str) -> Any:
    app, token = _job_results[0]
    response = app.test_client().get(path, headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == 200
    return response.json


def test_a_busy_worker_and_its_job_are_shown(app, cast, queue, run_worker):
    _job_results[:] = [(app, cast.admin.token)]
    job = queue.enqueue("tests.web.test_dashboard.request_dashboard", description="run 9")
    run_worker(name="worker-1")
    assert job.get_status() == "finished"
    workers, started = _job_results[1]
    [worker] = workers["workers"]
    assert (worker["name"], worker["state"], worker["queues"]) == ("worker-1", "busy", ["bulk"])
    assert worker["current_job"]["job_id"] == job.id
    assert worker["current_job"]["call_string"] == worker["current_job"]["description"] == "run 9"
    assert [one["id"] for one in started["jobs"]] == [job.id]


@pytest.fixture
def idle_worker():
    """An idle worker with a hostile name."""
    with Redis.from_url(settings.redis_url) as connection:
        worker = Worker([queues.BULK], name=SCRIPT, connection=connection, serializer="json")
        worker.register_birth()
        worker.set_state("idle")
        yield worker
        worker.register_death()


def test_an_idle_worker_is_shown(admin, idle_worker):
    [worker] = admin.get("/rq/0/data/workers.json").json["workers"]
    assert (worker["state"], worker["current_job"], worker["queues"]) == ("idle", "idle", ["bulk"])


def test_a_worker_whose_job_was_deleted_is_shown(admin, queue, idle_worker):
    job = queue.enqueue("math.sqrt", 4)
    idle_worker.prepare_execution(job)
    job.connection.delete(job.key)
    [worker] = admin.get("/rq/0/data/workers.json").json["workers"]
    assert worker["current_job"] == "idle"


def test_listing_workers_does_not_change_the_web_processs_timeouts(app, admin, idle_worker, monkeypatch):
    timeouts = app.redis_conn.connection_pool.connection_kwargs
    monkeypatch.setitem(timeouts, "socket_timeout", 3)
    for path in ("/rq/0/view/workers", "/rq/0/data/workers.json", "/rq/"):
        assert admin.get(path).status_code == 200
    assert timeouts["socket_timeout"] == 3


# --- actions


def test_one_job_is_requeued(client, cast, queue, failed):
    sign_in(client, cast.admin.token)
    assert client.post(f"/rq/job/{failed}/requeue", headers=SAME_ORIGIN).json == {"status": "OK"}
    assert queue.job_ids == [failed]
    again = client.post(f"/rq/job/{failed}/requeue", headers=SAME_ORIGIN)
    assert (again.status_code, again.json["code"]) == (409, "conflict")
    assert "has not failed" in again.json["detail"]
    assert queue.job_ids == [failed]


def test_all_failed_jobs_are_requeued(admin, queue, run_worker, failed, redis):
    other = queue.enqueue("math.sqrt", -2)
    run_worker()
    deleted = queue.enqueue("math.sqrt", -3)
    run_worker()
    redis.delete(deleted.key)
    assert admin.post("/rq/requeue/bulk").json == {"status": "OK", "count": 2}
    assert sorted(queue.job_ids) == sorted([failed, other.id])
    assert admin.post("/rq/requeue/deliveries").json == {"status": "OK", "count": 0}


def test_one_job_is_deleted(client, cast, queue, redis):
    job = queue.enqueue("math.sqrt", 4)
    sign_in(client, cast.admin.token)
    assert client.post(f"/rq/job/{job.id}/delete", headers=SAME_ORIGIN).json == {"status": "OK"}
    assert (queue.count, Job.exists(job.id, redis)) == (0, False)


@pytest.mark.parametrize(
    "registry", ["queued", "scheduled", "deferred", "started", "finished", "failed", "canceled"]
)
def test_a_registry_is_emptied(admin, queue, run_worker, redis, registry, idle_worker):
    for number in range(2):
        job = queue.enqueue("math.sqrt", -1 if registry == "failed" else 4, job_id=f"job-{number}")
        if registry in ("finished", "failed"):
            run_worker()
        elif registry == "scheduled":
            job.delete()
            queue.enqueue_in(timedelta(hours=1), "math.sqrt", 4, job_id=job.id)
        elif registry == "deferred":
            queue.enqueue("math.sqrt", 4, depends_on=job, job_id=f"next-{number}")
        elif registry == "started":
            idle_worker.prepare_execution(job)
        elif registry == "canceled":
            job.cancel()
    prefix = "next" if registry == "deferred" else "job"
    assert listed(admin, registry) == [f"{prefix}-0", f"{prefix}-1"]
    redis.delete(f"rq:job:{prefix}-0")  # as if it had expired
    assert admin.post(f"/rq/queue/bulk/{registry}/empty").json == {"status": "OK"}
    assert listed(admin, registry) == []
    assert not Job.exists(f"{prefix}-1", redis)
    key = queue.key if registry == "queued" else getattr(queue, f"{registry}_job_registry").key
    assert not redis.exists(key)


def test_compacting_removes_missing_jobs_and_keeps_the_order(admin, queue, redis):
    jobs = [queue.enqueue("math.sqrt", number) for number in range(4)]
    redis.delete(jobs[1].key)
    assert admin.post("/rq/queue/bulk/compact").json == {"status": "OK"}
    assert queue.job_ids == [jobs[0].id, jobs[2].id, jobs[3].id]
    assert admin.post("/rq/queue/deliveries/compact").json == {"status": "OK"}


@pytest.mark.parametrize("path", ["/rq/0/view/job/unknown", "/rq/0/data/job/unknown.json"])
def test_an_unknown_job_is_not_found(admin, path):
    assert admin.get(path).json["code"] == "not_found"
    page = admin.get(path, headers=BROWSER)
    assert page.status_code == 404
    assert "There is no such job" in page.text


@pytest.mark.parametrize("action", ["delete", "requeue"])
def test_actions_on_an_unknown_job_are_refused(admin, action):
    assert admin.post(f"/rq/job/unknown/{action}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/rq/nothing",
        "/rq/1/",
        "/rq/7/data/queues.json",
        "/rq/0/data/jobs/bulk/nothing/8/asc/1.json",
        "/rq/0/data/jobs/bulk/queued/0/asc/1.json",
        "/rq/0/data/jobs/bulk/queued/x/asc/1.json",
        "/rq/0/data/jobs/bulk/queued/8/up/1.json",
        "/rq/0/data/jobs/bulk/queued/8/asc/0.json",
        "/rq/0/data/jobs/bulk/queued/8/asc/-1.json",
        "/rq/0/data/jobs/b%20k/queued/8/asc/1.json",
        "/rq/0/data/job/a.b.json",
        "/rq/0/view/job/a:b",
    ],
)
def test_an_impossible_path_is_404(admin, path):
    assert admin.get(path).status_code == 404


# --- hostile jobs


class FileCreator:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_job_is_ever_unpickled(admin, queue, redis, run_worker, idle_worker, tmp_path):
    pickled = pickle.dumps(FileCreator(tmp_path / "unpickled"))
    ids = []
    for number in range(3):
        job = queue.enqueue("math.sqrt", 4 if number else -1, job_id=f"job-{number}")
        run_worker()
        redis.hset(job.key, mapping={"data": zlib.compress(pickled), "meta": pickled, "result": pickled})
        stored = {"type": 2 if number == 0 else 1, "return_value": base64.b64encode(pickled)}
        redis.xadd(f"rq:results:{job.id}", stored)
        ids.append(job.id)
    idle_worker.prepare_execution(Job.fetch(ids[1], connection=redis, serializer="json"))
    for path in PAGES:
        assert admin.get(path, buffered=True).status_code == 200
    for registry in ("failed", "finished", "started"):
        assert listed(admin, registry)
    for job_id in ids:
        assert admin.get(f"/rq/0/view/job/{job_id}").status_code == 200
        assert admin.get(f"/rq/0/data/job/{job_id}.json").status_code == 200
    assert admin.get("/rq/0/data/job/job-2.json").json["result"] == "(not JSON)"
    assert admin.post("/rq/job/job-0/requeue").status_code == 200
    assert redis.hget("rq:job:job-0", "meta") == pickled
    assert admin.post("/rq/job/job-1/delete").status_code == 200
    assert admin.post("/rq/queue/bulk/compact").status_code == 200
    assert admin.post("/rq/requeue/bulk").status_code == 200
    for registry in ("finished", "started", "failed", "queued"):
        assert admin.post(f"/rq/queue/bulk/{registry}/empty").status_code == 200
    assert not (tmp_path / "unpickled").exists()
    assert web.config.serializer is JSONSerializer


def test_texts_of_jobs_are_escaped(admin, queue, redis, run_worker, idle_worker):
    job = queue.enqueue("json.loads", json.dumps({SCRIPT: [SCRIPT]}), description=SCRIPT, meta={"a": SCRIPT})
    run_worker()
    redis.hset(job.key, "origin", SCRIPT)
    idle_worker.prepare_execution(job)
    redis.sadd("rq:queues", f"rq:queue:{SCRIPT}")
    for path in (f"/rq/0/data/job/{job.id}.json", "/rq/0/data/queues.json"):
        response = admin.get(path)
        assert response.status_code == 200
        assert "<script" not in response.text
        assert "&lt;script&gt;" in response.text
    [worker] = admin.get("/rq/0/data/workers.json").json["workers"]
    assert worker["current_job"].pop("description") == SCRIPT  # the page escapes this field
    assert "<script" not in str(worker)
    for path in ("/rq/0/view/jobs", "/rq/", f"/rq/0/view/job/{job.id}"):
        assert "alert(1)" not in admin.get(path).text.replace("&lt;script&gt;alert(1)", "")


def test_a_traceback_is_escaped(admin, queue, run_worker):
    job = queue.enqueue("json.loads", f"{SCRIPT}")
    run_worker()
    failing = queue.enqueue("builtins.open", f"/nothing/{SCRIPT}")
    run_worker()
    assert "<module>" not in admin.get(f"/rq/0/data/job/{job.id}.json").text
    shown = admin.get(f"/rq/0/data/job/{failing.id}.json").json["exc_info"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown


def test_a_queue_name_cannot_break_out_of_a_script(admin):
    for name in ("%27%3Balert(1)%3B%27", "%3C%2Fscript%3E", "a%22b", "a%0Ab"):
        assert admin.get(f"/rq/0/view/jobs/{name}/queued/8/asc/1").status_code == 404


@pytest.mark.parametrize("page", ["", "0/view/workers", "0/view/jobs", "0/view/job/{failed}"])
def test_the_policy_permits_only_the_librarys_script(admin, failed, page):
    responses = [admin.get(f"/rq/{page.format(failed=failed)}") for _ in range(2)]
    nonces = set()
    for response in responses:
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        nonce = re.search(r"'nonce-([^']+)'", policy["script-src"])[1]
        assert policy["script-src"].split() == ["'self'", f"'nonce-{nonce}'", "'unsafe-eval'"]
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        tags = re.findall(r"<script\b[^>]*>", response.text)
        inline = [tag for tag in tags if " src=" not in tag and "text/template" not in tag]
        assert inline == [f'<script nonce="{nonce}">']
        assert all('src="/rq/static/' in tag for tag in tags if " src=" in tag)
        assert not re.search(r"<[^>]+\son[a-z]+=", response.text)
        nonces.add(nonce)
    assert len(nonces) == 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:s3cret@redis.invalid:6380/2", "redis.invalid:6380, database 2"),
        ("redis://:s3cret@redis.invalid", "redis.invalid:6379, database 0"),
        ("rediss://:p@s3cret@redis.invalid:6380/1", "redis.invalid:6380, database 1"),
        ("redis://redis.invalid/0?password=s3cret", "redis.invalid:6379, database 0"),
        ("unix:///tmp/redis.sock?db=3&password=s3cret", "/tmp/redis.sock, database 3"),
        ("unix://user:s3cret@/tmp/redis.sock?db=3", "/tmp/redis.sock, database 3"),
    ],
)
def test_each_kind_of_redis_url_is_accepted_and_its_password_hidden(override, url, shown):
    override(redis_url=url)
    app = Flask("another")
    guard.register(app)  # does not connect, because nothing listens there
    assert app.config["RQ_DASHBOARD_REDIS_URL"] == (shown,)
    assert "s3cret" not in str(app.config)


def test_the_redis_url_is_shown(app, admin):
    text = admin.get("/rq/").text
    assert app.config["RQ_DASHBOARD_REDIS_URL"][0] in text


@pytest.mark.parametrize(
    "path", [path for path in PAGES if "static" not in path] + ["/rq/0/view/job/x", *ACTIONS]
)
def test_an_unreachable_redis_is_reported(app, admin, monkeypatch, path):
    monkeypatch.setattr(app, "redis_conn", Redis(unix_socket_path="/nowhere/redis.sock", retry=NO_RETRY))
    method = "POST" if path in ACTIONS else "GET"
    response = admin.open(method, path)
    assert (response.status_code, response.json["code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) > 0
    page = admin.open(method, path, headers=BROWSER)
    assert page.status_code == 503
    assert page.mimetype == "text/html"
    assert "Redis is unavailable" in page.text


def test_redis_that_is_lost_during_a_request_is_reported(app, admin, monkeypatch):
    class DisconnectedRedis(Redis):
        def ping(self, **_: Any) -> bool:
            return True

        def execute_command(self, *_: Any, **__: Any) -> Any:
            raise RedisTimeoutError("Timeout reading from socket")

    monkeypatch.setattr(app, "redis_conn", DisconnectedRedis())
    for path in ("/rq/0/view/jobs", "/rq/0/data/workers.json", "/rq/0/view/job/x"):
        assert admin.get(path).status_code == 503
