"""A model of unread notifications in plain Python: a server, its messages, and what each user's inbox shows.

Written from the documented behaviour of messages, decisions and the inbox. Nothing here may be copied from, or shared
with, the code under test.
"""

from dataclasses import dataclass, field

from tests import oracle

FOREVER = 2**63 - 1


@dataclass
class Person:
    username: str
    admin: bool = False
    subscription: oracle.Subscription | None = None
    member: bool = True
    roles: set[int] = field(default_factory=set)
    preferences: dict[int, oracle.Preference] = field(default_factory=dict)  # by channel; a user who leaves keeps them


@dataclass
class Channel:
    private: bool = False
    posting: str = "members"
    roles: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Mentions:
    people: frozenset[int] = frozenset()
    roles: frozenset[int] = frozenset()
    everyone: bool = False

    def without(self, other: "Mentions") -> "Mentions":
        everyone = self.everyone and not other.everyone
        return Mentions(self.people - other.people, self.roles - other.roles, everyone)

    def includes(self, number: int, roles: set[int]) -> bool:
        return number in self.people or bool(self.roles & roles) or self.everyone


@dataclass
class Message:
    channel: int
    author: int
    mentions: Mentions
    deleted: bool = False


@dataclass
class Run:
    """`slices` is None before the run is sliced; then {after: (up to, users notified first)} of the slices left."""

    message: int
    kind: str
    added: Mentions = Mentions()
    removed: Mentions = Mentions()
    slices: dict[int, tuple[int, set[int]]] | None = None


@dataclass
class Notification:
    reason: str
    read: bool = False
    dismissed: bool = False
    transaction: int = 0  # the transaction that inserted it
    changed: int = 0  # the transaction of the last edit that changed its reason


@dataclass
class World:
    people: dict[int, Person]
    channels: dict[int, Channel]
    moderators: int  # the role that moderates
    fanout_slice_size: int
    messages: dict[int, Message] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)  # unfinished
    notified: dict[tuple[int, int], Notification] = field(default_factory=dict)  # by user and message
    transaction: int = 0  # counter of fan-out transactions

    # Permissions -------------------------------------------------------------------------------------------

    def sees(self, number: int, channel_id: int) -> bool:
        person, channel = self.people[number], self.channels[channel_id]
        return person.admin or (person.member and (not channel.private or bool(person.roles & channel.roles)))

    def refusal_to_post(self, number: int, channel_id: int) -> int | None:
        """The status of the response to a user who may not post; None if the user may post."""
        person = self.people[number]
        if not self.sees(number, channel_id):
            return 404
        if person.admin:
            return None
        pays = person.subscription is not None and person.subscription.status in ("active", "trialing")
        return None if pays and self.channels[channel_id].posting == "members" else 403

    def resolve(self, author: int, channel_id: int, wanted: Mentions) -> Mentions:
        """The mentions that take effect, of those that the author wrote."""
        channel, person = self.channels[channel_id], self.people[author]
        visible = {
            number
            for number in wanted.people
            if self.people[number].member and (not channel.private or self.people[number].roles & channel.roles)
        }
        pings = person.admin or self.moderators in person.roles
        return Mentions(frozenset(visible), wanted.roles if pings else frozenset(), pings and wanted.everyone)

    # Fan-out -----------------------------------------------------------------------------------------------

    def decision(self, number: int, message: Message, now: object) -> str:
        channel = self.channels[message.channel]
        scenario = oracle.Scenario(
            members={
                one: oracle.Member(
                    person.admin, person.subscription, frozenset(person.roles), person.preferences.get(message.channel)
                )
                for one, person in self.people.items()
                if person.member
            },
            author=message.author,
            private=channel.private,
            channel_roles=frozenset(channel.roles),
            mentioned=message.mentions.people,
            mentioned_roles=message.mentions.roles,
            everyone=message.mentions.everyone,
        )
        return oracle.decision(scenario, number, now)  # type: ignore[arg-type]

    def members(self) -> list[int]:
        return sorted(number for number, person in self.people.items() if person.member)

    def process_work_item(self, run_id: int, after: int | None, now: object) -> None:
        """Process the run itself (`after` is None), or the slice that begins after a user id."""
        self.transaction += 1
        run = self.runs[run_id]
        message, members = self.messages[run.message], self.members()
        if after is not None:
            assert run.slices is not None
            up_to, first = run.slices.pop(after)
            self._retract_from_former_members(run, after, up_to)
            self._notify(run, [one for one in members if after < one <= up_to and one not in first], now)
        elif message.deleted or len(members) <= self.fanout_slice_size:
            run.slices = {}
            self._retract_from_former_members(run, 0, FOREVER)
            self._notify(run, members, now)
        else:
            named = [one for one in members if one in message.mentions.people]
            by_role = [one for one in members if self.people[one].roles & message.mentions.roles]
            first = (named + [one for one in by_role if one not in named])[: self.fanout_slice_size]
            begin = [0, *(one - 1 for one in members[self.fanout_slice_size :: self.fanout_slice_size])]
            run.slices = {
                begins: (ends, {one for one in first if begins < one <= ends})
                for begins, ends in zip(begin, [*begin[1:], FOREVER], strict=True)
            }
            self._notify(run, first, now)
        if not run.slices:
            del self.runs[run_id]

    def read_up_to(self, number: int, last: int) -> list[int]:
        """The messages that a mark up to `last` reads: not the older ones that a later transaction wrote or changed."""
        own = [id_ for user_id, id_ in self.notified if user_id == number and id_ <= last]
        newest = max(own, default=0)
        latest = self.notified[number, newest].transaction if own else 0
        unread = [(one, self.notified[number, one]) for one in self.shown(number, unread=True) if one <= last]
        return [
            id_ for id_, one in unread if id_ == newest or (one.transaction <= latest and one.changed <= latest)
        ]

    def process_run(self, run_id: int, now: object) -> None:
        """Process all members in one transaction, for any number of members."""
        run = self.runs.pop(run_id)
        self._notify(run, self.members(), now)

    def _notify(self, run: Run, numbers: list[int], now: object) -> None:
        message = self.messages[run.message]
        for number in () if message.deleted else numbers:
            decision = self.decision(number, message, now)
            existing = self.notified.get((number, run.message))
            if run.kind == "edit":
                self._notify_of_edit(run, number, decision, existing)
            elif decision in oracle.NOTIFY_DECISIONS and existing is None:
                self.notified[number, run.message] = Notification(decision, transaction=self.transaction)

    def _notify_of_edit(self, run: Run, number: int, decision: str, existing: Notification | None) -> None:
        """An edit notifies only the newly mentioned, and retracts unread notifications of removed mentions."""
        notifying, roles = decision in oracle.NOTIFY_DECISIONS, self.people[number].roles
        added, removed = run.added.includes(number, roles), run.removed.includes(number, roles)
        if existing and existing.reason == "mention_role" and run.removed.roles and decision != "mention_role":
            removed = True  # the user may have lost the role since
        if not added and not removed:
            return
        if existing is None:
            if added and notifying and decision != "message":
                self.notified[number, run.message] = Notification(decision, transaction=self.transaction)
        elif notifying:
            if existing.reason == "message" != decision:
                existing.read = False
            if existing.reason != decision:
                existing.reason, existing.changed = decision, self.transaction
        elif removed and not existing.read and not existing.dismissed:
            del self.notified[number, run.message]

    def _retract_from_former_members(self, run: Run, after: int, up_to: int) -> None:
        """An edit retracts unread notifications of removed mentions, also from former members."""
        message, removed = self.messages[run.message], run.removed
        for number, person in self.people.items():
            existing = self.notified.get((number, run.message))
            if message.deleted or person.member or existing is None or not after < number <= up_to:
                continue
            affected = number in removed.people or bool(removed.roles) or removed.everyone
            mention_removed = {
                "mention": number not in message.mentions.people,
                "mention_role": not message.mentions.roles,
                "mention_everyone": not message.mentions.everyone,
            }
            if affected and mention_removed.get(existing.reason) and not existing.read and not existing.dismissed:
                del self.notified[number, run.message]

    def replay_adds(self, message_id: int, now: object) -> int:
        """The number of users that a replay would notify."""
        message = self.messages[message_id]
        return sum(
            self.decision(number, message, now) in oracle.NOTIFY_DECISIONS and (number, message_id) not in self.notified
            for number in self.members()
        )

    # The inbox ---------------------------------------------------------------------------------------------

    def shown(self, number: int, *, unread: bool = False, channel_id: int | None = None) -> dict[int, Notification]:
        """The user's visible notifications by message, newest first."""
        found = {}
        for message_id in sorted(self.messages, reverse=True):
            message, one = self.messages[message_id], self.notified.get((number, message_id))
            if one is None or one.dismissed or (unread and one.read) or message.deleted:
                continue
            if channel_id not in (None, message.channel) or not self.sees(number, message.channel):
                continue
            posting, author = self.channels[message.channel].posting, self.people[message.author]
            if author.admin or (posting == "members" and self.sees(message.author, message.channel)):
                found[message_id] = one
        return found

    def unread(self, number: int) -> dict[str, object]:
        """The expected response of unread-count."""
        found = self.shown(number, unread=True)
        channels = []
        for channel_id in sorted({self.messages[message_id].channel for message_id in found}):
            here = [one for message_id, one in found.items() if self.messages[message_id].channel == channel_id]
            mentions = sum(one.reason != "message" for one in here)
            channels.append({"channel_id": channel_id, "unread": len(here), "mentions": mentions})
        return {
            "unread": len(found),
            "mentions": sum(one.reason != "message" for one in found.values()),
            "channels": channels,
        }
