"""rq-dashboard agrees with the database: a burst, a failure and its retry, killed workers, a fan-out in slices."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psutil
import psycopg
import pytest
from redis import Redis

from belfry.core.db import execute, fetch_all
from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from config import settings
from models import Run
from tests.fanout_helpers import add_members, fault_on_insert
from tests.fanout_helpers import post as write
from tests.processes import wait_until, worker_process
from tests.worker.test_worker import horses_of

pytestmark = pytest.mark.slow
REGISTRIES = ("queued", "started", "scheduled", "finished", "failed")
BURST = 1_000
INSERT_LOCK = 4_711  # the key of an advisory lock


class Dashboard:
    """The data that rq-dashboard shows to an admin at /rq."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def json(self, path: str) -> Any:
        response = self._api.get(f"/rq/0/data/{path}.json")
        assert response.status_code == 200, response.text
        return response.get_json()

    def jobs(self, registry: str, queue: str = queues.NOTIFICATIONS) -> list[str]:
        """The ids of a registry, of all pages; the last page first, because jobs move to earlier pages meanwhile."""
        path = f"jobs/{queue}/{registry}/500/asc"
        last = self.json(f"{path}/1")["pagination"]["num_pages"]
        return [job["id"] for number in range(last or 1, 0, -1) for job in self.json(f"{path}/{number}")["jobs"]]

    def counts(self, queue: str = queues.NOTIFICATIONS) -> dict[str, int]:
        [found] = [one for one in self.json("queues")["queues"] if one["name"] == queue]
        counted = {name: found[f"{name}_job_registry_count"] for name in REGISTRIES if name != "queued"}
        return counted | {"queued": found["count"]}

    def workers(self) -> list[dict[str, Any]]:
        return list(self.json("workers")["workers"])

    def job(self, job_id: str) -> dict[str, Any]:
        assert self._api.get(f"/rq/0/view/job/{job_id}").status_code == 200
        return dict(self.json(f"job/{job_id}"))

    def post(self, path: str) -> Any:
        return self._api.post(f"/rq/{path}")


@pytest.fixture
def dashboard(api, cast) -> Dashboard:
    return Dashboard(api(cast.admin))


def runs_by_state() -> dict[str, set[str]]:
    """{state: ids of the jobs of its runs}, from the database."""
    found: dict[str, set[str]] = {}
    for run in fetch_all("SELECT id, state FROM run"):
        found.setdefault(run["state"], set()).add(queues.run_job_id(run["id"]))
    return found


def assert_settled(dashboard: Dashboard, redis: Redis) -> None:
    """Assert that nothing runs, each ended run is in its registry, and no registry has an entry without a job."""
    states = runs_by_state()
    assert set(dashboard.jobs("finished")) == states.get("succeeded", set())
    assert set(dashboard.jobs("failed")) == states.get("failed", set())
    assert dashboard.jobs("started") == []
    assert redis.keys("rq:execution*") == []
    for name in queues.QUEUES:
        for kind in REGISTRIES:
            if kind != "queued":
                for job_id in getattr(queues.queue(name), f"{kind}_job_registry").get_job_ids(cleanup=False):
                    assert redis.exists(f"rq:job:{job_id}"), (name, kind, job_id)


def finished(run_id: int) -> bool:
    return str(Run.get_by_id(run_id).state) == "succeeded"


@contextmanager
def blocked_inserts() -> Iterator[psycopg.Connection]:
    """A session that holds the lock INSERT_LOCK until it unlocks it."""
    with psycopg.connect(settings.database_url, autocommit=True) as session:
        session.execute("SELECT pg_advisory_lock(%s)", [INSERT_LOCK])
        yield session


def test_the_dashboard_agrees_with_the_database_during_a_burst(dashboard, cast, redis):
    runs = [write(cast.subscriber, cast.general, f"gold {number}")[1] for number in range(BURST)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    everything = {queues.run_job_id(run_id) for run_id in runs}
    assert dashboard.counts() == {"queued": BURST, "started": 0, "scheduled": 0, "finished": 0, "failed": 0}
    busy, polls = 0, 0
    with (
        blocked_inserts() as session,
        fault_on_insert(f"PERFORM pg_advisory_xact_lock_shared({INSERT_LOCK});"),
        worker_process(),
        worker_process(),
        closing(session),  # before the workers are stopped
    ):
        wait_until(lambda: len(dashboard.workers()) == 2, "both workers to register")
        while len(dashboard.jobs("finished")) < BURST:
            polls += 1
            before = runs_by_state()
            seen = {kind: set(dashboard.jobs(kind)) for kind in REGISTRIES}
            workers = dashboard.workers()
            after = runs_by_state()
            assert seen["finished"] <= after.get("succeeded", set()), "jobs that are shown as finished have succeeded"
            shown = seen["queued"] | seen["started"] | seen["finished"]
            assert shown >= before.get("queued", set()) - after.get("succeeded", set()), "no waiting job is missing"
            assert seen["failed"] == seen["scheduled"] == set()
            if seen["started"] and any(worker["state"] == "busy" for worker in workers):
                busy += 1
                session.execute("SELECT pg_advisory_unlock_all()")
            assert polls < 2_000, "the burst never ends"
            time.sleep(0.02)
        assert set(dashboard.jobs("finished")) == everything == runs_by_state()["succeeded"]
        assert busy, f"none of {polls} polls shows a busy worker with started jobs"
        assert sum(worker["successful_job_count"] for worker in dashboard.workers()) == BURST
        assert sum(worker["failed_job_count"] for worker in dashboard.workers()) == 0
    assert_settled(dashboard, redis)
    for run in Run.select().where(Run.id << runs[::100]):
        job = queues.queue().fetch_job(queues.run_job_id(run.id))
        shown = dashboard.job(job.id)
        assert (shown["status"], shown["origin"]) == ("finished", "notifications")
        assert job.created_at <= job.started_at <= job.ended_at
        summary = f"{run.notifications_inserted} notifications inserted for {run.members_total} members"
        assert job.latest_result().return_value == {"run": run.id, "state": run.state, "summary": summary}


def test_a_failure_is_scheduled_then_failed_with_its_error_and_a_requeue_retries_the_run(dashboard, cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    job_id = queues.run_job_id(run_id)
    execute("UPDATE run SET attempts_left = 2")
    with worker_process(RETRY_BASE_DELAY_SECONDS="3"):
        with fault_on_insert("RAISE 'the disk is full';"):
            queues.enqueue_run(run_id)
            wait_until(lambda: dashboard.jobs("scheduled") == [job_id], "the retry to be scheduled")
            assert (Run.get_by_id(run_id).state, dashboard.job(job_id)["status"]) == ("queued", "scheduled")
            wait_until(lambda: dashboard.jobs("failed") == [job_id], "the last attempt to fail", 60)
            run = Run.get_by_id(run_id)
            assert (run.state, "the disk is full" in run.error) == ("failed", True)
            assert "the disk is full" in queues.queue().fetch_job(job_id).latest_result().exc_string
            assert_settled(dashboard, redis)
        assert dashboard.post(f"job/{job_id}/requeue").status_code == 200
        assert dashboard.jobs("failed") == []
        wait_until(lambda: dashboard.jobs("finished") == [job_id], "the run to succeed")
        assert finished(run_id)
    assert_settled(dashboard, redis)


@pytest.mark.parametrize("kill_worker", [False, True], ids=["work-horse", "worker"])
def test_no_entry_of_a_killed_process_is_left_after_another_has_run_its_jobs(dashboard, cast, redis, kill_worker):
    with worker_process() as first, worker_process():
        with fault_on_insert("PERFORM pg_sleep(3);"):
            runs = [write(cast.subscriber, cast.general, f"gold {number}")[1] for number in range(3)]
            queues.enqueue([WorkItem(run_id) for run_id in runs])
            wait_until(lambda: dashboard.jobs("started") != [], "jobs to be started")
            [horse] = horses_of(first.pid)
            if kill_worker:
                os.kill(first.pid, signal.SIGKILL)
            else:
                os.kill(horse, signal.SIGKILL)
        wait_until(lambda: all(finished(run_id) for run_id in runs), "another process to run the jobs", 60)
        wait_until(lambda: len(dashboard.jobs("finished")) == 3, "the jobs to be finished", 60)
        wait_until(lambda: redis.keys("rq:execution*") == [], "no execution to be left", 60)
        if kill_worker and psutil.pid_exists(horse):
            wait_until(lambda: not psutil.pid_exists(horse), "the orphaned work-horse to end")
    assert_settled(dashboard, redis)


def test_the_dashboard_shows_the_slices_of_a_fan_out(dashboard, cast, redis):
    add_members(cast.server_id, 95)
    _, run_id = write(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    seen: Counter[str] = Counter()
    with fault_on_insert("PERFORM pg_sleep(0.1);"), worker_process(FANOUT_SLICE_SIZE="10"):
        while not finished(run_id):
            seen["started"] += bool(dashboard.jobs("started", queues.BULK))
            seen["busy"] += any(worker["state"] == "busy" for worker in dashboard.workers())
            time.sleep(0.02)
        wait_until(lambda: dashboard.counts(queues.BULK)["finished"] == 10, "all slices to be finished")
    assert seen["started"], "no poll shows a started slice"
    assert seen["busy"], "no poll shows a busy worker"
    slices = dashboard.jobs("finished", queues.BULK)
    assert all(re.fullmatch(rf"slice-{run_id}-[0-9]+", job_id) for job_id in slices)
    assert Run.get_by_id(run_id).members_processed == 100
    assert_settled(dashboard, redis)


def test_a_run_that_the_sweeper_fails_is_shown_as_failed_with_its_error(dashboard, cast, redis):
    _, run_id = write(cast.subscriber, cast.general)
    queues.enqueue_run(run_id)
    execute(
        "UPDATE run SET state = 'running', attempts = 6, attempts_left = 0, started_at = now(),"
        " sweep_after = now() - interval '1 minute'"
    )
    redis.flushdb()
    with worker_process():
        wait_until(lambda: dashboard.jobs("failed") == [queues.run_job_id(run_id)], "the run to be failed")
    run, job = Run.get_by_id(run_id), queues.queue().fetch_job(queues.run_job_id(run_id))
    assert (run.state, job.latest_result().exc_string) == ("failed", run.error)
    assert run.error.startswith("failed after 6 attempts")
    assert_settled(dashboard, redis)


def test_deleting_jobs_is_refused_for_unfinished_runs(dashboard, cast, redis):
    runs = [write(cast.subscriber, cast.general, f"gold {number}")[1] for number in range(3)]
    queues.enqueue([WorkItem(run_id) for run_id in runs])
    unfinished, succeeded, failed = map(queues.run_job_id, runs)
    set_succeeded = "UPDATE run SET state = 'succeeded', finished_at = now(), sweep_after = NULL WHERE id = %(id)s"
    execute(set_succeeded, {"id": runs[1]})
    execute("UPDATE run SET state = 'failed', error = 'no', finished_at = now() WHERE id = %(id)s", {"id": runs[2]})
    refused = dashboard.post(f"job/{unfinished}/delete")
    assert (refused.status_code, f"Run {runs[0]} is unfinished" in refused.text) == (409, True)
    assert dashboard.post(f"job/{succeeded}/delete").status_code == 200
    assert dashboard.post("queue/notifications/queued/empty").status_code == 409
    assert dashboard.jobs("queued") == [unfinished], "the others are deleted, and the unfinished run keeps its job"
    assert not redis.exists(f"rq:job:{failed}")
