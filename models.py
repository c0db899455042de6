"""Every table, index and constraint. `migrations/` creates them; a test compares the two.

The database refuses what the rules forbid: a role of another server, a second subscription of a user, a second
notification of a user for one message. Times are `timestamptz` in UTC. Text with a fixed set of values has a CHECK; the
four reasons of a notification are the type `reason`.
"""

from datetime import UTC, datetime
from typing import Any

from peewee import (
    SQL,
    BigAutoField,
    BigIntegerField,
    BlobField,
    BooleanField,
    Check,
    CompositeKey,
    Field,
    ForeignKeyField,
    IntegerField,
    JSONField,
    Model,
    SmallIntegerField,
    TextField,
    UUIDField,
    fn,
)
from playhouse.postgres_ext import ArrayField

from belfry.core.db import db

SUBSCRIPTION_STATUSES = (
    "active", "trialing", "past_due", "canceled", "unpaid", "incomplete", "incomplete_expired", "paused",
)  # as Stripe names them  # fmt: skip
RUN_KINDS = ("message", "edit", "test", "replay")
RUN_STATES = ("pending", "queued", "running", "succeeded", "failed")
UNFINISHED_STATES = ("pending", "queued", "running")
POSTING = ("members", "admins")
LEVELS = ("all", "mentions", "none")
REASONS = ("message", "mention", "mention_role", "mention_everyone")
QUEUED_SECONDS = 3  # after which the sweeper checks whether a queued work item is still in the queue
MAX_ATTEMPTS = 6  # of a run or slice before it is failed: the first, and five retries


class TimeField(Field):
    """`timestamptz`, always in UTC in Python. peewee's own DateTimeField drops the offset."""

    field_type = "TIMESTAMPTZ"

    def python_value(self, value: datetime | None) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None


class ReasonField(Field):
    """The reason of a notification: an enum of the database."""

    field_type = "reason"


class TransactionField(Field):
    """The id of a transaction, in 64 bits, which do not wrap around."""

    field_type = "XID8"


class SnapshotField(Field):
    """A snapshot: the set of transactions that are visible."""

    field_type = "PG_SNAPSHOT"


def _now() -> list[SQL]:
    return [SQL("DEFAULT now()")]


def _among(column: str, values: tuple[str, ...]) -> Any:
    listed = ", ".join(f"'{value}'" for value in values)
    return Check(f"{column} IN ({listed})")


class Table(Model):
    class Meta:
        database = db
        legacy_table_names = False
        only_save_dirty = True  # keeps what another request has changed in the meantime


class User(Table):
    id = BigAutoField()
    username = TextField(unique=True, collation="C")  # in the order of bytes, so that its index finds prefixes
    name = TextField()
    email = TextField(null=True)
    is_admin = BooleanField(constraints=[SQL("DEFAULT false")])
    created_at = TimeField(constraints=_now())
    admin_changed_at = TimeField(null=True)  # when `is_admin` last changed; NULL where it never did

    class Meta:
        table_name = "user_account"  # `user` is a reserved word


class ApiToken(Table):
    id = BigAutoField()
    user = ForeignKeyField(User, on_delete="CASCADE")
    token_hash = BlobField(unique=True)
    created_at = TimeField(constraints=_now())
    expires_at = TimeField(null=True)
    revoked_at = TimeField(null=True)

    class Meta:
        table_name = "api_token"


class Session(Table):
    """A signed-in browser (belfry/identity/sessions.py). Its user is that of the token."""

    session_hash = BlobField(primary_key=True)
    token = ForeignKeyField(ApiToken, on_delete="CASCADE")
    created_at = TimeField(constraints=_now())
    last_seen_at = TimeField(constraints=_now(), index=True)  # the sweeper deletes idle sessions


class Subscription(Table):
    user = ForeignKeyField(User, primary_key=True, on_delete="CASCADE")
    status = TextField(constraints=[_among("status", SUBSCRIPTION_STATUSES)])
    current_period_end = TimeField(null=True)
    updated_at = TimeField(constraints=_now())


class Server(Table):
    id = BigAutoField()
    name = TextField()
    created_at = TimeField(constraints=_now())


class Role(Table):
    id = BigAutoField()
    server = ForeignKeyField(Server, on_delete="CASCADE", index=False)
    name = TextField()
    moderator = BooleanField(constraints=[SQL("DEFAULT false")])

    class Meta:
        indexes = ((("server_id", "name"), True), (("id", "server_id"), True))


class Member(Table):
    """The key has the order in which a fan-out reads members: by server, then by user id."""

    server = ForeignKeyField(Server, on_delete="CASCADE", index=False)
    user = ForeignKeyField(User, on_delete="CASCADE")
    joined_at = TimeField(constraints=_now())

    class Meta:
        primary_key = CompositeKey("server", "user")


class MemberRole(Table):
    """Two composite foreign keys (in the migration) ensure that only members of a server have its roles."""

    role_id = BigIntegerField()
    user_id = BigIntegerField()
    server_id = BigIntegerField()
    added_at = TimeField(constraints=_now())

    class Meta:
        table_name = "member_role"
        primary_key = CompositeKey("role_id", "user_id")
        indexes = ((("server_id", "user_id"), False),)


class Channel(Table):
    id = BigAutoField()
    server = ForeignKeyField(Server, on_delete="CASCADE", index=False)
    name = TextField()
    private = BooleanField(constraints=[SQL("DEFAULT false")])
    posting = TextField(constraints=[_among("posting", POSTING), SQL("DEFAULT 'members'")])

    class Meta:
        indexes = ((("server_id", "name"), True), (("id", "server_id"), True))


class ChannelRole(Table):
    """The roles that can see a private channel."""

    channel_id = BigIntegerField()
    role_id = BigIntegerField()
    server_id = BigIntegerField()
    added_at = TimeField(constraints=_now())

    class Meta:
        table_name = "channel_role"
        primary_key = CompositeKey("channel_id", "role_id")
        indexes = ((("role_id",), False),)


class Preference(Table):
    """No row means `all`. The key begins with the channel, because a fan-out reads those of one channel."""

    channel = ForeignKeyField(Channel, on_delete="CASCADE", index=False)
    user = ForeignKeyField(User, on_delete="CASCADE", index=False)
    level = TextField(constraints=[_among("level", LEVELS), SQL("DEFAULT 'all'")])
    muted_until = TimeField(null=True)
    updated_at = TimeField(constraints=_now())

    class Meta:
        primary_key = CompositeKey("channel", "user")


class Message(Table):
    """`mentioned_*` are the mentions in `content`, resolved when written, and narrowed by `allowed_mentions`."""

    id = BigAutoField()
    channel = ForeignKeyField(Channel, index=False)
    author = ForeignKeyField(User, index=False)
    content = TextField()
    mentioned_users = ArrayField(BigIntegerField, index=False, constraints=[SQL("DEFAULT '{}'")])
    mentioned_roles = ArrayField(BigIntegerField, index=False, constraints=[SQL("DEFAULT '{}'")])
    mentions_everyone = BooleanField(constraints=[SQL("DEFAULT false")])
    allowed_mentions = JSONField(null=True)
    visible_to_user = ForeignKeyField(User, null=True, index=False)  # only for a test message to one user
    created_at = TimeField(constraints=_now())
    edited_at = TimeField(null=True)
    deleted_at = TimeField(null=True)

    class Meta:
        indexes = ((("channel_id", "id"), False),)  # lists the newest messages of a channel


# For the search.
Message.add_index(fn.to_tsvector(SQL("'simple'::regconfig"), Message.content), using="GIN", name="message_words")


class Run(Table):
    """One fan-out of one message. It is also the outbox, because it is inserted in the message's transaction.

    - `attempts`: the number of the newest attempt, which is its token: an older attempt cannot write any more.
    - `attempts_left`: attempts before it is `failed`.
    - `slices_left`: the number of its rows in `slice`; 0 for a small audience, and until the slices are planned.
    - `members_processed`, `members_total`: progress; the total is NULL until the audience is counted.
    - `sweep_after`: time from which the sweeper may enqueue it again; NULL where it is finished or has slices.
    - `mention_diff`: the mentions that an edit added and removed.
    """

    id = BigAutoField()
    message = ForeignKeyField(Message, index=True)
    kind = TextField(constraints=[_among("kind", RUN_KINDS)])
    state = TextField(constraints=[_among("state", RUN_STATES), SQL("DEFAULT 'pending'")])
    attempts = IntegerField(constraints=[SQL("DEFAULT 0")])
    attempts_left = SmallIntegerField(constraints=[SQL(f"DEFAULT {MAX_ATTEMPTS}")])
    slices_left = IntegerField(constraints=[SQL("DEFAULT 0")])
    members_processed = IntegerField(constraints=[SQL("DEFAULT 0")])
    members_total = IntegerField(null=True)
    notifications_inserted = IntegerField(constraints=[SQL("DEFAULT 0")])
    notifications_retracted = IntegerField(constraints=[SQL("DEFAULT 0")])
    decisions = JSONField(constraints=[SQL("DEFAULT '{}'")])
    mention_diff = JSONField(null=True)
    error = TextField(null=True)
    sweep_after = TimeField(null=True, constraints=[SQL(f"DEFAULT now() + interval '{QUEUED_SECONDS} seconds'")])
    created_at = TimeField(constraints=_now())
    started_at = TimeField(null=True)
    finished_at = TimeField(null=True)


# A message has exactly one run of its own; edits and replays add others.
Run.add_index(Run.message, unique=True, where=SQL("kind IN ('message', 'test')"), name="run_one_per_message")
# For the sweeper and /metrics: unfinished runs by time. It is small, because it contains no finished runs.
Run.add_index(Run.sweep_after, where=SQL("state IN ('pending', 'queued', 'running')"), name="run_unfinished")
# For `runs list --state failed` on a table of millions.
Run.add_index(Run.id, where=SQL("state = 'failed'"), name="run_failed")


class Slice(Table):
    """A slice of a large run: the members with `after_user_id < user_id <= to_user_id`, without `excluded_user_ids`.

    The transaction that processes a slice deletes its row. `attempts`, `attempts_left` and `sweep_after` are as those
    of a run; `sweep_after` is NULL for a slice that has no attempts left.
    """

    run = ForeignKeyField(Run, index=False)
    after_user_id = BigIntegerField()
    to_user_id = BigIntegerField()
    excluded_user_ids = ArrayField(BigIntegerField, index=False, constraints=[SQL("DEFAULT '{}'")])
    attempts = IntegerField(constraints=[SQL("DEFAULT 0")])
    attempts_left = SmallIntegerField(constraints=[SQL(f"DEFAULT {MAX_ATTEMPTS}")])
    error = TextField(null=True)
    sweep_after = TimeField(null=True, constraints=[SQL(f"DEFAULT now() + interval '{QUEUED_SECONDS} seconds'")])

    class Meta:
        primary_key = CompositeKey("run", "after_user_id")


class Notification(Table):
    """One row for each user and message. The partition in use has only its key, because each index slows the inserts.

    Partitioned by ranges of `message_id` (belfry/core/partitions.py), so that the key of the partition in use stays
    small. There are no foreign keys, which halve the rate; they are not needed, because users and messages are never
    deleted. Title and body are made from the message when they are read. A dismissed notification is marked by
    `dismissed_at` and not deleted, so that a repeated run cannot notify the user again.
    """

    user_id = BigIntegerField()
    message_id = BigIntegerField()
    created_at = TimeField(constraints=_now())
    read_at = TimeField(null=True)
    dismissed_at = TimeField(null=True)
    reason = ReasonField()

    class Meta:
        primary_key = CompositeKey("user_id", "message_id")


class NotificationLog(Table):
    """One row for each transaction that changed notifications, from which streams resume. Kept for a day.

    A client's cursor holds one of PostgreSQL's snapshots, which says exactly which `xid`s the client has seen, in
    whatever order they committed. The transaction's notifications have its `notified_at` as their `created_at`.
    `counts_changed`: it also retracted notifications or made some unread again. `snapshot`: the transactions that it
    saw; a list that shows what this one wrote shows all of theirs.
    """

    xid = TransactionField(primary_key=True, constraints=[SQL("DEFAULT pg_current_xact_id()")])
    message_ids = ArrayField(BigIntegerField, index=False)
    counts_changed = BooleanField(constraints=[SQL("DEFAULT false")])
    notified_at = TimeField(constraints=_now(), index=True)
    snapshot = SnapshotField(constraints=[SQL("DEFAULT pg_current_snapshot()")])

    class Meta:
        table_name = "notification_log"


NotificationLog.add_index(NotificationLog.xid, where=SQL("counts_changed"), name="notification_log_counts_changed")


class StreamEpoch(Table):
    """One row of an UNLOGGED table, which is lost in a crash and when a standby is promoted, and is then created again.

    After a crash PostgreSQL may use transaction ids again that it had assigned and not logged. So a cursor of the
    stream is valid only in the epoch in which it was issued.
    """

    one = BooleanField(primary_key=True, constraints=[SQL("DEFAULT true"), Check("one")])
    epoch = UUIDField(constraints=[SQL("DEFAULT gen_random_uuid()")])

    class Meta:
        table_name = "stream_epoch"


class IdempotencyKey(Table):
    user = ForeignKeyField(User, on_delete="CASCADE", index=False)
    key = TextField()
    request_hash = BlobField()
    response = TextField()  # as it was sent, byte for byte
    created_at = TimeField(constraints=_now(), index=True)  # the sweeper drops what is older than a day

    class Meta:
        table_name = "idempotency_key"
        primary_key = CompositeKey("user", "key")


TABLES = (
    User, ApiToken, Session, Subscription, Server, Role, Member, MemberRole, Channel, ChannelRole, Preference,
    Message, Run, Slice, Notification, NotificationLog, StreamEpoch, IdempotencyKey,
)  # fmt: skip
