"""Runs: their progress and statistics, replays, and test notifications."""

from typing import Any

import schemas
from belfry.core.errors import Conflict
from belfry.fanout import recovery, runs
from belfry.messages.send_test import send_test
from belfry.queue import queues
from belfry.queue.queues import enqueue_run
from belfry.web.endpoint import ApiResponse, api, current_user, endpoint, nothing, paginate


@api.get("/runs/<id:run_id>")
@endpoint(response=schemas.Run)
def get_run(run_id: int) -> Any:
    """Get the progress and statistics of a run. Only the message's author and admins see it."""
    return runs.find_run(run_id, current_user())


@api.get("/runs")
@endpoint(query=schemas.RunQuery, response=schemas.Run, admin=True)
def list_runs(query: dict[str, Any]) -> Any:
    """List all runs, newest first. `state` and `channel_id` restrict the list."""
    return paginate(
        query,
        lambda before, limit: runs.list_runs(
            before=before, limit=limit, state=query["state"], channel_id=query["channel_id"]
        ),
        lambda run: run["id"],
    )


@api.post("/runs/<id:run_id>/replay")
@endpoint(body=schemas.ReplayIn, response=schemas.Replay, status=202, admin=True, optional_body=True, publishes=nothing)
def replay(run_id: int, body: dict[str, Any]) -> Any:
    """Repeat a run by the rules of now. 202: a new run inserts what is missing. 200: no run was created."""
    replayed = runs.replay(run_id, dry_run=body["dry_run"])
    new_run = replayed["run_id"]
    if new_run is None:
        return ApiResponse({**replayed, "run": None}, 200)
    state = "queued" if enqueue_run(new_run) else "pending"
    return ApiResponse(
        {**replayed, "run": {"id": new_run, "state": state}}, headers={"Location": f"/api/runs/{new_run}"}
    )


@api.post("/runs/<id:run_id>/retry")
@endpoint(response=schemas.Run, status=202, admin=True, publishes=nothing)
def retry(run_id: int) -> Any:
    """Continue a failed run, with all attempts and its progress so far. 409 for a run that has not failed."""
    runs.find_run(run_id)
    items = recovery.retry_failed([run_id])
    if not items:
        raise Conflict("Only a failed run can be retried.")
    queues.enqueue(items, lost=True)
    return runs.find_run(run_id)


@api.post("/test-notifications")
@endpoint(
    body=schemas.TestNotificationIn,
    response=schemas.Run,
    status=202,
    admin=True,
    optional_body=True,
    publishes=nothing,
)
def test_notification(body: dict[str, Any]) -> ApiResponse:
    """Send a test notification through the real queue. Without a body it is for the caller."""
    run_id = send_test(current_user(), body["channel_id"], body["content"], body["audience"])
    enqueue_run(run_id)
    return ApiResponse(runs.find_run(run_id), headers={"Location": f"/api/runs/{run_id}"})
