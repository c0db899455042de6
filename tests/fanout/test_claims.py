"""Claims, attempts and their tokens, and the work items that the sweeper finds."""

import threading
from collections.abc import Callable, Iterator

import pytest
from peewee import OperationalError

import jobs
from belfry.core import failpoints
from belfry.core.db import IDLE_IN_TRANSACTION_SECONDS, db, execute, fetch_one
from belfry.core.redis import redis_connection
from belfry.fanout import claims, fanout, recovery
from belfry.fanout.claims import WorkItem
from belfry.integrity.verification import verify
from belfry.queue import queues
from belfry.worker import cleanup, maintenance
from models import MAX_ATTEMPTS
from tests.fanout_helpers import (
    PLAIN_MESSAGE_STATS,
    Killed,
    add_members,
    claim_and_process,
    fail_at_work_item,
    fault_on_insert,
    post,
    process_next,
    remaining_work_items,
    run_of,
    run_to_end,
    statements,
    stats,
)
from tests.processes import wait_until


@pytest.fixture
def claim_and_die(at_failpoint) -> Callable[[WorkItem], None]:
    """Claim a work item and die before the commit."""

    def die(item: WorkItem) -> None:
        fail_at_work_item(at_failpoint, 1, Killed())
        with pytest.raises(Killed):
            claim_and_process(item)

    return die


def make_all_overdue() -> None:
    """Make every unfinished work item overdue."""
    execute("UPDATE run SET sweep_after = now() - interval '1 second' WHERE sweep_after IS NOT NULL")
    execute("UPDATE slice SET sweep_after = now() - interval '1 second' WHERE sweep_after IS NOT NULL")


def overdue() -> list[WorkItem]:
    """The work items that the sweeper would enqueue while the queues are empty."""
    return recovery.queue_pending_runs(1000) + recovery.requeue_lost_runs(None) + recovery.requeue_lost_slices(None)


@pytest.fixture(autouse=True)
def _lock_timeout(_clean: None) -> Iterator[None]:
    """Make a test that waits for a lock fail instead of hang."""
    execute("SET lock_timeout = '5s'")
    yield
    execute("RESET lock_timeout")


@pytest.fixture
def run(cast) -> int:
    """A run with a small audience that no worker has claimed."""
    return post(cast.subscriber, cast.general)[1]


@pytest.fixture
def large_run(cast, set_slice_size) -> int:
    """A run with 25 members whose five slices are planned."""
    add_members(cast.server_id, 20)
    set_slice_size(5)
    _, run_id = post(cast.subscriber, cast.general)
    process_next(run_id)
    return run_id


# Attempts -------------------------------------------------------------------------------------------------


def test_an_overtaken_attempt_writes_nothing(run):
    late = claims.claim(WorkItem(run))
    make_all_overdue()
    assert overdue() == [WorkItem(run)]
    in_time = claims.claim(WorkItem(run))
    assert fanout.process_work_item(WorkItem(run), late) is None
    claims.record_failure(WorkItem(run), late, "too late", None)
    assert (run_of(run)["state"], run_of(run)["members_processed"], run_of(run)["error"]) == ("running", 0, None)
    fanout.process_work_item(WorkItem(run), in_time)
    assert fanout.process_work_item(WorkItem(run), late) is None
    assert (run_of(run)["state"], stats(run)) == ("succeeded", PLAIN_MESSAGE_STATS)


def test_an_overtaken_attempt_of_a_slice_writes_nothing(large_run):
    item = remaining_work_items(large_run)[2]
    late, in_time = claims.claim(item), claims.claim(item)
    assert fanout.process_work_item(item, late) is None
    claims.record_failure(item, late, "too late", None)
    assert (run_of(large_run)["members_processed"], run_of(large_run)["error"]) == (0, None)
    fanout.process_work_item(item, in_time)
    assert run_of(large_run)["members_processed"] == 5
    assert fanout.process_work_item(item, late) is None
    assert run_of(large_run)["members_processed"] == 5


def test_an_attempt_that_was_swept_before_it_locked_the_run_writes_nothing(run):
    attempt = claims.claim(WorkItem(run))
    make_all_overdue()
    assert overdue() == [WorkItem(run)]
    fanout.process_work_item(WorkItem(run), attempt)
    assert run_of(run)["state"] == "queued", "the job that the sweeper enqueues processes it"
    assert run_to_end(run) == "succeeded"


def test_a_failure_is_shown_on_the_run_while_it_is_retried(run):
    attempt = claims.claim(WorkItem(run))
    claims.record_failure(WorkItem(run), attempt, "OperationalError: the disk is full", 30)
    failed = run_of(run)
    assert (failed["state"], failed["error"], failed["finished_at"]) == (
        "queued", "OperationalError: the disk is full", None,
    )  # fmt: skip
    assert overdue() == [], "the sweeper waits for the scheduled retry"
    assert run_to_end(run) == "succeeded"
    assert run_of(run)["error"] is None


def test_a_failure_of_a_slice_is_shown_on_the_run_while_it_is_retried(large_run):
    item = remaining_work_items(large_run)[1]
    claims.record_failure(item, claims.claim(item), "OperationalError: the disk is full", 30)
    assert (run_of(large_run)["state"], run_of(large_run)["error"]) == ("running", "OperationalError: the disk is full")
    assert overdue() == []
    assert run_to_end(large_run) == "succeeded"
    assert (run_of(large_run)["error"], run_of(large_run)["attempts"]) == (None, 2)


def test_a_failure_without_attempts_left_is_final_and_keeps_its_error(run):
    for number in range(1, MAX_ATTEMPTS + 1):
        claims.record_failure(WorkItem(run), claims.claim(WorkItem(run)), f"failure {number}", 0)
        assert run_of(run)["state"] == ("failed" if number == MAX_ATTEMPTS else "queued")
    failed = run_of(run)
    assert (failed["error"], failed["attempts"]) == (f"failure {MAX_ATTEMPTS}", MAX_ATTEMPTS)
    assert failed["finished_at"] is not None
    make_all_overdue()
    assert overdue() == []
    assert verify() == [f"run {run} failed: failure {MAX_ATTEMPTS}"]


def test_a_slice_that_keeps_failing_fails_the_run_and_delays_no_other_slice(large_run):
    poison, *others = remaining_work_items(large_run)
    for number in range(MAX_ATTEMPTS):
        claims.record_failure(poison, claims.claim(poison), f"failure {number + 1}", 0)
    assert (run_of(large_run)["state"], run_of(large_run)["error"]) == ("failed", f"failure {MAX_ATTEMPTS}")
    for item in others:
        claim_and_process(item)
    run = run_of(large_run)
    assert (run["state"], run["error"]) == ("failed", f"failure {MAX_ATTEMPTS}")
    assert (run["members_processed"], run["members_total"]) == (20, 25)
    make_all_overdue()
    assert overdue() == [], "there is no automatic retry"

    assert recovery.retry_failed([large_run]) == [poison]
    assert (run_of(large_run)["state"], run_of(large_run)["error"]) == ("running", None)
    claim_and_process(poison)
    run = run_of(large_run)
    assert (run["state"], run["members_processed"], run["error"]) == ("succeeded", 25, None)
    assert verify() == []


def test_each_slice_has_its_own_attempts(large_run, claim_and_die):
    for item in remaining_work_items(large_run):
        for _ in range(MAX_ATTEMPTS - 1):
            claim_and_die(item)
        claim_and_process(item)
    assert (run_of(large_run)["state"], stats(large_run)["audience"]) == ("succeeded", 25)
    assert run_of(large_run)["attempts"] == 1 + 5 * (MAX_ATTEMPTS - 1)


# Failed runs ----------------------------------------------------------------------------------------------


def test_failed_runs_are_retried_with_their_progress_and_all_attempts(cast, large_run, claim_and_die):
    _, small_run = post(cast.subscriber, cast.general)
    claim_and_process(remaining_work_items(large_run)[0])
    failing = remaining_work_items(large_run)[1]
    for item in (failing, WorkItem(small_run)):
        for _ in range(MAX_ATTEMPTS):
            claims.record_failure(item, claims.claim(item), "why", 0)
    assert recovery.retry_failed([large_run]) == [failing]
    assert run_of(large_run)["members_processed"] == 5
    assert run_of(small_run)["state"] == "failed"
    for _ in range(MAX_ATTEMPTS - 1):
        claim_and_die(failing)
    assert run_to_end(large_run) == "succeeded"
    assert recovery.retry_failed() == [WorkItem(small_run)]
    assert run_of(small_run)["state"] == "queued"
    assert recovery.retry_failed() == []


def test_a_failed_run_is_not_retried_automatically(cast, large_run):
    _, small_run = post(cast.subscriber, cast.general)
    failing = remaining_work_items(large_run)[0]
    for item in (failing, WorkItem(small_run)):
        for _ in range(MAX_ATTEMPTS):
            claims.record_failure(item, claims.claim(item), "why", 0)
        assert claims.claim(item) is None, "even if RQ still has a job for it"
        assert (run_of(item.run_id)["state"], run_of(item.run_id)["error"]) == ("failed", "why")


# Work items that the sweeper finds ------------------------------------------------------------------------


def test_a_run_whose_attempts_all_end_without_an_error_fails(run, run_jobs, claim_and_die):
    for _ in range(MAX_ATTEMPTS):
        claim_and_die(WorkItem(run))
    assert len(recovery.fail_exhausted()) == 0, "its last attempt has just started"
    make_all_overdue()
    assert maintenance.sweep() == 0
    failed = run_of(run)
    assert (failed["state"], failed["attempts"]) == ("failed", MAX_ATTEMPTS)
    assert failed["error"].startswith(f"failed after {MAX_ATTEMPTS} attempts")
    assert failed["finished_at"] is not None
    assert stats(run)["inserted"] == 0


def test_a_slice_whose_attempts_all_end_without_an_error_fails_its_run(large_run, claim_and_die):
    item = remaining_work_items(large_run)[3]
    for _ in range(MAX_ATTEMPTS):
        claim_and_die(item)
    make_all_overdue()
    assert len(recovery.fail_exhausted()) == 1
    assert run_of(large_run)["state"] == "failed"
    assert run_of(large_run)["error"].startswith(f"failed after {MAX_ATTEMPTS} attempts")
    assert item not in overdue()


def test_the_last_attempt_is_not_failed_while_it_is_locked(run, in_another_session, claim_and_die):
    for _ in range(MAX_ATTEMPTS - 1):
        claim_and_die(WorkItem(run))
    claims.claim(WorkItem(run))
    make_all_overdue()
    with in_another_session("SELECT FROM run FOR NO KEY UPDATE"):
        assert len(recovery.fail_exhausted()) == 0
    assert len(recovery.fail_exhausted()) == 1


@pytest.mark.parametrize("state", ["pending", "queued", "running"])
def test_an_overdue_run_is_found_once_and_only_while_it_is_unlocked(run, in_another_session, state):
    execute(f"UPDATE run SET state = '{state}'")
    assert overdue() == []
    make_all_overdue()
    with in_another_session("SELECT FROM run FOR NO KEY UPDATE"):
        assert overdue() == [], "a locked run is skipped without waiting"
    assert overdue() == [WorkItem(run)]
    assert run_of(run)["state"] == "queued"
    assert overdue() == [], "a second sweeper finds nothing"


def test_an_overdue_slice_is_found_once_and_only_while_it_is_unlocked(large_run, in_another_session):
    items = remaining_work_items(large_run)
    assert overdue() == []
    make_all_overdue()
    with in_another_session(f"SELECT FROM slice WHERE after_user_id = {items[2].after_user_id} FOR NO KEY UPDATE"):
        assert overdue() == items[:2] + items[3:]
        assert overdue() == []
    assert overdue() == [items[2]]


def test_a_run_that_waits_in_the_queue_is_not_overdue(cast):
    waiting = [post(cast.subscriber, cast.general)[1] for _ in range(4)]
    make_all_overdue()
    assert recovery.requeue_lost_runs(WorkItem(waiting[2])) == [WorkItem(waiting[0]), WorkItem(waiting[1])]
    assert recovery.requeue_lost_runs(WorkItem(waiting[2])) == []
    assert recovery.requeue_lost_runs(None) == [WorkItem(waiting[2]), WorkItem(waiting[3])]


def test_a_slice_that_waits_in_the_queue_is_not_overdue(large_run):
    items = remaining_work_items(large_run)
    make_all_overdue()
    assert recovery.requeue_lost_slices(WorkItem(large_run - 1, items[-1].after_user_id)) == []
    assert recovery.requeue_lost_slices(items[2]) == items[:2]
    assert recovery.requeue_lost_slices(WorkItem(large_run + 1, 0)) == items[2:]


def test_pending_runs_wait_for_room_in_the_queue_and_lost_runs_do_not(cast):
    pending, lost = (post(cast.subscriber, cast.general)[1] for _ in range(2))
    recovery.mark_pending([pending])
    claims.claim(WorkItem(lost))
    make_all_overdue()
    assert recovery.queue_pending_runs(0) == recovery.queue_pending_runs(-3) == []
    assert recovery.requeue_lost_runs(WorkItem(1)) == [WorkItem(lost)]
    assert recovery.queue_pending_runs(1) == [WorkItem(pending)]


def test_only_a_queued_run_can_be_marked_pending(run):
    claims.claim(WorkItem(run))
    recovery.mark_pending([run])
    assert run_of(run)["state"] == "running"


def test_a_claim_of_a_locked_work_item_does_not_wait(run, large_run, in_another_session):
    with in_another_session("SELECT FROM run FOR NO KEY UPDATE"):
        assert claims.claim(WorkItem(run)) is None
    with in_another_session("SELECT FROM slice FOR NO KEY UPDATE"):
        assert claims.claim(remaining_work_items(large_run)[0]) is None
    assert claims.claim(WorkItem(run)) == 1


def test_one_worker_sweeps_at_a_time(run, in_another_session):
    make_all_overdue()
    queues.queue().empty()
    with in_another_session(f"SELECT pg_advisory_xact_lock({maintenance.SWEEP_LOCK})"):
        assert maintenance.sweep() == 0
    assert maintenance.sweep() == 1


def test_leases_use_only_the_clock_of_the_database(run, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)
    claims.claim(WorkItem(run))
    found = fetch_one("SELECT sweep_after - now() AS lease FROM run")
    assert 0 < found["lease"].total_seconds() <= 2


def test_the_sweep_interval_grows_with_each_attempt(run):
    leases_given = []
    for _ in range(MAX_ATTEMPTS):
        claims.claim(WorkItem(run))
        found = fetch_one("SELECT round(extract(epoch FROM sweep_after - now())) AS seconds FROM run")
        leases_given.append(found["seconds"])
    assert leases_given == [2, 4, 8, 15, 15, 15]
    assert claims.claim(WorkItem(run)) is None


def test_a_work_item_that_waits_for_its_message_is_not_swept(run, in_another_session):
    """For example, an edit holds the lock while it waits for another work item. Waiting must not use up attempts."""
    attempt = claims.claim(WorkItem(run))
    outcome = []

    def process() -> None:
        with db.connection_context():
            outcome.append(fanout.process_work_item(WorkItem(run), attempt))

    thread = threading.Thread(target=process)
    with in_another_session(f"SELECT pg_advisory_xact_lock({claims.MESSAGE_LOCK}, 1)"):
        thread.start()
        waiting = "SELECT 1 AS yes FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        wait_until(lambda: fetch_one(waiting), "the work item to wait for the message")
        make_unlocked_overdue()
        assert overdue() == []
        assert len(recovery.fail_exhausted()) == 0
        assert claims.claim(WorkItem(run)) is None
    thread.join()
    assert [processed.slices for processed in outcome] == [[]]
    assert run_of(run)["state"] == "succeeded"


def make_unlocked_overdue() -> None:
    """As `make_all_overdue`, for work items that are not locked."""
    execute(
        "UPDATE run SET sweep_after = now() - interval '1 second'"
        " WHERE id IN (SELECT id FROM run FOR NO KEY UPDATE SKIP LOCKED)"
    )


def test_a_work_item_without_attempts_left_is_failed_and_never_enqueued(run, large_run):
    for item in (WorkItem(run), remaining_work_items(large_run)[0]):
        for _ in range(MAX_ATTEMPTS):
            claims.claim(item)
    make_all_overdue()
    assert overdue() == remaining_work_items(large_run)[1:]
    assert len(recovery.fail_exhausted()) == 2
    assert [run_of(run_id)["state"] for run_id in (run, large_run)] == ["failed", "failed"]


def test_a_run_is_not_failed_because_workers_overtake_each_other(run):
    """When each statement takes longer than the sweep interval, every attempt locks too late."""
    for number in range(1, 3 * MAX_ATTEMPTS):
        attempt = claims.claim(WorkItem(run))
        assert attempt == number
        make_all_overdue()
        assert len(recovery.fail_exhausted()) == 0
        assert overdue() == [WorkItem(run)]
        jobs._run(WorkItem(run), attempt, None)
    assert run_to_end(run) == "succeeded"
    assert run_of(run)["attempts"] == 3 * MAX_ATTEMPTS


def test_a_slice_is_not_failed_because_workers_overtake_each_other(large_run):
    item = remaining_work_items(large_run)[1]
    late = claims.claim(item)
    for _ in range(3 * MAX_ATTEMPTS):
        make_all_overdue()
        assert len(recovery.fail_exhausted()) == 0
        attempt = claims.claim(item)
        jobs._run(item, late, None)
        late = attempt
    assert run_to_end(large_run) == "succeeded"


def test_released_attempts_are_limited_and_do_not_revive_a_failed_run(run, large_run):
    small, item = WorkItem(run), remaining_work_items(large_run)[0]
    for one in (small, item):
        claims.release(one)
        for _ in range(MAX_ATTEMPTS):
            claims.claim(one)
        assert claims.claim(one) is None
    make_all_overdue()
    assert len(recovery.fail_exhausted()) == 2
    for one in (small, item):
        claims.release(one)
        assert claims.claim(one) is None
    assert [run_of(run_id)["state"] for run_id in (run, large_run)] == ["failed", "failed"]


def test_nothing_is_requeued_within_the_grace_for_a_slow_database(run, large_run):
    item = remaining_work_items(large_run)[0]
    for one in (WorkItem(run), item):
        for _ in range(MAX_ATTEMPTS):
            claims.claim(one)
    make_all_overdue()
    assert len(recovery.fail_exhausted(grace=60)) == 0
    execute("UPDATE run SET attempts_left = 1 WHERE attempts_left = 0")
    execute("UPDATE slice SET attempts_left = 1 WHERE attempts_left = 0")
    assert (recovery.requeue_lost_runs(None, grace=60), recovery.requeue_lost_slices(None, grace=60)) == ([], [])
    lost = recovery.requeue_lost_runs(None) + recovery.requeue_lost_slices(None)
    assert lost == [WorkItem(run), *remaining_work_items(large_run)]


def test_the_sweeper_waits_for_each_scheduled_retry(cast, run_jobs):
    _, run_id = post(cast.subscriber, cast.general)
    assert queues.enqueue_run(run_id)
    queue = queues.queue()
    for retry in range(MAX_ATTEMPTS - 1):
        with fault_on_insert():
            run_jobs()
        (job_id,) = queue.scheduled_job_registry.get_job_ids()
        intervals = queue.fetch_job(job_id).retry_intervals
        found = fetch_one("SELECT extract(epoch FROM sweep_after - now())::float AS seconds FROM run")
        latest = intervals[retry] + claims.RETRY_GRACE_SECONDS
        assert latest - 2 < found["seconds"] <= latest
        redis = redis_connection()
        redis.zadd(queue.scheduled_job_registry.key, {job_id: 0})  # it is due
        maintenance.sweep()
    with fault_on_insert():
        run_jobs()
    assert (run_of(run_id)["state"], run_of(run_id)["attempts"]) == ("failed", MAX_ATTEMPTS)
    assert len(queue.scheduled_job_registry) == queue.count == 0


def test_a_broken_scheduled_registry_stops_nothing_else(run, redis):
    redis.hset("rq:job:broken", mapping={"created_at": "yesterday", "origin": "notifications"})
    redis.zadd(queues.queue().scheduled_job_registry.key, {"broken": 0})
    make_all_overdue()
    assert maintenance.sweep() == 1


def test_a_retry_transaction_has_an_idle_timeout(run):
    with statements() as seen:
        recovery.retry_failed()
    assert "idle_in_transaction_session_timeout" in seen[0]


# Statements that take too long ----------------------------------------------------------------------------


def test_a_statement_times_out_before_rq_interrupts_its_job(run, override):
    override(job_timeout_seconds=2)
    with fault_on_insert("PERFORM pg_sleep(3);"), pytest.raises(OperationalError, match="statement timeout"):
        claim_and_process(WorkItem(run))
    assert remaining_work_items(run) == [WorkItem(run)], "nothing has changed"
    run_to_end(run)


def test_a_sweep_that_waits_for_a_table_times_out(at_failpoint, monkeypatch):
    seen: list[str] = []

    def record(*_: int) -> int:
        seen.append(fetch_one("SHOW statement_timeout")["statement_timeout"])
        return 0

    at_failpoint("sweep.locked", record)
    for name in cleanup.CLEANUPS:
        monkeypatch.setitem(cleanup.CLEANUPS, name, record)
    maintenance.sweep()
    assert seen == ["20s", *["5s"] * len(cleanup.CLEANUPS)]


# Processes that hang --------------------------------------------------------------------------------------


@pytest.fixture
def idle_limits(monkeypatch) -> dict[str, str]:
    """{failpoint: the idle time-out of the transaction that reached it}."""
    seen: dict[str, str] = {}

    def record(point: str, run_id: int | None, after: int | None) -> None:
        found = fetch_one("SELECT current_setting('idle_in_transaction_session_timeout') AS idle")
        seen[point] = found["idle"]

    monkeypatch.setattr(failpoints, "on_failpoint", record)
    return seen


def test_every_transaction_that_locks_has_an_idle_timeout(api, cast, set_slice_size, run_jobs, idle_limits):
    set_slice_size(3)
    author = api(cast.subscriber)
    body = {"channel_id": cast.general, "content": "gold"}
    message = author.post("/api/messages", json=body, headers={"Idempotency-Key": "k"}).get_json()
    assert run_jobs() == 0
    author.patch(f"/api/messages/{message['id']}", json={"content": "silver"})
    api(cast.vip).post("/api/notifications/read", json={"all": True})
    author.delete(f"/api/messages/{message['id']}")
    maintenance.sweep()
    locking = {"post.written", "run.locked", "run.counted", "slice.locked", "slice.counted", "edit.written",
               "read.written", "delete.written", "sweep.locked", "sweep.marked"}  # fmt: skip
    assert {point: idle_limits[point] for point in locking} == dict.fromkeys(locking, f"{IDLE_IN_TRANSACTION_SECONDS}s")
    assert idle_limits["run.committed"] == "0", "the limit applies only to the transaction"
