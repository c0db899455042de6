"""Every JSON shape of the API, input and output.

Unknown fields, values of another type, and text that PostgreSQL cannot store are refused with the name of the field.
No schema reads the database. The types of the fields are in belfry/core/fields.py.
"""

from datetime import UTC, datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, pre_load, validates_schema
from marshmallow.validate import Length, OneOf, Range

from belfry.core.fields import (
    Flag,
    Id,
    QueryNumber,
    Text,
    Time,
    Trimmed,
    about,
    email_address,
    query_id,
    visible_name,
)
from belfry.fanout.decision import DECISIONS
from belfry.identity.users import SYSTEM_USERNAME
from belfry.inbox.inbox import parse_notification_id
from belfry.messages.mentions import EVERYONE, NAME, NAME_RULE
from belfry.messages.send_test import AUDIENCES
from models import LEVELS, POSTING, RUN_KINDS, RUN_STATES, SUBSCRIPTION_STATUSES

PAGE_DEFAULT, PAGE_MOST = 50, 100


class BaseSchema(Schema):
    class Meta:
        unknown = RAISE


# Fields ---------------------------------------------------------------------------------------------------


class Name(Trimmed):
    """A username or the name of a role, in lower case, that `@` can mention."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        given = super()._deserialize(value, attr, data, **kwargs)
        name = given.lower()
        if not given.isascii() or not NAME.match(name) or name == EVERYONE:  # of other letters some lower to ASCII
            raise ValidationError(f"Must be {NAME_RULE}.")
        if name == SYSTEM_USERNAME:
            raise ValidationError("This name is reserved.")
        return name


class NotificationId(fields.String):
    """The id of a notification, loaded as (user id, message id)."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        try:
            return parse_notification_id(super()._deserialize(value, attr, data, **kwargs))
        except ValueError as error:
            raise ValidationError(str(error)) from None


def message_content(**kwargs: Any) -> Trimmed:
    """The text of a message."""
    length = Length(1, 10_000, error="Must have 1 to 10,000 characters after trimming.")
    return Trimmed(validate=length, **about("CommonMark text, which is trimmed."), **kwargs)


# Errors and lists -----------------------------------------------------------------------------------------


class Problem(BaseSchema):
    """RFC 9457."""

    type = fields.String()
    title = fields.String()
    status = fields.Integer()
    detail = fields.String()
    code = fields.String()
    errors = fields.Dict(
        keys=fields.String(),
        values=fields.List(fields.String()),
        metadata={
            "description": "Reasons by field: 20 fields, and 20 reasons each, at most; `_schema` says how many more."
        },
    )


class Page(BaseSchema):
    """The part of a list that is returned."""

    limit = QueryNumber(load_default=PAGE_DEFAULT, validate=Range(1, PAGE_MOST), **about("The size of the page."))
    cursor = fields.String(load_default=None, **about("The `next` of the page before; nothing for the first page."))


# Users ----------------------------------------------------------------------------------------------------


class UserRef(BaseSchema):
    id = fields.Integer()
    username = fields.String()
    name = fields.String()


class UserIn(BaseSchema):
    username = Name(required=True, **about("The name in mentions, in lower case. It cannot be changed."))
    name = visible_name(load_default=None)
    email = email_address(load_default=None)
    is_admin = Flag(load_default=False, **about("Whether the user may administer everything."))


class UserChange(BaseSchema):
    name = visible_name()
    email = email_address()
    is_admin = Flag(**about("Whether the user may administer everything."))


class User(BaseSchema):
    id = fields.Integer()
    username = fields.String()
    name = fields.String()
    email = fields.String(allow_none=True)
    is_admin = fields.Boolean()
    created_at = Time()


class UserPage(Page):
    username = Text(load_default=None, **about("Only the user with this username."))


class SubscriptionIn(BaseSchema):
    status = fields.String(
        required=True, validate=OneOf(SUBSCRIPTION_STATUSES), **about("The state at the payment provider.")
    )
    current_period_end = Time(load_default=None, allow_none=True, **about("End of the paid period; null for none."))


class Subscription(BaseSchema):
    status = fields.String()
    current_period_end = Time(allow_none=True)
    updated_at = Time()


class Me(User):
    subscription = fields.Nested(Subscription, allow_none=True)
    servers = fields.List(fields.Nested(lambda: ServerRef()))


def _in_future(time: datetime) -> None:
    if time <= datetime.now(UTC):
        raise ValidationError("Must be in the future.")


class TokenIn(BaseSchema):
    expires_at = Time(
        load_default=None, allow_none=True, validate=_in_future, **about("When it expires; null for never.")
    )


class Token(BaseSchema):
    """`token` is only in the response that created it."""

    id = fields.Integer()
    token = fields.String()
    created_at = Time()
    expires_at = Time(allow_none=True)
    revoked_at = Time(allow_none=True)


class OwnToken(BaseSchema):
    """`current`: whether the request uses the token, or a session that it opened."""

    id = fields.Integer()
    created_at = Time()
    expires_at = Time(allow_none=True)
    revoked_at = Time(allow_none=True)
    current = fields.Boolean()


# Servers --------------------------------------------------------------------------------------------------


class ServerIn(BaseSchema):
    name = visible_name(required=True)


class ServerRef(BaseSchema):
    id = fields.Integer()
    name = fields.String()


class Server(ServerRef):
    created_at = Time()


class MemberIn(BaseSchema):
    user_id = Id(required=True, **about("The user to add."))
    role_ids = fields.List(
        Id(), load_default=None, validate=Length(max=100), **about("All their roles; null keeps them.")
    )


class MemberRoles(BaseSchema):
    role_ids = fields.List(Id(), required=True, validate=Length(max=100), **about("All roles of the member."))


class Member(BaseSchema):
    user = fields.Nested(UserRef)
    role_ids = fields.List(fields.Integer())
    joined_at = Time()


class RoleIn(BaseSchema):
    name = Name(required=True, **about("The name in mentions, in lower case."))
    moderator = Flag(load_default=False, **about("Its members may mention roles and everyone."))


class Role(BaseSchema):
    id = fields.Integer()
    name = fields.String()
    moderator = fields.Boolean()


class RoleList(BaseSchema):
    """All roles: `next` is always null."""

    items = fields.List(fields.Nested(Role))
    next = fields.String(allow_none=True)


class ChannelIn(BaseSchema):
    name = visible_name(required=True)
    private = Flag(load_default=False, **about("Only admins and members with certain roles see the channel."))
    posting = fields.String(
        load_default="members", validate=OneOf(POSTING), **about("Who may post: members who see it, or admins.")
    )


class ChannelChange(BaseSchema):
    name = visible_name()
    private = Flag(**about("Only admins and members with certain roles see the channel."))
    posting = fields.String(validate=OneOf(POSTING), **about("Who may post: members who see it, or admins."))


class ChannelRef(BaseSchema):
    id = fields.Integer()
    name = fields.String()


class Channel(ChannelRef):
    private = fields.Boolean()
    posting = fields.String()
    server = fields.Nested(ServerRef)


class ChannelRoles(BaseSchema):
    role_ids = fields.List(Id(), required=True, validate=Length(max=100), **about("Roles whose members see it."))


class MentionSuggestionQuery(BaseSchema):
    q = Text(load_default="", validate=Length(max=32), **about("The beginning of a name, without `@`."))
    limit = QueryNumber(load_default=8, validate=Range(1, 50), **about("How many there are at most."))


class MentionSuggestion(BaseSchema):
    """`id` is the user's or the role's; null for `everyone`."""

    kind = fields.String(validate=OneOf(("user", "role", "everyone")))
    id = fields.Integer(allow_none=True)
    username = fields.String()
    name = fields.String()


class MentionSuggestionList(BaseSchema):
    """The first suggestions: `next` is always null."""

    items = fields.List(fields.Nested(MentionSuggestion))
    next = fields.String(allow_none=True)


class PreferenceIn(BaseSchema):
    level = fields.String(
        load_default="all", validate=OneOf(LEVELS), **about("Which messages notify: all, only mentions, or none.")
    )
    muted_until = Time(
        load_default=None, allow_none=True, **about("Until then only mentions by name notify; null for no mute.")
    )


class Preference(BaseSchema):
    level = fields.String()
    muted_until = Time(allow_none=True)


# Messages -------------------------------------------------------------------------------------------------


class AllowedMentions(BaseSchema):
    users = fields.List(Id(), load_default=list, validate=Length(max=1000), **about("Users who may be mentioned."))
    roles = fields.List(Id(), load_default=list, validate=Length(max=1000), **about("Roles that may be mentioned."))
    everyone = Flag(load_default=False, **about("Whether `@everyone` may be mentioned."))


class MessageIn(BaseSchema):
    channel_id = Id(required=True, **about("The channel to post in."))
    content = message_content(required=True)
    allowed_mentions = fields.Nested(
        AllowedMentions, load_default=None, **about("Restricts whom the text mentions; null for no restriction.")
    )


class MessageChange(BaseSchema):
    content = message_content(required=True)


class MentionedUser(BaseSchema):
    id = fields.Integer()
    username = fields.String()


class MentionedRole(BaseSchema):
    id = fields.Integer()
    name = fields.String()


class Mentions(BaseSchema):
    users = fields.List(fields.Nested(MentionedUser))
    roles = fields.List(fields.Nested(MentionedRole))
    everyone = fields.Boolean()


class Warning_(BaseSchema):
    code = fields.String()
    detail = fields.String()


class RunRef(BaseSchema):
    id = fields.Integer()
    state = fields.String()
    url = fields.Function(lambda run: f"/api/runs/{run['id']}", metadata={"type": "string"})


class Message(BaseSchema):
    """`warnings` is only in the response to a POST or PATCH; `run` is null for all but the author and admins."""

    id = fields.Integer()
    channel_id = fields.Integer()
    author = fields.Nested(UserRef)
    content = fields.String()
    created_at = Time()
    edited_at = Time(allow_none=True)
    mentions = fields.Nested(Mentions)
    warnings = fields.List(
        fields.Nested(Warning_),
        metadata={"description": "20 at most; then one of code `more_warnings` says how many more there are."},
    )
    run = fields.Nested(RunRef, allow_none=True)


class SearchQuery(Page):
    q = Text(required=True, validate=Length(1, 200), **about('All words, `"a phrase"`, `-without`, `or`.'))
    channel_id = query_id("Only messages of this channel.")


class DeletedMessage(BaseSchema):
    """How many members had a notification of the message. Null where counting takes too long."""

    retracted = fields.Integer(allow_none=True, **about("Unread notifications, which are not shown any more."))
    read = fields.Integer(allow_none=True, **about("Notifications that had been read."))


class ExplainQuery(BaseSchema):
    user_id = query_id("The user whom the answer is about. The default is the caller.")


class Explanation(BaseSchema):
    user_id = fields.Integer()
    message_id = fields.Integer()
    decision = fields.String(validate=OneOf(tuple(DECISIONS)))
    detail = fields.String()
    notified_at = Time(allow_none=True)
    read_at = Time(allow_none=True)


# Runs -----------------------------------------------------------------------------------------------------


class Progress(BaseSchema):
    done = fields.Integer()
    total = fields.Integer(allow_none=True)


class Statistics(BaseSchema):
    audience = fields.Integer()
    notified = fields.Integer()
    inserted = fields.Integer()
    retracted = fields.Integer()
    decisions = fields.Dict(keys=fields.String(), values=fields.Integer())


class Run(BaseSchema):
    id = fields.Integer()
    message_id = fields.Integer()
    kind = fields.String(validate=OneOf(RUN_KINDS))
    state = fields.String(validate=OneOf(RUN_STATES))
    attempts = fields.Integer()
    progress = fields.Nested(Progress)
    stats = fields.Nested(Statistics)
    error = fields.String(allow_none=True)
    reason = fields.String(allow_none=True, **about("Why the last attempt failed, in words without details."))
    next_attempt_at = Time(allow_none=True, **about("When the next attempt of a run that is retried is due."))
    created_at = Time()
    started_at = Time(allow_none=True)
    finished_at = Time(allow_none=True)


class RunQuery(Page):
    state = fields.String(load_default=None, validate=OneOf(RUN_STATES), **about("Only runs in this state."))
    channel_id = query_id("Only runs of messages in this channel.")


class ReplayIn(BaseSchema):
    dry_run = Flag(load_default=False, **about("Whether to count only, and to create no run."))


class Replay(BaseSchema):
    dry_run = fields.Boolean()
    inserted = fields.Integer()
    unchanged = fields.Integer()
    decisions_before = fields.Dict(keys=fields.String(), values=fields.Integer())
    decisions_after = fields.Dict(keys=fields.String(), values=fields.Integer())
    run = fields.Nested(RunRef, allow_none=True)


class TestNotificationIn(BaseSchema):
    channel_id = Id(load_default=None, allow_none=True, **about("null for the caller's first channel."))
    content = message_content(load_default=None, allow_none=True)
    audience = fields.String(
        load_default="me", validate=OneOf(AUDIENCES), **about("Who is notified: the caller, or the channel.")
    )


# Inbox ----------------------------------------------------------------------------------------------------


class NotificationQuery(Page):
    unread = fields.Boolean(load_default=False, **about("Whether the list has only unread notifications."))
    mentions = fields.Boolean(load_default=False, **about("Whether the list has only mentions, of any kind."))
    channel_id = query_id("Only notifications from this channel.")


class StreamQuery(BaseSchema):
    channel_id = query_id("The channel of whose messages changes are sent; without it, of none.")


class Notification(BaseSchema):
    id = fields.String()
    type = fields.String(validate=OneOf(("message", "mention")))
    reason = fields.String()
    title = fields.String()
    body = fields.String()
    url = fields.String()
    message_id = fields.Integer()
    channel = fields.Nested(ChannelRef)
    server = fields.Nested(ServerRef)
    created_at = Time()
    read_at = Time(allow_none=True)


class ChannelUnread(BaseSchema):
    channel_id = fields.Integer()
    unread = fields.Integer()
    mentions = fields.Integer()


class UnreadCount(BaseSchema):
    unread = fields.Integer()
    mentions = fields.Integer()
    channels = fields.List(fields.Nested(ChannelUnread))


class MarkRead(BaseSchema):
    """Exactly one of the four. `up_to` leaves notifications unread that were committed later, even with a lower id."""

    ids = fields.List(NotificationId(), validate=Length(1, 1000), **about("These notifications."))
    up_to = NotificationId(**about("This notification and earlier ones, but for those that were committed later."))
    channel_id = Id(**about("All notifications from this channel."))
    all = Flag(**about("All notifications. Must be true."))

    @pre_load
    def _count(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        if len(data.keys() & {"ids", "up_to", "channel_id", "all"}) != 1:
            raise ValidationError("Give exactly one of ids, up_to, channel_id and all.")
        return data

    @validates_schema
    def _all_is_true(self, data: dict[str, Any], **_: Any) -> None:
        if data.get("all") is False:
            raise ValidationError("Must be true.", "all")


class Marked(BaseSchema):
    marked = fields.Integer()
    unread = fields.Integer()
