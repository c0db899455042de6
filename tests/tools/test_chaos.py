"""A short chaos run, and tests that the audit finds damage."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from belfry.core.db import execute, fetch_all
from belfry.core.failpoints import FAILPOINTS, TEST_POINTS
from belfry.identity import users
from belfry.messages import messages
from tests.fanout_helpers import run_to_end
from tests.oracle import Preference
from tests.processes import web_process
from tools.chaos.__main__ import has_passed
from tools.chaos.audit import audit
from tools.chaos.harness import FailpointHit, ProgressEvent
from tools.chaos.load import History, PostedMessage, Revision
from tools.chaos.process_under_test import KILL, KILL_WITH_PARENT, STOP
from tools.chaos.recovery import RUN_ITSELF, Fault, fault_of, recoveries, work_items_of
from tools.chaos.world import World, make_world
from tools.dev import ROOT
from tools.dev.processes import finish

pytestmark = pytest.mark.slow



@pytest.mark.skipif(
    os.environ.get("BELFRY_TEST_EXTERNAL") == "1",
    reason="it kills its servers, which are embedded ones, and those are not used when DATABASE_URL is set",
)
def test_no_notification_is_lost_or_doubled_while_processes_are_killed():
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.chaos", "--kills", "25", "--minutes", "8", "--seed", "7"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        finish(process)
    result = json.loads(output.splitlines()[-1])
    errors = {name: result[name] for name in ("missing", "duplicates", "wrong_decision", "unresolved_runs")}
    assert set(errors.values()) == {0}, output
    assert process.returncode == 0, output
    assert result["kills"] >= 25, output
    assert result["points_covered"] >= 5, output
    assert result["posts"] > 20, output


def test_the_failpoints_of_the_list_are_those_of_the_code():
    sources = [*ROOT.glob("*.py"), *(ROOT / "belfry").rglob("*.py")]
    reached = set()
    for path in sources:
        for call in re.findall(r"\bfailpoint\(([^()]*)\)", path.read_text()):
            reached |= set(re.findall(r'"([a-z]+\.[a-z]+)"', call))
    assert reached == set(FAILPOINTS | TEST_POINTS)


# Recovery times --------------------------------------------------------------------------------------------


def events(*entries: tuple[float, str, str]) -> list[ProgressEvent]:
    return [ProgressEvent(when, 1, after, point) for when, after, point in entries]


LARGE = events(
    (1, RUN_ITSELF, "run.claimed"), (2, RUN_ITSELF, "run.committed"),
    (3, "0", "slice.claimed"), (4, "50", "slice.claimed"),
    (5, "50", "slice.committed"), (6, "0", "attempt.recorded"), (7, "99", "slice.claimed"), (12, "0", "slice.claimed"),
    (13, "0", "slice.committed"), (40, "99", "slice.claimed"), (41, "99", "slice.committed"),
)  # fmt: skip


def test_a_work_item_has_recovered_with_its_next_event():
    own, *_ = work_items_of(1, 0.0, 41.0, LARGE)
    assert [own.wait(when) for when in (-0.1, 0, 0.5, 1, 1.5, 2, 3)] == [None, 1, 0.5, 1, 0.5, None, None]


def test_slices_are_unfinished_from_the_planning_commit_to_their_own():
    _, zero, fifty, ninety_nine = work_items_of(1, 0.0, 41.0, LARGE)
    assert [fifty.wait(when) for when in (1.9, 2, 4, 4.5, 5)] == [None, 2, 1, 0.5, None]
    assert [zero.wait(when) for when in (3.5, 6, 11, 12, 13)] == [2.5, None, None, 1, None], "it waits for its retry"
    assert [ninety_nine.wait(when) for when in (7, 8, 40)] == [33, 32, 1]


def test_a_fault_without_an_event_has_recovered_with_the_run():
    own, first = work_items_of(1, 0.0, 9.0, events((1, RUN_ITSELF, "run.claimed"), (5, "0", "slice.claimed")))
    assert (own.wait(2), own.wait(5), first.wait(6), first.wait(9)) == (3, None, 3, None)


RUNS = [
    {"id": 1, "created_at": datetime.fromtimestamp(0, UTC), "finished_at": datetime.fromtimestamp(41, UTC)},
    {"id": 2, "created_at": datetime.fromtimestamp(0, UTC), "finished_at": datetime.fromtimestamp(80, UTC)},
    {"id": 3, "created_at": datetime.fromtimestamp(0, UTC), "finished_at": None},
]


def recovered(*faults: Fault) -> list[tuple[float, int, str]]:
    return [found[:3] for found in recoveries(faults, RUNS, LARGE, now=100.0)]


def test_the_recovery_of_a_current_slice_counts_only_its_own_progress():
    assert recovered(Fault(8, "kill", 1, "99")) == [(32, 1, "99")]
    assert recovered(Fault(12.5, "kill", 1, "0")) == [(0.5, 1, "0")]
    assert recovered(Fault(2, "kill", 1)) == [(5, 1, "99")], "the slices continue the run"
    assert recovered(Fault(50, "kill", 1)) == [], "the run was finished"


def test_where_the_current_work_item_is_unknown_the_slowest_recovery_counts():
    assert recovered(Fault(50, "Redis emptied")) == [(50, 3, RUN_ITSELF)]


@pytest.mark.parametrize(
    ("point", "action", "known"),
    [("slice.notified", KILL, True), ("slice.notified", STOP, True), ("slice.notified", KILL_WITH_PARENT, False),
     ("run.enqueued", KILL, False), ("sweep.committed", KILL, False), ("worker.dequeued", KILL, False),
     ("attempt.failed", KILL, True)],
)  # fmt: skip
def test_only_a_killed_work_horse_concerns_one_work_item(point, action, known):
    fault = fault_of(FailpointHit(1.0, 4711, 1, "50", point, action))
    assert (fault.run_id, fault.after) == ((1, "50") if known else (None, RUN_ITSELF))


# Findings of the audit ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with web_process(RATE_LIMIT_DEFAULT="100000 per minute") as address:
        yield address


@pytest.fixture
def chaos_run(monkeypatch, address) -> tuple[World, History, str]:
    """A chaos run with one posted message whose members were notified, and without faults."""
    monkeypatch.setattr("tools.chaos.world.SMALL_MEMBERS", 24)
    monkeypatch.setattr("tools.chaos.world.LARGE_MEMBERS", 10)
    world = make_world()
    return world, History(posted=[create_message(world, "gold")]), address


def create_message(world: World, content: str) -> PostedMessage:
    channel_id, author = world.small.channels["general"], users.find_user(world.admin)
    sent_at = time.time()
    posted = messages.post_message(author, channel_id, content)
    run_to_end(posted.run_id)
    text = {content: Revision(content)}
    return PostedMessage(posted.message["id"], posted.run_id, world.small, channel_id, world.admin, sent_at, text)


def found(chaos_run: tuple[World, History, str]) -> dict[str, int]:
    """The number of findings of each kind."""
    findings = audit(*chaos_run)
    kinds = ("missing", "duplicates", "wrong_decision", "unresolved_runs")
    return {kind: len(getattr(findings, kind)) for kind in kinds if getattr(findings, kind)}


def notified_user(world: World) -> int:
    """A member who was notified and has made no change."""
    notified = fetch_all("SELECT user_id FROM notification ORDER BY 1")
    return next(one["user_id"] for one in notified if one["user_id"] not in world.changing_users)


def test_the_audit_finds_nothing_in_correct_data(chaos_run):
    world, history, _ = chaos_run
    assert found(chaos_run) == {}
    history.posted += [create_message(world, "silver @everyone"), create_message(world, "lead")]
    messages.edit_message(users.find_user(world.admin), 2, "copper")
    revisions = (Revision("silver @everyone", everyone=True), Revision("copper"))
    history.posted[1].revisions = {revision.content: revision for revision in revisions}
    messages.delete_message(users.find_user(world.admin), 3)
    history.posted[2].deleted = True
    for run in fetch_all("SELECT id FROM run ORDER BY id"):
        run_to_end(run["id"])
    findings = audit(*chaos_run)
    assert findings.all() == []
    assert findings.predicted + findings.ambiguous == 2 * len(world.small.members)
    assert 0 < findings.ambiguous <= len(world.changing_users)


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("DELETE FROM notification WHERE user_id = {notified}", {"missing": 1, "wrong_decision": 1}),
        ("UPDATE notification SET reason = 'mention' WHERE user_id = {notified}", {"wrong_decision": 4}),
        (
            "INSERT INTO notification (user_id, message_id, reason)"
            " SELECT {outsider}, message_id, reason FROM notification LIMIT 1",
            {"wrong_decision": 2},
        ),
        ("UPDATE message SET content = 'lead'", {"wrong_decision": 1}),
        ("UPDATE message SET deleted_at = now()", {"wrong_decision": 1}),
        ("UPDATE run SET state = 'failed', error = 'a bug', finished_at = now()", {"unresolved_runs": 1}),
        ("UPDATE run SET decisions = decisions || '{{\"message\": 1}}'", {"wrong_decision": 5}),
    ],
    ids=["missing", "reason", "outsider", "edited", "deleted", "failed", "counted"],
)
def test_the_audit_finds_each_kind_of_damage(chaos_run, fault, kinds):
    world, _, _ = chaos_run
    outsider = users.create_user("outsider").id
    execute(fault.format(notified=notified_user(world), outsider=outsider))
    assert found(chaos_run) == kinds


def test_the_audit_finds_acknowledged_changes_that_were_lost(chaos_run):
    _, history, _ = chaos_run
    (posted,) = history.posted
    posted.revisions["silver"] = Revision("silver")
    assert found(chaos_run) == {"wrong_decision": 1}
    posted.late_revisions.add("gold")
    assert found(chaos_run) == {}, "an edit without a response may be carried out late"
    posted.deleted = True
    assert found(chaos_run) == {"wrong_decision": 1}


def test_the_audit_finds_unknown_doubled_and_lost_messages(chaos_run):
    world, history, _ = chaos_run
    create_message(world, "silver")
    assert found(chaos_run) == {"duplicates": 1}
    history.posted += [history.posted[0]]
    assert found(chaos_run) == {"duplicates": 2}
    history.posted[:] = [replace(history.posted[0], id=99), *history.posted[:1], replace(history.posted[0], id=2)]
    assert found(chaos_run)["missing"] >= 1


def test_the_audit_finds_notifications_that_became_unread(chaos_run):
    world, history, _ = chaos_run
    reader = notified_user(world)
    history.read.append((reader, history.posted[0].id))
    assert found(chaos_run) == {"duplicates": 1}
    execute(f"UPDATE notification SET read_at = now() WHERE user_id = {reader}")
    assert found(chaos_run) == {}
    execute(f"DELETE FROM notification WHERE user_id = {reader}")
    assert found(chaos_run) == {"missing": 2, "wrong_decision": 1}


def test_an_acknowledged_change_changes_the_prediction(chaos_run):
    world, _, _ = chaos_run
    channel_id, user_id = world.small.channels["general"], world.changing_users[0]
    key = (user_id, channel_id)
    with world.change(key, Preference("none")):
        pass
    later = time.time() + 1
    assert world.possible_settings(key, later, later) == [Preference("none")]
    with world.change(key, Preference("all")) as change:
        change.attempts = 2
    with world.change(key, Preference("mentions")):
        pass
    possible = world.possible_settings(key, later, later)
    assert possible == [Preference("all"), Preference("mentions")], "the first attempt may be late"


def test_a_chaos_run_passes_without_findings_and_late_recoveries():
    assert has_passed([], [1.0, 29.9])
    assert has_passed([], [])
    assert not has_passed([], [1.0, 30.0])
    assert not has_passed(["user 1 has no notification of message 2"], [])
