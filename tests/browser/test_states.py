"""The page says what happens to a message: retries, failures, and notifications that are delayed."""

import re
from contextlib import ExitStack

import pytest
from playwright.sync_api import expect

from belfry.core.db import execute
from belfry.queue import queues
from models import Run
from tests.browser.browsing import address, message, wait_until_live
from tests.fanout_helpers import fault_on_insert
from tests.processes import worker_process


def test_a_retry_is_announced_and_its_success_shown(visit, cast, post):
    number = post("gold breaks out")
    page = visit(address(cast, cast.general), cast.subscriber)
    message(page, number).get_by_role("button", name="Recipients").click()
    state = page.locator("#run-state")
    expect(state).to_have_text("Waiting …")
    with ExitStack() as fault:
        fault.enter_context(fault_on_insert("RAISE 'the disk is full';"))
        with worker_process(RETRY_BASE_DELAY_SECONDS="4"):
            expect(state).to_have_text(re.compile(r"Attempt 1 failed: the database cannot store notifications\."))
            expect(state).to_have_text(re.compile(r"Next attempt (in \d+ s|soon)\."))
            fault.close()
            expect(state).to_have_text(re.compile(r"^\d of \d members were notified\.$"))


def test_a_failure_says_why_and_an_admin_retries_it(visit, worker, cast, post, redis):
    number = post("gold breaks out")
    redis.flushdb()
    execute(
        "UPDATE run SET state = 'failed', attempts = 6, attempts_left = 0, finished_at = now(), sweep_after = NULL,"
        " error = 'OperationalError: connection to server at \"10.0.0.7\" failed'"
    )
    author = visit(address(cast, cast.general), cast.subscriber)
    message(author, number).get_by_role("button", name="Recipients").click()
    expect(author.locator("#run-state")).to_contain_text("Failed after 6 attempts: the database is unavailable.")
    expect(author.get_by_role("button", name="Retry")).to_have_count(0)
    assert "10.0.0.7" not in author.content()
    reader = visit(address(cast, cast.general), cast.vip)
    message(reader, number).get_by_role("button", name="Why?").click()
    expect(reader.locator("#why-answer")).to_contain_text("You are not notified yet: the fan-out failed.")
    admin = visit(address(cast, cast.general), cast.admin)
    message(admin, number).get_by_role("button", name="Recipients").click()
    admin.get_by_role("button", name="Retry").click()
    expect(admin.locator("#run-state")).to_have_text(re.compile(r"^\d of \d members were notified\.$"))
    expect(admin.get_by_role("button", name="Retry")).to_be_hidden()
    assert Run.get().state == "succeeded"


@pytest.mark.parametrize("stuck", [False, True], ids=["without a worker", "with a stuck worker"])
def test_delayed_notifications_are_said_and_messages_still_arrive(visit, cast, post, stuck):
    page = visit(address(cast, cast.general), cast.vip)
    wait_until_live(page)
    number = post("gold breaks out")
    execute("UPDATE run SET created_at = now() - interval '11 seconds'")
    if stuck:
        execute("UPDATE run SET state = 'running', attempts = 1, attempts_left = 5")
    connection = page.locator("#connection")
    expect(connection).to_have_text("Notifications are delayed")
    expect(message(page, number)).to_be_visible()
    execute("UPDATE run SET state = 'queued', attempts = 0, attempts_left = 6")
    queues.enqueue_run(Run.get().id)
    with worker_process():
        expect(connection).to_have_text("Live")
