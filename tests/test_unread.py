"""Unread counts cannot drift: whatever is posted, told, read, edited, deleted and withheld, in whatever order and at
once, what is counted is what is shown, and what a model in plain Python says."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import jobs
from belfry import communities, fanout, leases, runs
from belfry.leases import Part
from belfry.sql import rows
from belfry.verification import verify
from tests import oracle
from tests.people import Api, Person, make_cast, make_person
from tests.telling import do, empty, parts_of
from tests.unread_model import Channel, Mentions, Message, Run, World
from tests.unread_model import Person as Modelled

PAGE = 4
GROUPS = ("", "", "", "@vip", "@moderators", "@everyone", "@vip @everyone")
COUNT = "/api/notifications/unread-count"


def walk(api: Api, query: str) -> list[dict[str, Any]]:
    """All that the pages of an inbox show, page by page."""
    items, cursor = [], ""
    while True:
        page = api.get(f"/api/notifications?limit={PAGE}&{query}{cursor}").get_json()
        items += page["items"]
        if not page["next"]:
            return items
        cursor = f"&cursor={page['next']}"


def counted(items: list[dict[str, Any]]) -> dict[str, Any]:
    """What unread-count is to say of these items."""
    channels = []
    for channel_id in sorted({item["channel"]["id"] for item in items}):
        here = [item["type"] for item in items if item["channel"]["id"] == channel_id]
        channels.append({"channel_id": channel_id, "unread": len(here), "mentions": here.count("mention")})
    mentions = sum(item["type"] == "mention" for item in items)
    return {"unread": len(items), "mentions": mentions, "channels": channels}


class Unread(RuleBasedStateMachine):
    """The API on one side, tests/unread_model.py on the other."""

    app: Any

    @initialize(data=st.data(), slice_members=st.sampled_from([2, 4, 100]))
    def begin(self, data: Any, slice_members: int) -> None:
        empty()
        self.patch = pytest.MonkeyPatch()
        small = replace(fanout.settings, slice_members=slice_members)
        for module in (fanout, runs, jobs):
            self.patch.setattr(module, "settings", small)
        cast = make_cast()
        root = make_person("root", admin=True)  # who governs, and is in no server
        persons = [*cast.everybody.values(), make_person("quentin"), make_person("xenia", admin=True)]
        for newcomer in persons[-2:]:
            communities.put_member(cast.server_id, newcomer.id, [cast.vip_role])
        self.cast, self.persons = cast, {person.id: person for person in persons}
        self.root = self.api(root)
        statuses = {"vera": "trialing", "lars": "canceled", "ada": None}
        self.world = World(
            people={
                person.id: Modelled(
                    person.username,
                    admin=person.username in ("ada", "xenia"),
                    subscription=oracle.Subscription(status)
                    if (status := statuses.get(person.username, "active"))
                    else None,
                    member=person is not cast.stranger,
                )
                for person in persons
            },
            channels={
                cast.general: Channel(),
                cast.announcements: Channel(posting="admins"),
                cast.vault: Channel(private=True, roles={cast.vip_role}),
            },
            moderators=cast.moderators_role,
            slice_members=slice_members,
        )
        self.world.people[cast.moderator.id].roles = {cast.moderators_role}
        for person in (cast.vip, *persons[-2:]):
            self.world.people[person.id].roles = {cast.vip_role}
        self.turns = cycle(self.persons)

    def api(self, person: Person) -> Api:
        return Api(self.app.test_client(), person.token)

    def ask(self, number: int) -> Api:
        return self.api(self.persons[number])

    def somebody(self, data: Any) -> int:
        return data.draw(st.sampled_from(list(self.persons)), label="who")

    def somewhere(self, data: Any) -> int:
        return data.draw(st.sampled_from(list(self.world.channels)), label="channel")

    def a_message(self, data: Any) -> int:
        return data.draw(st.sampled_from(list(self.world.messages)), label="message")

    def a_text(self, data: Any) -> tuple[str, Mentions]:
        named = data.draw(st.sets(st.sampled_from(list(self.persons)), max_size=3), label="named")
        groups = data.draw(st.sampled_from(GROUPS), label="groups")
        roles = {"@vip": self.cast.vip_role, "@moderators": self.cast.moderators_role}
        wanted = Mentions(
            frozenset(named), frozenset(id_ for name, id_ in roles.items() if name in groups), "@everyone" in groups
        )
        return f"gold {' '.join('@' + self.persons[one].username for one in sorted(named))} {groups}", wanted

    @property
    def now(self) -> datetime:
        return datetime.now(UTC)

    # Messages and their fan-outs ---------------------------------------------------------------------------

    @rule(data=st.data())
    def post(self, data: Any) -> None:
        author, channel_id = self.somebody(data), self.somewhere(data)
        content, wanted = self.a_text(data)
        answer = self.ask(author).post("/api/messages", json={"channel_id": channel_id, "content": content})
        refused = self.world.refusal_to_post(author, channel_id)
        assert answer.status_code == (refused or 201), answer.get_json()
        if not refused:
            posted = answer.get_json()
            mentions = self.world.resolve(author, channel_id, wanted)
            self.world.messages[posted["id"]] = Message(channel_id, author, mentions)
            self.world.runs[posted["run"]["id"]] = Run(posted["id"], "message")

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def edit(self, data: Any) -> None:
        message_id = self.a_message(data)
        message = self.world.messages[message_id]
        content, wanted = self.a_text(data)
        answer = self.ask(message.author).patch(f"/api/messages/{message_id}", json={"content": content})
        refused = 404 if message.deleted else self.world.refusal_to_post(message.author, message.channel)
        assert answer.status_code == (refused or 200), answer.get_json()
        if not refused:
            was, message.mentions = message.mentions, self.world.resolve(message.author, message.channel, wanted)
            added, removed = message.mentions.without(was), was.without(message.mentions)
            if added != Mentions() or removed != Mentions():
                self.world.runs[answer.get_json()["run"]["id"]] = Run(message_id, "edit", added, removed)

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        message_id = self.a_message(data)
        status = 404 if self.world.messages[message_id].deleted else 204
        assert self.root.delete(f"/api/messages/{message_id}").status_code == status
        self.world.messages[message_id].deleted = True

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def replay(self, data: Any) -> None:
        message_id = self.a_message(data)
        (first,) = rows("SELECT min(id) AS id FROM run WHERE message_id = %(id)s", {"id": message_id})
        answer = self.root.post(f"/api/runs/{first['id']}/replay", json={"dry_run": False})
        if self.world.messages[message_id].deleted:
            assert answer.status_code == 403
            return
        adds = self.world.replay_adds(message_id, self.now)
        assert (answer.status_code, answer.get_json()["added"]) == (202 if adds else 200, adds)
        if adds:
            self.world.runs[answer.get_json()["run"]["id"]] = Run(message_id, "replay")

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def fan_out(self, data: Any) -> None:
        run_id = data.draw(st.sampled_from(list(self.world.runs)), label="run")
        while run_id in self.world.runs:
            self._do_part(Part(run_id, self._next_slice(run_id)))

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def fan_out_one_part(self, data: Any) -> None:
        part = data.draw(st.sampled_from([part for id_ in self.world.runs for part in parts_of(id_)]), label="part")
        self._do_part(part)

    def _next_slice(self, run_id: int) -> int | None:
        slices = self.world.runs[run_id].slices
        return min(slices) if slices else None

    def _do_part(self, part: Part) -> None:
        do(part)
        self.world.do_part(part.run_id, part.after, self.now)
        left = self.world.runs.get(part.run_id)
        assert [one.after for one in parts_of(part.run_id)] == (sorted(left.slices or ()) if left else [])

    @precondition(lambda self: self.world.runs)
    @rule()
    def fan_out_together(self) -> None:
        """As small messages are that wait."""
        first, *others = self.world.runs
        done = fanout.tell_together(leases.take_together(first, others, 1_000))
        expected = [id_ for id_, run in self.world.runs.items() if run.kind == "message" and run.slices is None]
        assert done == expected
        for run_id in done:
            self.world.do_whole(run_id, self.now)

    # The reader --------------------------------------------------------------------------------------------

    def _read(self, number: int, which: dict[str, Any], marked: list[int]) -> None:
        answer = self.ask(number).post("/api/notifications/read", json=which)
        assert answer.status_code == 200, answer.get_json()
        for message_id in marked:
            self.world.told[number, message_id].read = True
        assert answer.get_json() == {"marked": len(marked), "unread": self.world.unread(number)["unread"]}

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def read_some(self, data: Any) -> None:
        number = self.somebody(data)
        some = data.draw(st.lists(st.sampled_from(list(self.world.messages)), min_size=1, max_size=5), label="some")
        unread = self.world.shown(number, unread=True)
        self._read(number, {"ids": [f"{number}-{one}" for one in some]}, [one for one in unread if one in some])

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def read_up_to(self, data: Any) -> None:
        number, last = self.somebody(data), self.a_message(data)
        unread = self.world.shown(number, unread=True)
        self._read(number, {"up_to": f"{number}-{last}"}, [one for one in unread if one <= last])

    @rule(data=st.data())
    def read_channel(self, data: Any) -> None:
        number, channel_id = self.somebody(data), self.somewhere(data)
        if self.world.sees(number, channel_id):
            unread = self.world.shown(number, unread=True, channel_id=channel_id)
            self._read(number, {"channel_id": channel_id}, list(unread))
        else:
            answer = self.ask(number).post("/api/notifications/read", json={"channel_id": channel_id})
            assert answer.status_code == 404

    @rule(data=st.data())
    def read_all(self, data: Any) -> None:
        number = self.somebody(data)
        self._read(number, {"all": True}, list(self.world.shown(number, unread=True)))

    @precondition(lambda self: self.world.told)
    @rule(data=st.data())
    def dismiss(self, data: Any) -> None:
        number, message_id = data.draw(st.sampled_from(list(self.world.told)), label="which")
        answer = self.ask(number).delete(f"/api/notifications/{number}-{message_id}")
        shown = message_id in self.world.shown(number)
        assert answer.status_code == (204 if shown else 404)
        if shown:
            self.world.told[number, message_id].dismissed = True

    @rule(data=st.data(), level=st.sampled_from(["all", "mentions", "none"]), hours=st.sampled_from([None, -1, 1]))
    def prefer(self, data: Any, level: str, hours: int | None) -> None:
        number, channel_id = self.somebody(data), self.somewhere(data)
        until = self.now + timedelta(hours=hours) if hours else None
        wish = {"level": level, "muted_until": until.isoformat() if until else None}
        answer = self.ask(number).put(f"/api/channels/{channel_id}/preference", json=wish)
        sees = self.world.sees(number, channel_id)
        assert answer.status_code == (200 if sees else 404)
        if sees:
            self.world.people[number].wishes[channel_id] = oracle.Preference(level, until)

    # Rights that come and go -------------------------------------------------------------------------------

    @rule(data=st.data(), roles=st.sampled_from([None, (), ("vip",), ("moderators",), ("vip", "moderators")]))
    def put_in_or_out(self, data: Any, roles: tuple[str, ...] | None) -> None:
        number = self.somebody(data)
        person, address = self.world.people[number], f"/api/servers/{self.cast.server_id}/members/{number}"
        if roles is None:
            assert self.root.delete(address).status_code == (204 if person.member else 404)
            person.member, person.roles = False, set()
        else:
            person.roles = {self.cast.vip_role if role == "vip" else self.cast.moderators_role for role in roles}
            assert self.root.put(address, json={"role_ids": list(person.roles)}).status_code == 200
            person.member = True

    @rule(data=st.data(), is_admin=st.booleans())
    def appoint(self, data: Any, is_admin: bool) -> None:
        number = self.somebody(data)
        assert self.root.patch(f"/api/users/{number}", json={"is_admin": is_admin}).status_code == 200
        self.world.people[number].admin = is_admin

    @rule(data=st.data(), status=st.sampled_from(["active", "canceled"]))
    def subscribe(self, data: Any, status: str) -> None:
        number = self.somebody(data)
        assert self.root.put(f"/api/users/{number}/subscription", json={"status": status}).status_code == 200
        self.world.people[number].subscription = oracle.Subscription(status)

    @rule(data=st.data(), private=st.booleans(), posting=st.sampled_from(["members", "admins"]))
    def change_channel(self, data: Any, private: bool, posting: str) -> None:
        channel_id = self.somewhere(data)
        changed = {"private": private, "posting": posting}
        assert self.root.patch(f"/api/channels/{channel_id}", json=changed).status_code == 200
        self.world.channels[channel_id].private, self.world.channels[channel_id].posting = private, posting

    @rule(data=st.data(), roles=st.sets(st.sampled_from(["vip", "moderators"])))
    def open_channel_to(self, data: Any, roles: set[str]) -> None:
        channel_id = self.somewhere(data)
        ids = {self.cast.vip_role if role == "vip" else self.cast.moderators_role for role in roles}
        assert self.root.put(f"/api/channels/{channel_id}/roles", json={"role_ids": list(ids)}).status_code == 200
        self.world.channels[channel_id].roles = ids

    # What has to hold --------------------------------------------------------------------------------------

    def check(self, number: int) -> None:
        api = self.ask(number)
        expected = self.world.shown(number, unread=True)
        items = walk(api, "unread=1")
        assert {item["message_id"]: item["reason"] for item in items} == {
            message_id: one.reason for message_id, one in expected.items()
        }
        assert [item["message_id"] for item in items] == list(expected)
        assert api.get(COUNT).get_json() == self.world.unread(number) == counted(items)

    def check_pages(self, number: int) -> None:
        shown = self.world.shown(number)
        found = walk(self.ask(number), "")
        assert {item["message_id"]: item["read_at"] is not None for item in found} == {
            message_id: one.read for message_id, one in shown.items()
        }
        assert [item["message_id"] for item in found] == list(shown)
        for channel_id in self.world.channels:
            if self.world.sees(number, channel_id):
                here = walk(self.ask(number), f"channel_id={channel_id}")
                assert [one["message_id"] for one in here] == list(self.world.shown(number, channel_id=channel_id))

    @invariant()
    def two_of_them_find_what_they_should(self) -> None:
        if hasattr(self, "turns"):
            self.check(next(self.turns))
            self.check(next(self.turns))

    def teardown(self) -> None:
        if not hasattr(self, "turns"):
            return
        try:
            for number in self.persons:
                self.check(number)
                self.check_pages(number)
            while self.world.runs:
                run_id = next(iter(self.world.runs))
                self._do_part(Part(run_id, self._next_slice(run_id)))
            for number in self.persons:
                self.check(number)
            assert verify() == []
        finally:
            self.patch.undo()


def test_the_unread_are_what_the_model_says_whatever_happens(app):
    machine = type("UnreadOf", (Unread,), {"app": app})
    case = machine.TestCase
    case.settings = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
