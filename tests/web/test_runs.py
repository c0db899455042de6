"""A run over the API: why it failed, when it is tried again, and its retry by an admin."""

import pytest

from belfry.core.db import execute
from belfry.fanout.runs import failure_reason
from models import Run
from tests.fanout_helpers import post, run_to_end


def fail(run_id: int, error: str = "OperationalError: connection to server at 10.0.0.7 failed") -> None:
    execute(
        "UPDATE run SET state = 'failed', attempts = 6, attempts_left = 0, error = %(error)s, finished_at = now(),"
        " sweep_after = NULL WHERE id = %(id)s",
        {"id": run_id, "error": error},
    )


def test_an_author_sees_the_reason_and_no_details(api, cast):
    _, run_id = post(cast.subscriber, cast.general)
    fail(run_id)
    run = api(cast.subscriber).get(f"/api/runs/{run_id}").get_json()
    assert (run["state"], run["reason"]) == ("failed", "the database is unavailable")
    assert "10.0.0.7" not in str(run)
    assert "10.0.0.7" in api(cast.admin).get(f"/api/runs/{run_id}").get_json()["error"]


def test_a_run_that_is_retried_says_when(api, cast):
    _, run_id = post(cast.subscriber, cast.general)
    execute(
        "UPDATE run SET attempts = 2, attempts_left = 4, error = 'QueryCanceled: canceling statement due to statement"
        " timeout', sweep_after = now() + interval '13 seconds'"
    )
    run = api(cast.subscriber).get(f"/api/runs/{run_id}").get_json()
    assert (run["state"], run["attempts"], run["reason"]) == ("queued", 2, "it took too long")
    assert run["created_at"] < run["next_attempt_at"]
    execute("UPDATE run SET attempts = 0, error = NULL")
    assert api(cast.subscriber).get(f"/api/runs/{run_id}").get_json()["next_attempt_at"] is None


def test_an_admin_retries_a_failed_run_and_then_all_views_agree(api, cast, run_jobs, command):
    message_id, run_id = post(cast.subscriber, cast.general)
    fail(run_id)
    assert api(cast.subscriber).post(f"/api/runs/{run_id}/retry").status_code == 403
    retried = api(cast.admin).post(f"/api/runs/{run_id}/retry")
    assert (retried.status_code, retried.get_json()["state"], retried.get_json()["error"]) == (202, "queued", None)
    run_jobs()
    assert Run.get_by_id(run_id).state == "succeeded"
    assert api(cast.admin).get(f"/api/runs/{run_id}").get_json()["state"] == "succeeded"
    assert api(cast.admin).get("/api/runs?state=failed").get_json()["items"] == []
    assert api(cast.admin).get("/rq/0/data/jobs/notifications/failed/10/asc/1.json").get_json()["jobs"] == []
    command("verify", code=0)
    assert "not notified" not in api(cast.vip).get(f"/api/messages/{message_id}/explain").get_json()["detail"]


def test_only_a_failed_run_is_retried(api, cast):
    _, run_id = post(cast.subscriber, cast.general)
    assert api(cast.admin).post(f"/api/runs/{run_id}/retry").status_code == 409
    assert run_to_end(run_id) == "succeeded"
    assert api(cast.admin).post(f"/api/runs/{run_id}/retry").status_code == 409
    assert api(cast.admin).post("/api/runs/999/retry").status_code == 404


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("OperationalError: server closed the connection unexpectedly", "the database is unavailable"),
        ("JobTimeoutException: Task exceeded maximum timeout value (180 seconds)", "it took too long"),
        ("DiskFull: could not extend file: No space left on device", "the database cannot store notifications"),
        ("failed after 6 attempts that ended without an error, as when it is killed", "its worker was stopped"),
        ("ZeroDivisionError: division by zero", "an unexpected error occurred"),
    ],
)
def test_an_error_has_a_reason_in_words(error, reason):
    assert failure_reason(error) == reason
