"""Updates of a stream: each notification once, in any order of commits and after a disconnect at any event."""

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
from tests.fanout_helpers import add_members, edit, post, post_and_notify, run_to_end, statements
from tests.people import make_cast

HERE = "1795611700-772:781:774,779"
WITHIN_UPDATE = f"{HERE}-41-770:772:771"


@pytest.mark.parametrize("text", [HERE, WITHIN_UPDATE, "0-1:1:", "1-5:5:"])
def test_a_cursor_is_parsed_as_written_and_its_signature_is_checked(text):
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
def test_a_cursor_shows_the_same_transactions_as_postgresql(in_progress, more, transaction):
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
def test_the_cursor_parser_accepts_the_same_snapshots_as_postgresql(text):
    snapshot = text.partition("-")[2]
    try:
        StreamCursor.parse(text)
    except ValueError:
        with pytest.raises(psycopg.DataError), psycopg.connect(belfry.database_url) as session:
            session.execute("SELECT %s::pg_snapshot", [snapshot])
    else:
        db.execute_sql("SELECT %s::pg_snapshot", [snapshot])


def _updates(since: StreamCursor | None, *user_ids: int) -> tuple[StreamCursor, updates.Updates]:
    """The updates of users since a cursor; assert that they are the same for connected and for resuming clients."""
    with updates.take_snapshot() as here:
        since = since or here
        resumed = resuming.missed_updates([(user_id, parsed_again(since)) for user_id in user_ids], here)
        found = updates.Updates(overflow=any(one.overflow for one in resumed.values()))
        for one in resumed.values():
            found.notifications |= one.notifications
        if since.before is None:
            connected = updates_since(since, here, user_ids)
            assert (connected.notifications, connected.overflow) == (found.notifications, found.overflow)
            found = connected
        return here, found


def parsed_again(original: StreamCursor) -> StreamCursor:
    """The cursor as a client sends it in `Last-Event-ID`."""
    return StreamCursor.parse(str(original))


def _connected_updates(since: StreamCursor, *user_ids: int) -> updates.Updates:
    with updates.take_snapshot() as here:
        return updates_since(since, here, user_ids)


def _resumed_updates(
    *clients: tuple[int, StreamCursor], most: int = resuming.MAX_RESUMED_NOTIFICATIONS
) -> dict[tuple[int, StreamCursor], updates.Updates]:
    with updates.take_snapshot() as here:
        return resuming.missed_updates(clients, here, most)


@contextmanager
def no_notification_is_read() -> Iterator[None]:
    with statements() as executed:
        yield
    assert not any("notification note" in sql for sql in executed)


def _messages(found: updates.Updates, user_id: int) -> list[int]:
    return [notification["message_id"] for _, notification in found.notifications.get(user_id, [])]


def test_updates_show_notifications_as_the_inbox_does(cast):
    here, _ = _updates(None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold, @vera")
    _, found = _updates(here, cast.vip.id, cast.admin.id, cast.lapsed.id, cast.subscriber.id)
    assert {user_id: _messages(found, user_id) for user_id in found.notifications} == {
        cast.vip.id: [message_id],
        cast.admin.id: [message_id],
    }
    for person in (cast.vip, cast.admin):
        assert [one for _, one in found.notifications[person.id]] == list_notifications(
            person.user, before=None, limit=9
        )


@pytest.mark.parametrize("reason", ["deleted", "dismissed", "left", "role", "author"])
def test_a_notification_that_the_inbox_hides_is_not_sent(cast, reason):
    here, _ = _updates(None)
    author, channel_id, recipient = (
        (cast.admin, cast.vault, cast.vip) if reason == "role" else (cast.vip, cast.general, cast.subscriber)
    )
    message_id = post_and_notify(author, channel_id, "gold")
    assert _messages(_updates(here, recipient.id)[1], recipient.id)
    if reason == "deleted":
        delete_message(cast.vip.user, message_id)
    elif reason == "dismissed":
        dismiss(recipient.user, recipient.id, message_id)
    elif reason == "left":
        servers.remove_member(cast.server_id, recipient.id)
    elif reason == "role":
        servers.put_member(cast.server_id, recipient.id, [])
    else:
        servers.update_channel(cast.general, {"posting": "admins"})
    assert not _updates(here, recipient.id)[1].notifications


def test_a_client_at_the_latest_cursor_is_sent_nothing(cast):
    here, _ = _updates(None)
    post_and_notify(cast.subscriber, cast.general, "gold")
    latest, found = _updates(here, cast.vip.id)
    assert _messages(found, cast.vip.id)
    assert not _updates(latest, cast.vip.id)[1].notifications


def test_a_replay_sends_nothing_to_notified_users(cast):
    set_preference(cast.vip.user, cast.general, "none", None)
    _, run_id = post(cast.subscriber, cast.general)
    run_to_end(run_id)
    set_preference(cast.vip.user, cast.general, "all", None)
    here, _ = _updates(None)
    run_to_end(runs.replay(run_id, dry_run=False)["run_id"])
    assert list(_updates(here, cast.vip.id, cast.admin.id)[1].notifications) == [cast.vip.id]


def test_an_edit_reports_changed_counts(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    here, _ = _updates(None)
    edit(cast.subscriber, message_id, "gold, @vera")
    latest, found = _updates(here, cast.vip.id)
    assert found.counts_changed
    assert not found.notifications  # vera has this notification already; it is a mention now
    assert not _updates(latest, cast.vip.id)[1].counts_changed


def test_a_message_to_thousands_takes_one_log_row_and_one_query_for_all_clients(cast):
    people = add_members(cast.server_id, 3_000)
    here, _ = _updates(None)
    with statements() as few:
        _connected_updates(here, *people[:2])
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    assert db.execute_sql("SELECT count(*) FROM notification_log").fetchone() == (3,)
    with statements() as many:
        found = _connected_updates(here, *people)
    assert all(len(_messages(found, user_id)) == 3 for user_id in people)
    assert len(many) == len(few) + 2  # the servers of the users, and the notifications


def test_a_cursor_older_than_the_log_is_reset(cast):
    here, _ = _updates(None)
    post_and_notify(cast.subscriber, cast.general, "gold")
    expired = replace(here, created_at=here.created_at - updates.LOG_RETENTION_HOURS * 3600)
    foreign = replace(here, snapshot="999999999:999999999:")
    for since in (expired, foreign):
        found = _updates(since, cast.vip.id)[1]
        assert found.overflow
        assert not found.notifications


def test_notifications_in_other_servers_take_no_lookups(cast, override):
    here, _ = _updates(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    override(stream_max_lookups=0, resume_max_lookups=0)
    found = _updates(here, cast.stranger.id)[1]
    assert not found.overflow
    assert not found.notifications


def test_an_admin_who_left_the_server_is_sent_their_notifications(cast):
    here, _ = _updates(None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    servers.remove_member(cast.server_id, cast.admin.id)
    assert _messages(_updates(here, cast.admin.id)[1], cast.admin.id) == [message_id]


def test_updates_beyond_the_lookup_limit_overflow(cast, override):
    here, _ = _updates(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    override(stream_max_lookups=5)
    assert not _connected_updates(here, cast.vip.id).overflow
    assert _connected_updates(here, cast.vip.id, cast.admin.id).overflow


def test_log_rows_copied_from_another_database_are_purged(cast):
    db.execute_sql(
        "INSERT INTO notification_log (xid, message_ids)"
        " SELECT (pg_current_xact_id()::text::bigint + n)::text::xid8, '{1}' FROM generate_series(2, 3000) n"
    )
    assert updates.purge_log(5_000) == 2_999
    post_and_notify(cast.subscriber, cast.general, "gold")
    assert updates.purge_log(5_000) == 0
    assert db.execute_sql("SELECT count(*) FROM notification_log").fetchone() == (1,)


def test_a_message_of_many_slices_is_looked_up_once(cast, set_slice_size, override):
    people = add_members(cast.server_id, 30)
    set_slice_size(3)
    here, _ = _updates(None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    assert db.execute_sql("SELECT count(*) > 10 FROM notification_log").fetchone() == (True,)
    override(stream_max_lookups=30)
    found = _updates(here, *people)[1]
    assert all(_messages(found, user_id) == [message_id] for user_id in people)


def test_updates_beyond_the_log_row_limit_overflow(cast, override):
    override(stream_max_log_rows=2)
    here, _ = _updates(None)
    for _ in range(2):
        post_and_notify(cast.subscriber, cast.general, "gold")
    assert not _connected_updates(here, cast.vip.id).overflow
    post_and_notify(cast.subscriber, cast.general, "gold")
    assert _connected_updates(here, cast.vip.id).overflow
    assert not _connected_updates(here).overflow  # there are no users to look up


def test_the_log_is_read_once_for_all_clients_up_to_a_limit(cast, override):
    """The number of rows that are read does not grow with the number or the age of the cursors."""
    cursors = []
    for _ in range(8):
        cursors.append(parsed_again(_updates(None)[0]))
        post_and_notify(cast.subscriber, cast.general, "gold")
    clients = [(person.id, since) for since in cursors for person in (cast.vip, cast.admin)]
    with statements() as one:
        _resumed_updates(clients[-1])
    with statements() as all_:
        found = _resumed_updates(*clients)
    assert len(all_) == len(one)
    assert [len(_messages(found[client], client[0])) for client in clients[::2]] == [8, 7, 6, 5, 4, 3, 2, 1]
    override(resume_max_log_rows=3)
    found = _resumed_updates(*clients)
    assert [found[client].overflow for client in clients[::2]] == [True] * 5 + [False] * 3
    assert [len(_messages(found[client], client[0])) for client in clients[10::2]] == [3, 2, 1]


def test_no_notification_is_read_for_a_transaction_with_too_many_messages(cast, override):
    here, _ = _updates(None)
    run_ids = [post(cast.subscriber, cast.general)[1] for _ in range(5)]
    assert len(fanout.process_batch(claims.claim_batch(run_ids[0], run_ids[1:], 1_000))) == 5
    override(resume_max_log_rows=3)
    client = (cast.vip.id, parsed_again(here))
    with no_notification_is_read():
        assert _resumed_updates(client)[client].overflow


def test_resuming_clients_beyond_the_lookup_limit_are_left_for_the_next_call(cast, override):
    override(resume_max_lookups=4)
    here, _ = _updates(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    since, current = parsed_again(here), parsed_again(_updates(None)[0])
    clients = [(cast.vip.id, since), (cast.vip.id, current), (cast.admin.id, since), (cast.moderator.id, since)]
    found = _resumed_updates(*clients)
    assert list(found) == clients[:2]
    assert len(_messages(found[clients[0]], cast.vip.id)) == 3
    assert list(_resumed_updates(*clients[2:])) == clients[2:3]  # at least one client


def test_a_client_that_missed_too_many_notifications_is_reset_without_a_lookup(cast):
    here, _ = _updates(None)
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    client = (cast.vip.id, parsed_again(here))
    assert not _resumed_updates(client, most=3)[client].overflow
    with no_notification_is_read():
        assert _resumed_updates(client, most=2)[client].overflow


def test_an_invalid_cursor_is_reset_without_a_lookup(cast, override):
    """The cursor is forged, or signed with a secret key that has changed since."""
    here, _ = _updates(None)
    post_and_notify(cast.subscriber, cast.general, "gold")
    unsigned, genuine = StreamCursor.parse(str(here).rpartition(".")[0]), parsed_again(here)
    with no_notification_is_read():
        assert _resumed_updates((cast.vip.id, unsigned))[cast.vip.id, unsigned].overflow
        override(secret_key="another key, which is set from now on")
        cursor._signature.cache_clear()
        assert _resumed_updates((cast.vip.id, genuine))[cast.vip.id, genuine].overflow
    cursor._signature.cache_clear()


def test_an_edit_changes_counts_only_for_members_of_its_server(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    here, _ = _updates(None)
    edit(cast.subscriber, message_id, "gold, @vera")
    changed = _updates(here, cast.vip.id, cast.moderator.id, cast.stranger.id)[1].counts_changed
    assert changed == {cast.vip.id, cast.moderator.id}


def test_log_rows_are_kept_for_a_day(cast):
    for _ in range(3):
        post_and_notify(cast.subscriber, cast.general, "gold")
    for message_id, age in ((1, "24 hours 1 second"), (2, "23 hours 59 minutes")):
        db.execute_sql(
            "UPDATE notification_log SET notified_at = now() - %s::interval WHERE message_ids = ARRAY[%s::bigint]",
            (age, message_id),
        )
    assert updates.purge_log(5_000) == 1
    assert db.execute_sql("SELECT array_agg(message_ids[1] ORDER BY xid) FROM notification_log").fetchone() == ([2, 3],)


def test_an_old_cursor_reads_only_log_rows_that_follow_it(cast):
    post_and_notify(cast.subscriber, cast.general, "gold")
    db.execute_sql(
        "INSERT INTO notification_log (xid, message_ids) SELECT n::text::xid8, '{1}' FROM generate_series(3, 600) n"
        " ON CONFLICT DO NOTHING"
    )
    db.execute_sql("ANALYZE notification_log")
    here, _ = _updates(None)
    plan = db.execute_sql(
        "EXPLAIN SELECT FROM notification_log WHERE xid >= pg_snapshot_xmin(%(since)s::pg_snapshot)"
        " AND NOT pg_visible_in_snapshot(xid, %(since)s::pg_snapshot)",
        {"since": here.snapshot},
    ).fetchall()
    assert "Index Cond: (xid >=" in " ".join(line for (line,) in plan)


STEPS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(["notify", "notify", "commit", "roll back", "receive"]), strategies.integers(0, 3)
    ),
    max_size=40,
)


@given(STEPS, strategies.data())
@settings(max_examples=60, deadline=None)
def test_each_notification_is_sent_once_for_any_order_of_commits_and_disconnects(steps, data):
    """Four transactions insert notifications; a client receives updates, is cut off at any event, and resumes."""
    db.execute_sql("TRUNCATE user_account, server, message, notification_log, notification RESTART IDENTITY CASCADE")
    cast = make_cast()
    user_id = cast.vip.id
    sessions = [psycopg.connect(belfry.database_url) for _ in range(4)]
    open_messages: list[list[int]] = [[], [], [], []]
    committed: list[int] = []
    sent: list[int] = []
    since, _ = _updates(None)

    def receive(since: StreamCursor) -> StreamCursor:
        here, found = _updates(since, user_id)
        events = found.notifications.get(user_id, [])
        arrived = data.draw(strategies.integers(0, len(events)))
        sent.extend(notification["message_id"] for _, notification in events[:arrived])
        if arrived == len(events):
            return here
        return events[arrived - 1][0] if arrived else since

    try:
        for step, number in steps:
            session = sessions[number]
            if step == "receive":
                since = receive(since)
            elif step == "commit":
                session.commit()
                committed += open_messages[number]
                open_messages[number] = []
            elif step == "roll back":
                session.rollback()
                open_messages[number] = []
            elif step == "notify" and not open_messages[number]:
                message_ids = [post(cast.subscriber, cast.general)[0] for _ in range(2)]
                session.execute(
                    "INSERT INTO notification (user_id, message_id, reason)"
                    " SELECT %s, unnest(%s::bigint[]), 'message'",
                    [user_id, message_ids],
                )
                session.execute("INSERT INTO notification_log (message_ids) VALUES (%s)", [message_ids])
                open_messages[number] = message_ids
        for number, session in enumerate(sessions):
            session.commit()
            committed += open_messages[number]
    finally:
        for session in sessions:
            session.close()
    here, found = _updates(since, user_id)
    assert not found.overflow
    assert sorted(sent + _messages(found, user_id)) == sorted(committed)
    assert not _updates(here, user_id)[1].notifications
