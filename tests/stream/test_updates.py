"""What is new for a reader: all of it, once, in whatever order it is committed and wherever the reader broke off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
from hypothesis import given, settings, strategies

from belfry.core.db import db
from belfry.fanout import claims, fanout, runs
from belfry.inbox.inbox import dismiss, list_notifications
from belfry.messages.messages import delete_message
from belfry.servers import servers
from belfry.servers.preferences import set_preference
from belfry.stream import cursor, resuming, updates
from belfry.stream.cursor import StreamCursor
from belfry.stream.updates import updates_since
from config import settings as belfry
from tests.fanout_helpers import crowd, edit, post, post_and_notify, run_to_end, statements
from tests.people import make_cast

HERE = "1795611700-772:781:774,779"
MIDST = f"{HERE}-41-770:772:771"


@pytest.mark.parametrize("text", [HERE, MIDST, "0-1:1:", "1-5:5:"])
def test_a_position_is_read_as_it_was_written_and_signed(text):
    unsigned = StreamCursor.parse(text)
    signed = str(unsigned)
    assert signed.startswith(f"{text}.")
    assert str(StreamCursor.parse(signed)) == signed
    assert StreamCursor.parse(signed).is_genuine("")
    assert not StreamCursor.parse(signed).is_genuine("another epoch")
    assert not unsigned.is_genuine("")
    assert not StreamCursor.parse(f"{text}.{signed.rpartition('.')[2][::-1]}").is_genuine("")
    assert not StreamCursor.parse(f"9{signed}").is_genuine("")


@given(
    strategies.lists(strategies.integers(3, 30), max_size=6, unique=True),
    strategies.integers(0, 9),
    strategies.integers(1, 40),
)
def test_a_snapshot_shows_what_it_shows_to_postgresql(in_progress, more, transaction):
    in_progress.sort()
    least, following = (in_progress[0], in_progress[-1] + 1 + more) if in_progress else (3 + more, 3 + more)
    snapshot = f"{least}:{following}:{','.join(map(str, in_progress))}"
    [(shown,)] = db.execute_sql(
        "SELECT pg_visible_in_snapshot(%s::text::xid8, %s::pg_snapshot)", [transaction, snapshot]
    ).fetchall()
    assert StreamCursor(0, snapshot).shows(transaction, 1) == shown


@pytest.mark.parametrize(
    "text",
    ["", "7", "x", "1-2", "1-2:1:", "1-0:5:", "1-3:5:9", "1-3:5:2", "1-3:7:5,4", "1-3:5:5", "1-3:5:3,", HERE + "\n",
     "1-1:2:-", "1-1:2:-4", "1-1:2:-4-", "1-1:2:-4-2:1:", "-1:1:", "1-" + "9" * 30 + ":1:", "1-١:٢:", "1-1:2:'",
     HERE * 2, HERE + ".", HERE + ".!", HERE + "." + "A" * 65],
)  # fmt: skip
def test_other_text_is_not_a_cursor(text):
    with pytest.raises(ValueError, match="is not a cursor"):
        StreamCursor.parse(text)


@given(strategies.from_regex(r"[0-9]{1,3}-[0-9]{1,2}:[0-9]{1,2}:([0-9]{1,2}(,[0-9]{1,2}){0,3})?", fullmatch=True))
@settings(max_examples=300)
def test_postgresql_takes_for_a_snapshot_what_we_take_for_one(text):
    snapshot = text.partition("-")[2]
    try:
        StreamCursor.parse(text)
    except ValueError:
        with pytest.raises(psycopg.DataError), psycopg.connect(belfry.database_url) as session:
            session.execute("SELECT %s::pg_snapshot", [snapshot])
    else:
        db.execute_sql("SELECT %s::pg_snapshot", [snapshot])


def _look(since: StreamCursor | None, *user_ids: int) -> tuple[StreamCursor, updates.Updates]:
    """What those are sent who are at a position: the same, whether they are connected or come back."""
    with updates.take_snapshot() as here:
        since = since or here
        back = resuming.missed_updates([(user_id, given_back(since)) for user_id in user_ids], here)
        found = updates.Updates(overflow=any(one.overflow for one in back.values()))
        for one in back.values():
            found.notifications |= one.notifications
        if since.before is None:
            connected = updates_since(since, here, user_ids)
            assert (connected.notifications, connected.overflow) == (found.notifications, found.overflow)
            found = connected
        return here, found


def given_back(position: StreamCursor) -> StreamCursor:
    """A position as a client gives it back."""
    return StreamCursor.parse(str(position))


def _connected(since: StreamCursor, *user_ids: int) -> updates.Updates:
    with updates.take_snapshot() as here:
        return updates_since(since, here, user_ids)


def _back(
    *clients: tuple[int, StreamCursor], most: int = resuming.MAX_RESUMED_NOTIFICATIONS
) -> dict[tuple[int, StreamCursor], updates.Updates]:
    with updates.take_snapshot() as here:
        return resuming.missed_updates(clients, here, most)


@contextmanager
def no_notification_read() -> Iterator[None]:
    with statements() as executed:
        yield
    assert not any("notification note" in sql for sql in executed)


def _messages(found: updates.Updates, user_id: int) -> list[int]:
    return [notification["message_id"] for _, notification in found.notifications.get(user_id, [])]


def test_what_is_new_is_as_the_inbox_shows_it(cast):
    here, _ = _look(None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold, @vera")
    _, found = _look(here, cast.vip.id, cast.admin.id, cast.lapsed.id, cast.subscriber.id)
    assert {user_id: _messages(found, user_id) for user_id in found.notifications} == {
        cast.vip.id: [message_id],
        cast.admin.id: [message_id],
    }
    for person in (cast.vip, cast.admin):
        assert [one for _, one in found.notifications[person.id]] == list_notifications(
            person.user, before=None, limit=9
        )


@pytest.mark.parametrize("gone", ["deleted", "dismissed", "left", "role", "author"])
def test_what_the_inbox_does_not_show_is_not_sent(cast, gone):
    here, _ = _look(None)
    author, channel_id, reader = (
        (cast.admin, cast.vault, cast.vip) if gone == "role" else (cast.vip, cast.general, cast.subscriber)
    )
    message_id = post_and_notify(author, channel_id, "gold")
    assert _messages(_look(here, reader.id)[1], reader.id)
    if gone == "deleted":
        delete_message(cast.vip.user, message_id)
    elif gone == "dismissed":
        dismiss(reader.user, reader.id, message_id)
    elif gone == "left":
        servers.remove_member(cast.server_id, reader.id)
    elif gone == "role":
        servers.put_member(cast.server_id, reader.id, [])
    else:
        servers.update_channel(cast.general, {"posting": "admins"})
    assert not _look(here, reader.id)[1].notifications


def test_who_was_sent_everything_is_sent_nothing_more(cast):
    here, _ = _look(None)
    post_and_notify(cast.subscriber, cast.general, "gold")
    there, found = _look(here, cast.vip.id)
    assert _messages(found, cast.vip.id)
    assert not _look(there, cast.vip.id)[1].notifications


def test_a_replay_sends_nothing_to_notified_users(cast):
    set_preference(cast.vip.user, cast.general, "none", None)
    _, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    set_preference(cast.vip.user, cast.general, "all", None)
    here, _ = _look(None)
    run_to_end(runs.replay(run_id, dry_run=False)["run_id"])
    assert list(_look(here, cast.vip.id, cast.admin.id)[1].notifications) == [cast.vip.id]


def test_an_edit_says_that_counts_have_changed(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    here, _ = _look(None)
    edit(cast.subscriber, message_id, "gold, @vera")
    there, found = _look(here, cast.vip.id)
    assert found.counts_changed
    assert not found.notifications  # vera has hers already: it is a mention now
    assert not _look(there, cast.vip.id)[1].counts_changed


def test_a_message_to_thousands_is_one_row_of_the_log_and_one_query_for_all(cast):
    people = crowd(cast.server_id, 3_000)
    here, _ = _look(None)
    with statements() as few:
        _connected(here, *people[:2])
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    assert db.execute_sql("SELECT count(*) FROM notification_log").fetchone() == (3,)
    with statements() as many:
        found = _connected(here, *people)
    assert all(len(_messages(found, user_id)) == 3 for user_id in people)
    assert len(many) == len(few) + 2  # whose servers these are, and the notifications


def test_who_was_away_for_too_long_reads_the_inbox(cast):
    here, _ = _look(None)
    post_and_notify(cast.subscriber, cast.general, "gold")
    long_ago = replace(here, created_at=here.created_at - updates.LOG_RETENTION_HOURS * 3600)
    of_another_database = replace(here, snapshot="999999999:999999999:")
    for since in (long_ago, of_another_database):
        found = _look(since, cast.vip.id)[1]
        assert found.overflow
        assert not found.notifications


def test_notifications_in_other_servers_cost_nothing(cast, override):
    here, _ = _look(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    override(stream_max_lookups=0, resume_max_lookups=0)
    found = _look(here, cast.stranger.id)[1]
    assert not found.overflow
    assert not found.notifications


def test_an_admin_who_left_the_server_is_sent_their_notifications(cast):
    here, _ = _look(None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    servers.remove_member(cast.server_id, cast.admin.id)
    assert _messages(_look(here, cast.admin.id)[1], cast.admin.id) == [message_id]


def test_what_is_overflow_is_not_looked_up(cast, override):
    here, _ = _look(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    override(stream_max_lookups=5)
    assert not _connected(here, cast.vip.id).overflow
    assert _connected(here, cast.vip.id, cast.admin.id).overflow


def test_what_came_with_a_copy_of_another_database_stands_in_nobodys_way(cast):
    db.execute_sql(
        "INSERT INTO notification_log (xid, message_ids)"
        " SELECT (pg_current_xact_id()::text::bigint + n)::text::xid8, '{1}' FROM generate_series(2, 3000) n"
    )
    assert updates.purge_log(5_000) == 2_999
    post_and_notify(cast.subscriber, cast.general, "gold")
    assert updates.purge_log(5_000) == 0
    assert db.execute_sql("SELECT count(*) FROM notification_log").fetchone() == (1,)


def test_a_message_of_many_slices_is_looked_up_once(cast, slices_of, override):
    people = crowd(cast.server_id, 30)
    slices_of(3)
    here, _ = _look(None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    assert db.execute_sql("SELECT count(*) > 10 FROM notification_log").fetchone() == (True,)
    override(stream_max_lookups=30)
    found = _look(here, *people)[1]
    assert all(_messages(found, user_id) == [message_id] for user_id in people)


def test_a_position_of_long_ago_is_not_read_to_the_end(cast, override):
    override(stream_max_log_rows=2)
    here, _ = _look(None)
    for _ in range(2):
        post_and_notify(cast.subscriber, cast.general, "gold")
    assert not _connected(here, cast.vip.id).overflow
    post_and_notify(cast.subscriber, cast.general, "gold")
    assert _connected(here, cast.vip.id).overflow
    assert not _connected(here).overflow  # nobody to look for


def test_the_log_is_read_once_for_all_clients_and_only_up_to_its_bound(cast, override):
    """From whatever positions, genuine ones of long ago too: what a look reads does not grow with them."""
    positions = []
    for _ in range(8):
        positions.append(given_back(_look(None)[0]))
        post_and_notify(cast.subscriber, cast.general, "gold")
    clients = [(person.id, position) for position in positions for person in (cast.vip, cast.admin)]
    with statements() as one:
        _back(clients[-1])
    with statements() as all_:
        found = _back(*clients)
    assert len(all_) == len(one)
    assert [len(_messages(found[client], client[0])) for client in clients[::2]] == [8, 7, 6, 5, 4, 3, 2, 1]
    override(resume_max_log_rows=3)
    found = _back(*clients)
    assert [found[client].overflow for client in clients[::2]] == [True] * 5 + [False] * 3
    assert [len(_messages(found[client], client[0])) for client in clients[10::2]] == [3, 2, 1]


def test_of_a_transaction_with_too_many_messages_no_notification_is_read(cast, override):
    here, _ = _look(None)
    run_ids = [post(cast.subscriber, cast.general)[1] for _ in range(5)]
    assert len(fanout.process_batch(claims.claim_batch(run_ids[0], run_ids[1:], 1_000))) == 5
    override(resume_max_log_rows=3)
    client = (cast.vip.id, given_back(here))
    with no_notification_read():
        assert _back(client)[client].overflow


def test_clients_that_come_back_are_looked_up_within_a_bound_and_the_others_later(cast, override):
    override(resume_max_lookups=4)
    here, _ = _look(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    since, nothing = given_back(here), given_back(_look(None)[0])
    clients = [(cast.vip.id, since), (cast.vip.id, nothing), (cast.admin.id, since), (cast.moderator.id, since)]
    found = _back(*clients)
    assert list(found) == clients[:2]
    assert len(_messages(found[clients[0]], cast.vip.id)) == 3
    assert list(_back(*clients[2:])) == clients[2:3]  # one at least


def test_a_client_that_missed_too_much_is_reset_and_not_looked_up(cast):
    here, _ = _look(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    client = (cast.vip.id, given_back(here))
    assert not _back(client, most=3)[client].overflow
    with no_notification_read():
        assert _back(client, most=2)[client].overflow


def test_an_invalid_cursor_is_not_looked_up(cast, override):
    """It is forged, or signed with a key that was changed since."""
    here, _ = _look(None)
    post_and_notify(cast.subscriber, cast.general, "gold")
    unsigned, genuine = StreamCursor.parse(str(here).rpartition(".")[0]), given_back(here)
    with no_notification_read():
        assert _back((cast.vip.id, unsigned))[cast.vip.id, unsigned].overflow
        override(secret_key="another key, which is set from now on")
        cursor._signature.cache_clear()
        assert _back((cast.vip.id, genuine))[cast.vip.id, genuine].overflow
    cursor._signature.cache_clear()


def test_an_edit_recounts_the_members_of_its_server_alone(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    here, _ = _look(None)
    edit(cast.subscriber, message_id, "gold, @vera")
    changed = _look(here, cast.vip.id, cast.moderator.id, cast.stranger.id)[1].counts_changed
    assert changed == {cast.vip.id, cast.moderator.id}


def test_the_log_is_kept_for_as_long_as_somebody_may_go_on_from_it(cast):
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    for message_id, age in ((1, "24 hours 1 second"), (2, "23 hours 59 minutes")):
        db.execute_sql(
            "UPDATE notification_log SET notified_at = now() - %s::interval WHERE message_ids = ARRAY[%s::bigint]",
            (age, message_id),
        )
    assert updates.purge_log(5_000) == 1
    assert db.execute_sql("SELECT array_agg(message_ids[1] ORDER BY xid) FROM notification_log").fetchone() == ([2, 3],)


def test_an_old_cursor_within_the_day_costs_only_what_was_logged_since(cast):
    post_and_notify(cast.subscriber, cast.general, "gold")
    db.execute_sql(
        "INSERT INTO notification_log (xid, message_ids) SELECT n::text::xid8, '{1}' FROM generate_series(3, 600) n"
        " ON CONFLICT DO NOTHING"
    )
    db.execute_sql("ANALYZE notification_log")
    here, _ = _look(None)
    plan = db.execute_sql(
        "EXPLAIN SELECT FROM notification_log WHERE xid >= pg_snapshot_xmin(%(since)s::pg_snapshot)"
        " AND NOT pg_visible_in_snapshot(xid, %(since)s::pg_snapshot)",
        {"since": here.snapshot},
    ).fetchall()
    assert "Index Cond: (xid >=" in " ".join(line for (line,) in plan)


STEPS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(["notify", "notify", "commit", "roll back", "look"]), strategies.integers(0, 3)
    ),
    max_size=40,
)


@given(STEPS, strategies.data())
@settings(max_examples=60, deadline=None)
def test_everything_is_sent_once_whatever_the_order_of_commits_and_wherever_a_stream_breaks(steps, data):
    """Four transactions notify of messages; a reader looks, is cut off in the midst of what it is sent, and goes on."""
    db.execute_sql("TRUNCATE user_account, server, message, notification_log, notification RESTART IDENTITY CASCADE")
    cast = make_cast()
    reader = cast.vip.id
    sessions = [psycopg.connect(belfry.database_url) for _ in range(4)]
    begun: list[list[int]] = [[], [], [], []]
    committed: list[int] = []
    sent: list[int] = []
    position, _ = _look(None)

    def look(position: StreamCursor) -> StreamCursor:
        here, found = _look(position, reader)
        events = found.notifications.get(reader, [])
        arrived = data.draw(strategies.integers(0, len(events)))
        sent.extend(notification["message_id"] for _, notification in events[:arrived])
        if arrived == len(events):
            return here
        return events[arrived - 1][0] if arrived else position

    try:
        for step, number in steps:
            session = sessions[number]
            if step == "look":
                position = look(position)
            elif step == "commit":
                session.commit()
                committed += begun[number]
                begun[number] = []
            elif step == "roll back":
                session.rollback()
                begun[number] = []
            elif step == "notify" and not begun[number]:
                message_ids = [post(cast.subscriber, cast.general)[0] for _ in range(2)]
                session.execute(
                    "INSERT INTO notification (user_id, message_id, reason)"
                    " SELECT %s, unnest(%s::bigint[]), 'message'",
                    [reader, message_ids],
                )
                session.execute("INSERT INTO notification_log (message_ids) VALUES (%s)", [message_ids])
                begun[number] = message_ids
        for number, session in enumerate(sessions):
            session.commit()
            committed += begun[number]
    finally:
        for session in sessions:
            session.close()
    here, found = _look(position, reader)
    assert not found.overflow
    assert sorted(sent + _messages(found, reader)) == sorted(committed)
    assert not _look(here, reader)[1].notifications
