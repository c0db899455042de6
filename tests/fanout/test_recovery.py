"""Recovery with real processes that die, hang or lose Redis: each member is notified once, and work continues."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

import jobs
from belfry.core.db import IDLE_IN_TRANSACTION_SECONDS, execute, fetch_one
from belfry.fanout import claims, recovery
from belfry.fanout.claims import WorkItem
from belfry.integrity.verification import verify
from belfry.queue import queues
from belfry.servers import servers
from belfry.worker import maintenance
from models import Notification, Run, Server
from tests.fanout_helpers import add_members, notified, process_next, remaining_work_items, run_of
from tests.fanout_helpers import post as write
from tests.people import Person
from tests.processes import (
    arm_failpoint,
    open_redis_proxy,
    slow_database,
    wait_until,
    web_process,
    worker_process,
    worker_with_failpoints,
)
from tests.worker.test_worker import post, state_of
from tools.chaos.process_under_test import KILL_WITH_PARENT, STOP

pytestmark = pytest.mark.slow

RECOVERY = 30.0  # seconds, as docs/reliability.md promises


@pytest.fixture
def doomed(tmp_path: Path) -> Path:
    """The directory in which `arm_failpoint` arms a failpoint."""
    (tmp_path / "armed").mkdir()
    return tmp_path


def wait_for_success(run_id: int) -> None:
    wait_until(lambda: state_of(run_id) == "succeeded", f"run {run_id} to succeed", RECOVERY)
    assert verify() == []


def enqueue(author: Person, channel_id: int, content: str = "gold breaks out") -> tuple[int, int]:
    """Post a message and enqueue its run; the ids of both."""
    message_id, run_id = write(author, channel_id, content)
    assert queues.enqueue_run(run_id)
    return message_id, run_id


@contextlib.contextmanager
def two_workers(doomed: Path, **environment: str) -> Iterator[tuple[Any, Any]]:
    """Run a worker that a failpoint kills, and one that continues."""
    with worker_with_failpoints(doomed, **environment) as first, worker_process(**environment) as second:
        yield first, second


# Killed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", ["worker.dequeued", "run.claimed", "run.locked", "run.counted", "run.committed", "job.done"]
)
def test_no_notification_is_lost_when_a_worker_is_killed_during_a_job(cast, doomed, point):
    with worker_with_failpoints(doomed) as first:
        is_reached = arm_failpoint(doomed, point, KILL_WITH_PARENT)
        message_id, run_id = enqueue(cast.subscriber, cast.general)
        wait_until(is_reached, "a process to reach the failpoint")
        wait_until(lambda: not first.running(), "the worker to die")
        with worker_process():
            wait_for_success(run_id)
    assert notified(message_id).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id}


def test_another_worker_continues_a_slice_and_repeats_no_other(cast, doomed):
    many = add_members(cast.server_id, 400)
    with worker_with_failpoints(doomed, FANOUT_SLICE_SIZE="50") as first:
        is_reached = arm_failpoint(doomed, "slice.counted", KILL_WITH_PARENT)
        message_id, run_id = enqueue(cast.subscriber, cast.general, "@vera")
        wait_until(is_reached, "a process to reach the failpoint")
        wait_until(lambda: not first.running(), "the worker to die")
        assert run_of(run_id)["members_processed"] < 405
        with worker_process(FANOUT_SLICE_SIZE="50"):
            wait_for_success(run_id)
    assert notified(message_id).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id, *many}
    assert (run_of(run_id)["members_processed"], run_of(run_id)["attempts"]) == (405, 2)


def test_a_run_that_ends_every_attempt_fails_and_delays_no_other_run(api, cast):
    """Each attempt ends its own database session, so that no failure is recorded, as when a process is killed."""
    message_id, poison = write(cast.subscriber, cast.general, "poison")
    execute(
        "CREATE FUNCTION test_poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.message_id = {message_id} THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER test_poison BEFORE INSERT ON notification FOR EACH ROW EXECUTE FUNCTION test_poison()"
    )
    try:
        with worker_process():
            queues.enqueue_run(poison)
            other, healthy = enqueue(cast.subscriber, cast.general)
            wait_for_success(healthy)
            assert len(notified(other)) == 3
            wait_until(lambda: state_of(poison) == "failed", "the poisoned run to fail", 120)
            failed = api(cast.admin).get("/api/runs?state=failed").get_json()["items"]
            assert [run["id"] for run in failed] == [poison]
            assert failed[0]["error"].startswith("failed after 6 attempts")
    finally:
        execute("DROP FUNCTION test_poison CASCADE")
    queues.enqueue(recovery.retry_failed([poison]))
    with worker_process():
        wait_for_success(poison)
    assert len(notified(message_id)) == 3


# Hanging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["run.claimed", "run.locked", "run.counted"])
def test_a_worker_that_hangs_is_overtaken_and_writes_nothing_later(cast, doomed, point):
    with two_workers(doomed) as (hanging, _):
        arm_failpoint(doomed, point, STOP)
        # Either worker may get a job; post until the doomed one gets one.
        message_id = run_id = 0

        def post_until_a_worker_hangs() -> bool:
            nonlocal message_id, run_id
            message_id, run_id = enqueue(cast.subscriber, cast.general)
            time.sleep(0.3)
            return (doomed / "hits").exists()

        wait_until(post_until_a_worker_hangs, "the doomed worker to reach the failpoint")
        horse, stuck = map(int, (doomed / "hits").read_text().split()[1:3])
        try:
            wait_for_success(stuck)
            assert Run.get_by_id(stuck).attempts == 2
        finally:
            os.kill(horse, signal.SIGCONT)
        before = contents_of(stuck)
        overtaken = re.compile(rf"run {stuck}: attempt 1 was overtaken|a batch of 1 runs was interrupted")
        wait_until(lambda: overtaken.search(hanging.log()), "the hanging worker to end its attempt")
        assert contents_of(stuck) == before
        assert hanging.running()
        wait_for_success(run_id)
    assert len(notified(message_id)) == 3


def contents_of(run_id: int) -> tuple[Any, int]:
    return run_of(run_id), Notification.select().count()


def test_an_edit_whose_process_hangs_delays_the_fan_out_only_briefly(cast, in_another_session):
    message_id, run_id = write(cast.subscriber, cast.general)
    # As `db.transaction` and `claims.lock_message_exclusive` do.
    statement = (
        f"SELECT set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_SECONDS}s', true);"
        f"SELECT pg_advisory_xact_lock({claims.MESSAGE_LOCK}, {message_id});"
        f"UPDATE message SET content = 'edited' WHERE id = {message_id}"
    )
    timed_out = contextlib.suppress(psycopg.errors.IdleInTransactionSessionTimeout)
    with worker_process(), timed_out, in_another_session(statement):
        queues.enqueue_run(run_id)
        wait_until(lambda: state_of(run_id) == "running", "a worker to start the run")
        time.sleep(1)
        assert state_of(run_id) == "running", "the run waits for the edit"
        wait_for_success(run_id)
    assert state_of(run_id) == "succeeded"
    assert fetch_one("SELECT content FROM message") == {"content": "gold breaks out"}


# Slow -----------------------------------------------------------------------------------------------------


def test_slow_statements_do_not_fail_a_run(cast):
    """Locking takes longer than the longest sweep interval, and each statement longer than the idle time-out."""
    with (
        slow_database(0.3) as url,
        worker_process(through=("tests.faults.short_leases",), DATABASE_URL=url) as first,
        worker_process(through=("tests.faults.short_leases",), DATABASE_URL=url) as second,
    ):
        message_id, run_id = enqueue(cast.subscriber, cast.general)
        wait_until(lambda: state_of(run_id) in ("succeeded", "failed"), "the run to end", 120)
        assert first.running()
        assert second.running()
    assert (run_of(run_id)["state"], len(notified(message_id))) == ("succeeded", 3)
    assert run_of(run_id)["attempts"] == 1
    assert verify() == []


# Redis is unavailable ---------------------------------------------------------------------------------


def test_posts_are_accepted_while_redis_is_unavailable_and_notify_users_later(cast, redis):
    with open_redis_proxy(os.environ["REDIS_URL"]) as proxy:
        behind = {"REDIS_URL": proxy.url}
        with web_process(**behind) as address, worker_process(**behind), worker_process(**behind):
            proxy.cut_connections()
            with ThreadPoolExecutor(4) as authors:
                posted = list(
                    authors.map(
                        lambda number: post(address, cast.subscriber.token, cast.general, f"gold {number}"), range(100)
                    )
                )
            assert {status for status, _ in posted} == {201}
            assert {message["run"]["state"] for _, message in posted} == {"pending"}
            redis.flushdb()
            proxy.accept_connections()
            for _, message in posted:
                wait_until(lambda run=message["run"]: state_of(run["id"]) == "succeeded", "the runs to succeed", 60)
    everybody = {cast.admin.id, cast.moderator.id, cast.vip.id}
    assert all(notified(message["id"]).keys() == everybody for _, message in posted)
    assert Notification.select().count() == 300
    assert verify() == []


def test_queued_runs_are_found_again_after_redis_lost_its_data(cast, redis):
    runs = [enqueue(cast.subscriber, cast.general) for _ in range(5)]
    with worker_process() as process:
        wait_until(lambda: Run.select().where(Run.state == "succeeded").count() > 0, "the first run to succeed")
        redis.flushdb()
        runs += [enqueue(cast.subscriber, cast.general) for _ in range(5)]
        redis.flushdb()
        for _, run_id in runs:
            wait_for_success(run_id)
        assert process.running()
    assert Notification.select().count() == 30


def test_workers_with_wrong_clocks_use_the_clock_of_the_database(cast, doomed):
    add_members(cast.server_id, 100)
    ahead = ("tests.faults.clock", "60")
    behind = ("tests.faults.clock", "-60", "tools.chaos.process_under_test", str(doomed))
    with (
        worker_process(through=ahead, FANOUT_SLICE_SIZE="10") as first,
        worker_process(through=behind, FANOUT_SLICE_SIZE="10") as second,
    ):
        is_reached = arm_failpoint(doomed, "slice.notified", KILL_WITH_PARENT)
        runs = [enqueue(cast.subscriber, cast.general, "@vera")[1] for _ in range(4)]
        wait_until(is_reached, "a process to reach the failpoint")
        for run_id in runs:
            wait_for_success(run_id)
        assert first.running()
        assert not second.running()
    assert all(run_of(run_id)["members_processed"] == 105 for run_id in runs)
    off = "finished_at NOT BETWEEN created_at AND clock_timestamp() OR created_at < now() - interval '1 hour'"
    assert fetch_one(f"SELECT count(*) AS off FROM run WHERE {off}") == {"off": 0}


# Queues ---------------------------------------------------------------------------------------------------


def test_several_workers_share_a_fan_out_and_a_small_message_does_not_wait(cast):
    many = add_members(cast.server_id, 3_000)
    server = Server.create(name="Elsewhere")
    elsewhere = servers.create_channel(server.id, "general", private=False, posting="members").id
    for person in (cast.subscriber, cast.vip):
        servers.put_member(server.id, person.id, [])
    with worker_process(FANOUT_SLICE_SIZE="50") as first, worker_process(FANOUT_SLICE_SIZE="50") as second:
        large_message, large = enqueue(cast.subscriber, cast.general)
        wait_until(lambda: run_of(large)["members_processed"] > 200, "the fan-out to be in progress")
        small_message, small = enqueue(cast.subscriber, elsewhere, "@vera")
        wait_until(lambda: state_of(small) == "succeeded", "the small run to succeed")
        assert run_of(large)["members_processed"] < 3_005, "the small run succeeds during the large one"
        wait_for_success(large)
        for worker in (first, second):
            assert len({line["job_id"] for line in worker.lines() if line.get("run_id") == large}) > 5
    assert notified(small_message) == {cast.vip.id: "mention"}
    assert len(notified(large_message)) == len(many) + 3
    assert verify() == []


def test_after_sigterm_during_a_fan_out_another_worker_continues(cast):
    add_members(cast.server_id, 3_000)
    with worker_process(FANOUT_SLICE_SIZE="50") as first:
        message_id, run_id = enqueue(cast.subscriber, cast.general)
        wait_until(lambda: run_of(run_id)["members_processed"] > 200, "the fan-out to be in progress")
        for child in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGTERM)
        assert first.wait(10) == 0
    stopped = run_of(run_id)
    assert (stopped["state"], stopped["members_processed"] % 50, stopped["error"]) == ("running", 0, None)
    assert stopped["members_processed"] < 3_005
    with worker_process(FANOUT_SLICE_SIZE="50"):
        wait_for_success(run_id)
    assert (run_of(run_id)["members_processed"], run_of(run_id)["attempts"]) == (3_005, 1), "no slice is repeated"
    assert len(notified(message_id)) == 3_003


# A full queue ---------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_runs_are_processed_in_the_order_of_posting(
    cast, run_jobs, override
):
    override(max_batch_runs=0)
    override(max_queue_length=5)
    runs = [write(cast.subscriber, cast.general)[1] for _ in range(12)]
    enqueued = [queues.enqueue_run(run_id) for run_id in runs]
    assert enqueued == [True] * 5 + [False] * 7
    assert [state_of(run_id) for run_id in runs] == ["queued"] * 5 + ["pending"] * 7
    assert not queues.enqueue_run(runs[-1])
    assert queues.queue().count == 5
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    assert maintenance.sweep() == 0, "the queue is full, and its runs are not lost"

    for done in (1, 2):
        jobs.notify(runs[done - 1])
        queues.queue().remove(queues.queue().get_job_ids(0, 1)[0])
    assert maintenance.sweep() == 2
    assert [job.args[0] for job in queues.queue().jobs] == runs[2:7], "pending runs are enqueued last"
    while queues.queue().count:
        run_jobs()
        maintenance.sweep()
    assert {state_of(run_id) for run_id in runs} == {"succeeded"}
    assert verify() == []


def test_a_message_posted_while_the_queue_is_full_is_pending(api, cast, override):
    override(max_queue_length=1)
    body = {"channel_id": cast.general, "content": "gold"}
    states = []
    for key in "aba":
        message = api(cast.subscriber).post("/api/messages", json=body, headers={"Idempotency-Key": key}).get_json()
        states.append((message["run"]["state"], state_of(message["run"]["id"])))
    assert states == [("queued", "queued"), ("pending", "pending"), ("queued", "queued")]
    assert queues.queue().count == 1


def test_a_job_lost_from_a_long_queue_is_found_and_processed_first(
    cast, run_jobs, override
):
    override(max_batch_runs=0)
    runs = [enqueue(cast.subscriber, cast.general)[1] for _ in range(30)]
    lost = queues.queue().get_job_ids(3, 1)[0]
    for removed in (*queues.queue().get_job_ids(0, 3), lost):
        queues.queue().remove(removed)
    for run_id in runs[:3]:
        jobs.notify(run_id)
    execute("UPDATE run SET sweep_after = now() - interval '1 minute' WHERE sweep_after IS NOT NULL")
    assert maintenance.sweep() == 1
    waiting = [job.args[0] for job in queues.queue().jobs]
    assert waiting == runs[3:], "it is enqueued again before later runs, and no run is enqueued twice"
    assert run_jobs() == 0
    assert {state_of(run_id) for run_id in runs} == {"succeeded"}


def test_a_slice_lost_from_a_long_queue_is_found(cast, set_slice_size, run_jobs):
    add_members(cast.server_id, 40)
    set_slice_size(5)
    _, run_id = write(cast.subscriber, cast.general)
    process_next(run_id)
    items = remaining_work_items(run_id)
    queues.enqueue(items[4:])
    execute("UPDATE slice SET sweep_after = now() - interval '1 minute'")
    assert maintenance.sweep() == 4
    assert [WorkItem(*job.args) for job in queues.queue(queues.BULK).jobs] == items
    assert run_jobs() == 0
    wait_for_success(run_id)


def test_a_foreign_job_at_the_head_of_the_queue_does_not_hide_queued_runs(cast, redis):
    enqueue(cast.subscriber, cast.general)
    for entry in (b"no-such-job", b"another"):
        redis.lpush(queues.queue().key, entry)
    redis.hset("rq:job:another", mapping={"data": b"garbage", "created_at": "yesterday", "origin": "notifications"})
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    assert maintenance.sweep() == 0


@pytest.mark.parametrize("argument", [-1, 2**63, "seven", None, float("inf")])
def test_a_hostile_job_at_the_head_of_the_queue_does_not_hide_queued_runs(cast, argument):
    queues.queue().enqueue("jobs.notify", argument)
    enqueue(cast.subscriber, cast.general)
    execute("UPDATE run SET sweep_after = now() - interval '1 minute'")
    assert maintenance.sweep() == 0
