"""The fan-out: slices, crashes, two at once, edits and replays; and what must not grow with the audience."""

import threading
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

import jobs
from belfry import communities, fanout, inbox, messages, runs
from belfry.accounts import set_subscription
from belfry.inbox import dismiss, mark_read, unread_count
from belfry.preferences import set_preference
from belfry.recipients import DECISIONS
from belfry.seeding import seed
from belfry.sql import execute, row, rows
from belfry.trials import send_test
from config import settings
from models import TABLES, TRIES, Notification, db
from tests.people import Person, make_person


class Killed(BaseException):
    """What ends a process without a word; nothing in the product may catch it."""


# What the tests share -------------------------------------------------------------------------------------


def crowd(server_id: int, number: int) -> list[int]:
    """So many more members with an active subscription; their ids."""
    return [
        found["user_id"]
        for found in rows(
            """
            WITH people AS (
                INSERT INTO user_account (username, name)
                SELECT 'crowd-' || n, 'One of many' FROM generate_series(1, %(number)s) AS n
                RETURNING id
            ),
            paying AS (INSERT INTO subscription (user_id, status) SELECT id, 'active' FROM people)
            INSERT INTO member (server_id, user_id) SELECT %(server_id)s, id FROM people RETURNING user_id
            """,
            {"server_id": server_id, "number": number},
        )
    ]


def post(author: Person, channel_id: int, content: str = "gold breaks out") -> tuple[int, int]:
    """A message and its run, which nobody has begun: their ids."""
    posted = messages.post_message(author.user, channel_id, content)
    return posted.message["id"], posted.run_id


def posted_and_told(author: Person, channel_id: int, content: str) -> int:
    message_id, run_id = post(author, channel_id, content)
    assert fanout.execute(run_id) == "succeeded"
    return message_id


def edit(author: Person, message_id: int, content: str) -> dict[str, Any]:
    """Edit, and run what that takes; the statistics of that run."""
    run_id = messages.edit_message(author.user, message_id, content).run_id
    assert fanout.execute(run_id) == "succeeded"
    return stats(run_id)


def stats(run_id: int) -> dict[str, Any]:
    """{"audience", "notified", "added", "withdrawn"} and the decisions that somebody got."""
    counted = runs.statistics(run_of(run_id))
    decisions = counted.pop("decisions")
    assert set(decisions) == set(DECISIONS)
    assert sum(decisions.values()) == counted["audience"]
    return counted | {decision: members for decision, members in decisions.items() if members}


def run_of(run_id: int) -> dict[str, Any]:
    return runs.find_run(run_id)


def told(message_id: int) -> dict[int, str]:
    """Who has a notification of a message, and for what reason."""
    return {found.user_id: found.reason for found in Notification.select().where(Notification.message_id == message_id)}


def unread(person: Person) -> int:
    return int(unread_count(person.user)["unread"])


def read_everything(person: Person) -> None:
    mark_read(person.user)


def contents() -> dict[str, list[str]]:
    """All that is in the database."""
    return {
        name: sorted(found["line"] for found in rows(f'SELECT t::text AS line FROM "{name}" t'))
        for name in (table._meta.table_name for table in TABLES)
    }


@contextmanager
def statements():
    """A list of the SQL statements that are executed meanwhile."""
    seen: list[str] = []
    real = db.execute_sql

    def execute_sql(sql: str, *arguments: Any, **named: Any) -> Any:
        seen.append(sql)
        return real(sql, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "execute_sql", execute_sql)
        yield seen


def is_slice(sql: str) -> bool:
    return "INSERT INTO notification" in sql


@pytest.fixture
def slices_of(monkeypatch) -> Callable[[int], None]:
    """`slices_of(7)`: slices of seven members from here on."""

    def set_slice_members(members: int) -> None:
        small = replace(settings, slice_members=members)
        monkeypatch.setattr(fanout, "settings", small)
        monkeypatch.setattr(runs, "settings", small)

    return set_slice_members


def fail_at_slice(monkeypatch, number: int, error: BaseException) -> None:
    """The so-manyth slice from here on fails after it has written its notifications, before it commits."""
    real, begun = db.execute_sql, [0]

    def execute_sql(sql: str, *arguments: Any, **named: Any) -> Any:
        done = real(sql, *arguments, **named)
        begun[0] += is_slice(sql)
        if is_slice(sql) and begun[0] == number:
            raise error
        return done

    monkeypatch.setattr(db, "execute_sql", execute_sql)


EVERYBODY = {"audience": 5, "notified": 3, "message": 3, "author": 1, "no_subscription": 1, "added": 3, "withdrawn": 0}
"""What a plain message of the subscriber's to general comes to in the cast."""


# Slices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 5, 7, 25, 26, 1000])
def test_everybody_is_counted_once_over_many_slices(cast, slices_of, members):
    many = crowd(cast.server_id, 20)
    slices_of(members)
    message_id, run_id = post(cast.subscriber, cast.general)
    with statements() as seen:
        assert fanout.execute(run_id) == "succeeded"
    assert sum(map(is_slice, seen)) == -(-25 // members)
    assert stats(run_id) == EVERYBODY | {"audience": 25, "notified": 23, "message": 23, "added": 23}
    assert told(message_id).keys() == {cast.admin.id, cast.moderator.id, cast.vip.id, *many}
    run = run_of(run_id)
    assert (run["state"], run["attempts"], run["done"], run["total"]) == ("succeeded", 1, 25, 25)
    assert run["started_at"] <= run["finished_at"]


@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), Killed()], ids=["an error", "a kill"])
def test_a_slice_that_ends_half_way_has_changed_nothing_and_the_next_try_goes_on(cast, slices_of, monkeypatch, error):
    many = crowd(cast.server_id, 20)
    slices_of(10)
    message_id, run_id = post(cast.subscriber, cast.general)
    with monkeypatch.context() as patch:
        fail_at_slice(patch, 2, error)
        with pytest.raises(type(error)):
            fanout.execute(run_id)

    run = run_of(run_id)
    assert (run["state"], run["done"], run["total"]) == ("running", 10, 25)
    assert stats(run_id)["audience"] == 10
    assert len(told(message_id)) == stats(run_id)["notified"] == stats(run_id)["added"]

    with statements() as seen:
        assert fanout.execute(run_id) == "succeeded"
    assert sum(map(is_slice, seen)) == 2, "it goes on where it stopped"
    assert stats(run_id) == EVERYBODY | {"audience": 25, "notified": 23, "message": 23, "added": 23}
    assert len(told(message_id)) == 23
    assert told(message_id).keys() >= set(many)
    assert run_of(run_id)["attempts"] == 2


def test_executed_once_more_a_finished_run_stays_as_it_is(cast):
    _, run_id = post(cast.subscriber, cast.general)
    fanout.execute(run_id)
    before = contents()
    assert fanout.execute(run_id) == "succeeded"
    assert contents() == before


def test_a_run_that_does_not_exist_is_missing(cast):
    assert fanout.execute(4711) == "missing"


def test_two_workers_on_one_run_tell_everybody_once_and_count_everybody_once(cast, slices_of, monkeypatch):
    crowd(cast.server_id, 95)
    slices_of(7)
    message_id, run_id = post(cast.subscriber, cast.general)
    both_have_begun, begin = threading.Barrier(2, timeout=30), fanout._begin

    def begin_together(run_id: int, resumed: bool) -> bool:
        begun = begin(run_id, resumed)
        both_have_begun.wait()
        return begun

    monkeypatch.setattr(fanout, "_begin", begin_together)
    assert in_threads(lambda: fanout.execute(run_id), 2) == ["succeeded", "succeeded"]

    assert stats(run_id) == EVERYBODY | {"audience": 100, "notified": 98, "message": 98, "added": 98}
    assert len(told(message_id)) == Notification.select().count() == 98
    run = run_of(run_id)
    assert (run["state"], run["attempts"], run["done"], run["total"]) == ("succeeded", 2, 100, 100)


def in_threads(work: Callable[[], Any], number: int) -> list[Any]:
    """What `work` gives in so many threads at once, each with its own connection; what it raises is raised here."""
    results: list[Any] = []

    def one() -> None:
        try:
            with db.connection_context():
                results.append(work())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_a_deleted_message_ends_its_run_half_way_and_nobody_more_is_told(cast, slices_of):
    crowd(cast.server_id, 20)
    slices_of(10)
    message_id, run_id = post(cast.subscriber, cast.general)
    assert not fanout.advance(run_id)
    so_far = stats(run_id)
    messages.delete_message(cast.subscriber.user, message_id)
    assert fanout.execute(run_id) == "succeeded"
    assert stats(run_id) == so_far
    assert (run_of(run_id)["done"], run_of(run_id)["total"]) == (10, 10)
    assert len(told(message_id)) == so_far["added"]
    assert unread(cast.admin) == 0


def test_a_message_deleted_before_its_run_tells_nobody(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    messages.delete_message(cast.subscriber.user, message_id)
    assert fanout.execute(run_id) == "succeeded"
    assert stats(run_id) == {"audience": 0, "notified": 0, "added": 0, "withdrawn": 0}
    assert told(message_id) == {}


# Attempts -------------------------------------------------------------------------------------------------


def begin_and_die(run_id: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at_slice(patch, 1, Killed())
        with pytest.raises(Killed):
            fanout.execute(run_id)


def let_the_lease_run_out(run_id: int) -> None:
    execute("UPDATE run SET due_at = now() - interval '1 second' WHERE id = %(run_id)s", {"run_id": run_id})


def test_a_run_that_never_gets_anywhere_is_failed_with_its_reason(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    for _ in range(TRIES):
        begin_and_die(run_id)
        let_the_lease_run_out(run_id)
    assert fanout.execute(run_id) == "failed"
    run = run_of(run_id)
    assert (run["state"], run["attempts"]) == ("failed", TRIES)
    assert run["error"].startswith(f"gave up after {TRIES} attempts")
    assert run["finished_at"] is not None
    assert told(message_id) == {}
    assert runs.due_runs(10, with_queued=True) == []


def test_a_run_that_gets_on_is_never_given_up(cast, slices_of):
    crowd(cast.server_id, 20)
    slices_of(2)
    message_id, run_id = post(cast.subscriber, cast.general)
    for _ in range(TRIES + 2):
        with pytest.MonkeyPatch.context() as patch:
            fail_at_slice(patch, 2, Killed())
            with pytest.raises(Killed):
                fanout.execute(run_id)
    assert fanout.execute(run_id) == "succeeded"
    assert stats(run_id)["audience"] == 25
    assert len(told(message_id)) == 23
    assert run_of(run_id)["attempts"] == TRIES + 3


def test_a_failure_is_on_the_run_while_it_is_tried_again(cast):
    _, run_id = post(cast.subscriber, cast.general)
    begin_and_die(run_id)
    assert runs.record_failure(run_id, "OperationalError: the disk is full", 30) == "queued"
    run = run_of(run_id)
    assert (run["state"], run["error"], run["finished_at"]) == ("queued", "OperationalError: the disk is full", None)
    assert runs.due_runs(10, with_queued=True) == [], "the retry is on its way, and the sweeper leaves it alone"
    assert fanout.execute(run_id) == "succeeded"
    assert run_of(run_id)["error"] is None


def test_a_failure_without_tries_left_is_final_and_keeps_its_reason(cast):
    _, run_id = post(cast.subscriber, cast.general)
    for attempt in range(1, TRIES + 1):
        begin_and_die(run_id)
        state = runs.record_failure(run_id, f"failure {attempt}", None)
        assert state == ("failed" if attempt == TRIES else "queued")
    run = run_of(run_id)
    assert (run["state"], run["error"], run["attempts"]) == ("failed", f"failure {TRIES}", TRIES)
    assert run["finished_at"] is not None


def test_a_failure_of_a_run_that_has_succeeded_says_nothing(cast):
    _, run_id = post(cast.subscriber, cast.general)
    fanout.execute(run_id)
    assert runs.record_failure(run_id, "a second worker came late", None) == "succeeded"
    assert (run_of(run_id)["state"], run_of(run_id)["error"]) == ("succeeded", None)


def test_failed_runs_are_retried_with_their_progress_and_all_their_tries(cast, slices_of):
    crowd(cast.server_id, 20)
    slices_of(10)
    message_id, run_id = post(cast.subscriber, cast.general)
    _, other_run = post(cast.subscriber, cast.general)
    fanout.advance(run_id)
    execute("UPDATE run SET state = 'failed', tries_left = 0, error = 'why', finished_at = now()")

    assert runs.retry_failed([run_id]) == [run_id]
    run = run_of(run_id)
    assert (run["state"], run["error"], run["finished_at"], run["done"]) == ("pending", None, None, 10)
    assert runs.due_runs(10, with_queued=True) == [run_id]
    for _ in range(TRIES - 1):
        begin_and_die(run_id)
    assert fanout.execute(run_id) == "succeeded"
    assert (stats(run_id)["audience"], len(told(message_id))) == (25, 23)
    assert run_of(other_run)["state"] == "failed"
    assert runs.retry_failed() == [other_run]
    assert runs.retry_failed() == []


def test_a_failed_run_that_is_asked_for_again_gets_one_attempt(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    execute("UPDATE run SET state = 'failed', tries_left = 0, error = 'why', finished_at = now()")
    begin_and_die(run_id)
    assert runs.record_failure(run_id, "again", None) == "failed"
    assert fanout.execute(run_id) == "succeeded"
    assert stats(run_id) == EVERYBODY
    assert len(told(message_id)) == 3


def test_a_run_that_failed_meanwhile_is_not_called_succeeded(cast, slices_of, monkeypatch):
    # FAULT in the product: `advance` ends a failed run with True, and `execute` calls every end "succeeded".
    slices_of(2)
    _, run_id = post(cast.subscriber, cast.general)
    advance = fanout.advance

    def fail_after_one_slice(run_id: int) -> bool:
        done = advance(run_id)
        execute("UPDATE run SET state = 'failed', error = 'why', finished_at = now()")
        return done

    monkeypatch.setattr(fanout, "advance", fail_after_one_slice)
    assert fanout.execute(run_id) == run_of(run_id)["state"] == "failed"


def test_the_last_attempt_is_not_given_up_while_somebody_is_at_it(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    for _ in range(TRIES - 1):
        begin_and_die(run_id)
    assert fanout._begin(run_id)  # a worker begins the last attempt, and holds the lease
    assert fanout.execute(run_id) == "running"  # a second job for the same run comes in between
    assert fanout.advance(run_id)
    assert stats(run_id) == EVERYBODY
    assert len(told(message_id)) == 3


def test_a_run_without_tries_left_ends_when_the_sweeper_finds_it(cast, run_jobs):
    # FAULT in the product: the sweeper's `mark_queued` moves `due_at` on, so that `_GIVE_UP` finds a lease where
    # there is none, and the run is swept, and left alone, every half minute for ever.
    _, run_id = post(cast.subscriber, cast.general)
    for _ in range(TRIES):
        begin_and_die(run_id)
    let_the_lease_run_out(run_id)
    assert jobs.sweep() == 1
    assert run_jobs() == 0
    assert run_of(run_id)["state"] == "failed"


# Edits ----------------------------------------------------------------------------------------------------


def wants_mentions_only(person: Person, channel_id: int) -> None:
    set_preference(person.user, channel_id, "mentions", None)


def test_an_edit_that_adds_a_mention_tells_the_newly_mentioned_only(cast):
    wants_mentions_only(cast.vip, cast.general)
    wants_mentions_only(cast.moderator, cast.general)
    message_id = posted_and_told(cast.subscriber, cast.general, "gold, @lars")
    assert told(message_id) == {cast.admin.id: "message"}
    set_subscription(cast.lapsed.id, "active", None)  # would be told of it now, and is not concerned
    edited = edit(cast.subscriber, message_id, "gold, @lars and @vera")
    assert told(message_id) == {cast.admin.id: "message", cast.vip.id: "mention"}
    assert (edited["added"], edited["withdrawn"]) == (1, 0)


@pytest.mark.parametrize("mention", ["@vip", "@everyone"])
def test_an_edit_that_adds_a_group_tells_those_in_it(cast, mention):
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.moderator, cast.general, "gold")
    assert cast.vip.id not in told(message_id)
    edit(cast.moderator, message_id, f"gold, {mention}")
    assert told(message_id)[cast.vip.id] == {"@vip": "mention_role", "@everyone": "mention_everyone"}[mention]


def test_a_mention_that_is_added_tells_nobody_whom_the_rules_keep_out(cast):
    set_preference(cast.vip.user, cast.general, "none", None)
    message_id = posted_and_told(cast.subscriber, cast.general, "gold")
    before = told(message_id)
    assert edit(cast.subscriber, message_id, "@vera @lars @sam")["added"] == 0
    assert told(message_id) == before


def test_who_was_told_plainly_and_is_mentioned_now_has_a_mention_unread_again(cast):
    message_id = posted_and_told(cast.subscriber, cast.general, "gold")
    read_everything(cast.moderator)
    read_everything(cast.vip)
    edited = edit(cast.subscriber, message_id, "gold, @moira")
    assert (edited["added"], edited["withdrawn"]) == (0, 0)
    assert told(message_id)[cast.moderator.id] == "mention"
    assert unread_count(cast.moderator.user)["mentions"] == unread(cast.moderator) == 1
    assert unread(cast.vip) == 0, "nobody else is bothered again"
    (shown,) = inbox.list_notifications(cast.moderator.user, before=None, limit=10)
    assert shown["title"] == "You were mentioned in Golden Signals #general"


def test_an_edit_that_removes_a_mention_withdraws_what_is_unread_and_was_for_the_mention_alone(cast):
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.subscriber, cast.general, "@vera @moira")
    edited = edit(cast.subscriber, message_id, "nobody")
    assert told(message_id) == {cast.admin.id: "message", cast.moderator.id: "message"}
    assert (edited["added"], edited["withdrawn"]) == (0, 1)
    assert unread(cast.vip) == 0
    assert unread_count(cast.moderator.user)["mentions"] == 0


def test_who_is_still_mentioned_in_another_way_keeps_the_notification(cast):
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.moderator, cast.general, "@vera @vip @everyone")
    for content, reason in (
        ("@vip @everyone", "mention_role"),
        ("@everyone", "mention_everyone"),
        ("@vera", "mention"),
    ):
        assert edit(cast.moderator, message_id, content)["withdrawn"] == 0
        assert told(message_id)[cast.vip.id] == reason
    assert edit(cast.moderator, message_id, "nobody")["withdrawn"] == 1
    assert cast.vip.id not in told(message_id)


def test_what_was_read_is_not_withdrawn(cast):
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.subscriber, cast.general, "@vera")
    read_everything(cast.vip)
    assert edit(cast.subscriber, message_id, "nobody")["withdrawn"] == 0
    assert told(message_id)[cast.vip.id] == "mention"
    assert unread(cast.vip) == 0


def test_who_read_a_mention_that_is_gone_has_not_to_read_it_again(cast):
    message_id = posted_and_told(cast.subscriber, cast.general, "@moira")
    read_everything(cast.moderator)
    edit(cast.subscriber, message_id, "nobody")
    assert unread(cast.moderator) == 0


def test_an_edit_that_is_run_twice_changes_nothing_more(cast):
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.subscriber, cast.general, "@ada")
    posted = messages.edit_message(cast.subscriber.user, message_id, "@moira @vera")
    fanout.execute(posted.run_id)
    read_everything(cast.moderator)
    before = contents()["notification"]
    changes = row("SELECT mention_changes FROM run WHERE id = %(run_id)s", {"run_id": posted.run_id})
    again = runs.create_run(message_id, "edit", changes["mention_changes"])
    assert fanout.execute(again) == "succeeded"
    assert contents()["notification"] == before
    assert (stats(again)["added"], stats(again)["withdrawn"]) == (0, 0)


def test_an_edit_that_changes_no_mention_makes_no_run(cast):
    message_id = posted_and_told(cast.subscriber, cast.general, "@moira is right")
    before = contents()
    assert messages.edit_message(cast.subscriber.user, message_id, "@moira is wrong, `@vera`").run_id == 0
    after = contents()
    assert after.pop("message") != before.pop("message")
    assert after == before


@pytest.mark.parametrize("edit_first", [False, True], ids=["in order", "the edit's run first"])
def test_an_edit_before_the_first_run_tells_as_if_it_had_been_written_so(cast, edit_first):
    wants_mentions_only(cast.vip, cast.general)
    wants_mentions_only(cast.moderator, cast.general)
    message_id, first = post(cast.subscriber, cast.general, "@vera")
    second = messages.edit_message(cast.subscriber.user, message_id, "@moira").run_id
    for run_id in (second, first) if edit_first else (first, second):
        assert fanout.execute(run_id) == "succeeded"
    assert told(message_id) == {cast.admin.id: "message", cast.moderator.id: "mention"}
    assert unread(cast.moderator) == 1


def test_an_edit_half_way_through_the_first_run_tells_as_if_it_had_been_written_so(cast, slices_of):
    many = crowd(cast.server_id, 8)
    slices_of(6)
    for person in (cast.vip, cast.moderator):
        wants_mentions_only(person, cast.general)
    message_id, first = post(cast.moderator, cast.general, "@vera @crowd-8")
    fanout.advance(first)
    second = messages.edit_message(cast.moderator.user, message_id, "@crowd-1").run_id
    fanout.advance(second)
    for run_id in (first, second):
        assert fanout.execute(run_id) == "succeeded"
        assert stats(run_id)["audience"] == 13
    expected = dict.fromkeys([cast.admin.id, cast.subscriber.id, *many], "message") | {many[0]: "mention"}
    assert told(message_id) == expected


def test_an_edit_leaves_alone_whom_it_does_not_concern(cast):
    message_id = posted_and_told(cast.subscriber, cast.general, "@ada and @moira")
    set_preference(cast.vip.user, cast.general, "none", None)
    set_preference(cast.moderator.user, cast.general, "none", None)
    before = told(message_id)
    edited = edit(cast.subscriber, message_id, "@ada, @moira and @lars")
    assert (edited["added"], edited["withdrawn"], told(message_id)) == (0, 0, before)
    assert unread(cast.vip) == unread(cast.moderator) == 1


def test_an_edit_that_only_adds_a_mention_withdraws_nothing(cast):
    # FAULT in the product: `TELL_OF_EDIT` withdraws from whomever the edit concerns, those it adds as well.
    message_id = posted_and_told(cast.moderator, cast.general, "gold")
    set_preference(cast.vip.user, cast.general, "mentions", None)
    set_preference(cast.subscriber.user, cast.general, "none", None)
    assert unread(cast.subscriber) == 1
    assert edit(cast.moderator, message_id, "gold, @everyone")["withdrawn"] == 0
    assert unread(cast.subscriber) == 1


def test_a_dismissed_notification_does_not_come_back_by_edits(cast):
    # FAULT in the product: `TELL_OF_EDIT` deletes unread rows, dismissed ones too, and with them what keeps
    # the person from being told again.
    wants_mentions_only(cast.vip, cast.general)
    message_id = posted_and_told(cast.subscriber, cast.general, "@vera")
    dismiss(cast.vip.user, cast.vip.id, message_id)
    edit(cast.subscriber, message_id, "nobody")
    edit(cast.subscriber, message_id, "@vera")
    assert inbox.list_notifications(cast.vip.user, before=None, limit=10) == []


def test_a_dismissed_notification_that_becomes_a_mention_stays_dismissed(cast):
    message_id = posted_and_told(cast.subscriber, cast.general, "gold")
    dismiss(cast.vip.user, cast.vip.id, message_id)
    edit(cast.subscriber, message_id, "@vera")
    assert inbox.list_notifications(cast.vip.user, before=None, limit=10) == []
    assert unread(cast.vip) == 0


# Replays --------------------------------------------------------------------------------------------------


def replayed(run_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a replay announces, and the statistics of the run that it makes."""
    announced = runs.replay(run_id, dry_run=False)
    assert fanout.execute(announced["run_id"]) == "succeeded"
    assert announced["added"] == stats(announced["run_id"])["added"]
    return announced, stats(announced["run_id"])


def test_a_replay_of_an_unchanged_community_writes_no_notification_and_says_so(cast, slices_of):
    crowd(cast.server_id, 20)
    slices_of(4)
    _, run_id = post(cast.subscriber, cast.general)
    fanout.execute(run_id)
    before = contents()["notification"]
    announced, counted = replayed(run_id)
    assert (announced["added"], announced["stays"]) == (0, 23)
    assert announced["now"] == announced["then"]
    assert counted == stats(run_id) | {"added": 0}
    assert contents()["notification"] == before


def test_a_replay_after_somebody_subscribed_adds_exactly_them(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    fanout.execute(run_id)
    before = told(message_id)
    set_subscription(cast.lapsed.id, "active", None)
    announced, counted = replayed(run_id)
    assert (announced["added"], announced["stays"], counted["added"]) == (1, 3, 1)
    assert announced["then"]["no_subscription"] == 1
    assert announced["now"]["no_subscription"] == 0
    assert told(message_id) == before | {cast.lapsed.id: "message"}


def test_a_replay_takes_nothing_back(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    fanout.execute(run_id)
    set_preference(cast.vip.user, cast.general, "none", None)
    announced, counted = replayed(run_id)
    assert (announced["added"], announced["stays"], counted["notified"]) == (0, 3, 2)
    assert len(told(message_id)) == 3


def test_a_replay_brings_nothing_back_that_was_read_or_dismissed(cast):
    _, run_id = post(cast.subscriber, cast.general, "@moira")
    fanout.execute(run_id)
    read_everything(cast.moderator)
    dismiss(cast.vip.user, cast.vip.id, run_of(run_id)["message_id"])
    replayed(run_id)
    assert unread(cast.moderator) == unread(cast.vip) == 0
    assert inbox.list_notifications(cast.vip.user, before=None, limit=10) == []


def test_a_dry_run_says_what_would_be_added_and_writes_nothing_at_all(cast, slices_of):
    slices_of(2)
    _, run_id = post(cast.subscriber, cast.general)
    fanout.execute(run_id)
    set_subscription(cast.lapsed.id, "active", None)
    before = contents()
    announced = runs.replay(run_id, dry_run=True)
    assert contents() == before
    assert (announced["dry_run"], announced["added"], announced["stays"]) == (True, 1, 3)
    assert announced["run_id"] is None


# Test messages --------------------------------------------------------------------------------------------


def test_a_test_message_is_told_to_and_seen_by_the_one_who_asked_alone(api, cast, run_jobs):
    caller = make_person("alma", status=None, admin=True)  # the last in the order in which members are walked
    communities.put_member(cast.server_id, caller.id, [])
    answer = api(caller).post("/api/test-notifications", json={"channel_id": cast.general})
    assert answer.status_code == 202
    assert run_jobs() == 0
    run = api(caller).get(answer.headers["Location"]).get_json()
    assert (run["state"], run["kind"], run["progress"]) == ("succeeded", "test", {"done": 1, "total": 1})
    message_id = run["message_id"]
    assert told(message_id) == {caller.id: "mention"}

    for person in (caller, cast.admin, cast.moderator, cast.subscriber):
        listed = api(person).get(f"/api/channels/{cast.general}/messages").get_json()["items"]
        found = api(person).get(f"/api/messages/{message_id}").status_code
        in_inbox = api(person).get("/api/notifications").get_json()["items"]
        if person is caller:
            assert [message["id"] for message in listed] == [message_id]
            assert [notification["message_id"] for notification in in_inbox] == [message_id]
            assert found == 200
        else:
            assert (listed, in_inbox, found) == ([], [], 404)


def test_a_replay_of_a_test_message_tells_nobody_else(cast):
    run_id = send_test(cast.admin.user, cast.general, None, "me")
    fanout.execute(run_id)
    announced, counted = replayed(run_id)
    assert (announced["added"], counted["audience"]) == (0, 1)
    assert told(run_of(run_id)["message_id"]) == {cast.admin.id: "mention"}


# What must not grow with the audience ---------------------------------------------------------------------


@dataclass
class Measured:
    """What a message to so many members took."""

    members: int
    of_post: int  # SQL statements of the request that posted it
    of_slices: list[int]  # SQL statements of each slice
    of_run: int  # SQL statements of the whole run
    peak: int  # bytes that Python held for the run, at most
    stats: dict[str, Any]
    notifications: int


SMALL, MEDIUM, LARGE = 10, 1_000, 100_000


@pytest.fixture(scope="module")
def measured(app, _schema) -> dict[int, Measured]:
    db.connect(reuse_if_open=True)
    author = make_person("author-of-all", status=None, admin=True)
    client = app.test_client()
    measure(client, author, SMALL)  # first of all what is loaded once, and stays
    return {members: measure(client, author, members) for members in (SMALL, MEDIUM, LARGE)}


def measure(client, author: Person, members: int) -> Measured:
    community = seed(members, 3)
    with statements() as seen:
        answer = client.post(
            "/api/messages",
            json={"channel_id": community["channel_ids"][0], "content": f"@{community['usernames'][0]} and @vip"},
            headers={"Authorization": f"Bearer {author.token}"},
        )
    assert answer.status_code == 201
    of_post, run_id = len(seen), answer.get_json()["run"]["id"]

    of_slices, advance = [], fanout.advance

    def counted_advance(run_id: int) -> bool:
        before = len(seen)
        done = advance(run_id)
        of_slices.append(len(seen) - before)
        return done

    with statements() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fanout, "advance", counted_advance)
        tracemalloc.start()
        try:
            assert fanout.execute(run_id) == "succeeded"
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    told_of_it = Notification.select().where(Notification.message_id == answer.get_json()["id"]).count()
    return Measured(members, of_post, of_slices, len(seen), peak, stats(run_id), told_of_it)


def test_every_slice_takes_the_same_statements_however_many_members(measured):
    per_slice = measured[SMALL].of_slices[0]
    assert per_slice <= 5
    assert len(measured[SMALL].of_slices) == len(measured[MEDIUM].of_slices) == 1
    assert len(measured[LARGE].of_slices) == LARGE // settings.slice_members + 1
    for one in measured.values():
        assert set(one.of_slices) == {per_slice}
        assert one.of_run - sum(one.of_slices) == measured[SMALL].of_run - per_slice


def test_posting_takes_the_same_statements_however_many_members(measured):
    assert measured[SMALL].of_post == measured[MEDIUM].of_post == measured[LARGE].of_post <= 10


def test_a_run_takes_the_same_memory_however_many_members(measured):
    assert abs(measured[LARGE].peak - measured[MEDIUM].peak) < 1_000_000


def test_a_hundred_thousand_members_are_counted_exactly(measured):
    large = measured[LARGE]
    assert large.stats["audience"] >= LARGE
    assert large.stats["added"] == large.stats["notified"] == large.notifications
