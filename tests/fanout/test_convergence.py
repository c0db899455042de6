"""Posts, edits and deletions end with the notifications of the last revision, for any order, repetition and
overlap of their jobs."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belfry.core.db import db, execute, fetch_all
from belfry.fanout import claims, fanout
from belfry.fanout.claims import WorkItem
from belfry.inbox import inbox
from belfry.integrity.verification import verify
from belfry.messages import messages
from belfry.servers import servers
from belfry.servers.preferences import set_preference
from models import User
from tests.fanout_helpers import (
    add_members,
    claim_and_process,
    notified,
    post,
    post_and_notify,
    remaining_work_items,
    run_to_end,
    set_mentions_only,
)
from tests.overrides import overridden
from tests.people import Cast, make_cast

pytestmark = pytest.mark.slow

TEXTS = (
    "gold", "@vera", "@vera @lars", "@vip", "@everyone", "@crowd-1 @crowd-2 @crowd-3", "@moira @sam @ada", "@vip @vera",
)  # fmt: skip


@contextmanager
def a_server() -> Iterator[tuple[Cast, list[int]]]:
    """The cast and a crowd with preferences of every kind, in a transaction that is rolled back."""
    with db.atomic() as transaction:
        yield make_server()
        transaction.rollback()


def make_server() -> tuple[Cast, list[int]]:
    cast = make_cast()
    many = add_members(cast.server_id, 8)
    set_mentions_only(cast.vip, cast.general)
    for user_id, level in ((many[0], "mentions"), (many[1], "none"), (many[4], "mentions")):
        set_preference(User.get_by_id(user_id), cast.general, level, None)
    servers.put_member(cast.server_id, many[4], [cast.vip_role])
    return cast, many


def unfinished() -> list[WorkItem]:
    return [
        WorkItem(**found)
        for found in fetch_all(
            "SELECT r.id AS run_id, s.after_user_id FROM run r LEFT JOIN slice s ON s.run_id = r.id"
            " WHERE r.state <> 'succeeded' ORDER BY 1, 2"
        )
    ]


@settings(max_examples=120, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_the_last_revision_decides_for_any_order_of_jobs(data):
    members = data.draw(st.integers(1, 14), label="members of a slice")
    with a_server() as (cast, _), overridden(fanout_slice_size=members):
        author = cast.moderator
        text = data.draw(st.sampled_from(TEXTS), label="post")
        message_id, _ = post(author, cast.general, text)
        claimed: list[tuple[WorkItem, int]] = []
        actions = st.sampled_from(["edit", "process", "process", "die", "late"])
        steps = data.draw(st.lists(actions, max_size=14), label="steps")
        for step in steps:
            left = unfinished()
            if step == "edit":
                text = data.draw(st.sampled_from(TEXTS), label="edit")
                messages.edit_message(author.user, message_id, text)
            elif step == "late" and claimed:  # an attempt that was presumed dead continues
                fanout.process_work_item(*data.draw(st.sampled_from(claimed), label="late"))
            elif left:
                item = data.draw(st.sampled_from(left), label=step)
                attempt = claims.claim(item)
                if attempt is None:
                    continue
                claimed.append((item, attempt))
                if step == "process":
                    fanout.process_work_item(item, attempt)
                else:  # keep enough attempts for any number of repetitions
                    execute("UPDATE run SET attempts_left = 6; UPDATE slice SET attempts_left = 6")
        while left := unfinished():
            claim_and_process(data.draw(st.sampled_from(left), label="remaining"))
        for attempt in claimed:
            fanout.process_work_item(*attempt)

        comparison = post_and_notify(author, cast.general, text)
        assert notified(message_id) == notified(comparison)
        assert verify() == []
        messages.delete_message(author.user, message_id)
        for person in cast.everybody.values():
            shown = inbox.list_notifications(person.user, before=None, limit=100)
            assert [item["message_id"] for item in shown if item["message_id"] == message_id] == []


@pytest.mark.parametrize("seed", range(4))
def test_the_last_revision_decides_with_concurrent_edits_and_workers(cast, set_slice_size, seed):
    """Three workers and an author who edits, each in its own thread with its own connection."""
    add_members(cast.server_id, 40)
    rng = random.Random(seed)
    set_mentions_only(cast.vip, cast.general)
    set_slice_size(7)
    texts = [rng.choice(TEXTS) for _ in range(6)]
    message_id, _ = post(cast.moderator, cast.general, texts[0])
    edited = threading.Event()
    errors: list[BaseException] = []

    def edit() -> None:
        try:
            for text in texts[1:]:
                messages.edit_message(cast.moderator.user, message_id, text)
        finally:
            edited.set()

    def work() -> None:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up:
            last = edited.is_set()
            items = unfinished()
            rng.shuffle(items)
            for item in items:
                if (attempt := claims.claim(item)) is not None:
                    fanout.process_work_item(item, attempt)
            if last and not unfinished():
                return
        raise AssertionError(f"unfinished after a minute: {unfinished()}")

    def run_in_thread(function) -> None:
        try:
            with db.connection_context():
                function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run_in_thread, args=(function,)) for function in (edit, work, work, work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert notified(message_id) == notified(post_and_notify(cast.moderator, cast.general, texts[-1]))
    assert verify() == []


def test_a_deletion_ends_every_run_of_the_message(cast, set_slice_size):
    add_members(cast.server_id, 20)
    set_slice_size(6)
    message_id, first = post(cast.moderator, cast.general, "@vera")
    second = messages.edit_message(cast.moderator.user, message_id, "@everyone").run_id
    for run_id in (first, second, first, second):
        item = remaining_work_items(run_id)[0]
        fanout.process_work_item(item, claims.claim(item))
    messages.delete_message(cast.moderator.user, message_id)
    before = notified(message_id)
    for run_id in (second, first):
        assert run_to_end(run_id) == "succeeded"
    assert notified(message_id) == before, "no other user is notified"
    assert verify() == []
    for person in cast.everybody.values():
        assert inbox.list_notifications(person.user, before=None, limit=100) == []
