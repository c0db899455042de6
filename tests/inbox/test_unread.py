"""Unread counts cannot drift: after any sequence of posts, edits, reads and deletions they match what the inbox shows
and a model in plain Python."""

from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from belfry.core.db import fetch_all
from belfry.fanout import claims, fanout
from belfry.fanout.claims import WorkItem
from belfry.integrity.verification import verify
from belfry.servers import servers
from tests import oracle
from tests.fanout_helpers import claim_and_process, delete_all_data, remaining_work_items
from tests.inbox.unread_model import Channel, Mentions, Message, Run, World
from tests.inbox.unread_model import Person as Modelled
from tests.overrides import overridden
from tests.people import Api, Person, make_cast, make_person

pytestmark = pytest.mark.slow

PAGE = 4
GROUPS = ("", "", "", "@vip", "@moderators", "@everyone", "@vip @everyone")
COUNT = "/api/notifications/unread-count"


def all_pages(api: Api, query: str) -> list[dict[str, Any]]:
    """The items of all pages of an inbox."""
    items, cursor = [], ""
    while True:
        page = api.get(f"/api/notifications?limit={PAGE}&{query}{cursor}").get_json()
        items += page["items"]
        if not page["next"]:
            return items
        cursor = f"&cursor={page['next']}"


def counted(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The response of unread-count that corresponds to these items."""
    channels = []
    for channel_id in sorted({item["channel"]["id"] for item in items}):
        here = [item["type"] for item in items if item["channel"]["id"] == channel_id]
        channels.append({"channel_id": channel_id, "unread": len(here), "mentions": here.count("mention")})
    mentions = sum(item["type"] == "mention" for item in items)
    return {"unread": len(items), "mentions": mentions, "channels": channels}


class Unread(RuleBasedStateMachine):
    """Compare the API with tests/inbox/unread_model.py."""

    app: Any

    @initialize(data=st.data(), fanout_slice_size=st.sampled_from([2, 4, 100]))
    def begin(self, data: Any, fanout_slice_size: int) -> None:
        delete_all_data()
        self.overrides = ExitStack()
        self.overrides.enter_context(overridden(fanout_slice_size=fanout_slice_size))
        cast = make_cast()
        root = make_person("root", admin=True)  # changes rights, and is not a member of any server
        persons = [*cast.everybody.values(), make_person("quentin"), make_person("xenia", admin=True)]
        for newcomer in persons[-2:]:
            servers.put_member(cast.server_id, newcomer.id, [cast.vip_role])
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
            fanout_slice_size=fanout_slice_size,
        )
        self.world.people[cast.moderator.id].roles = {cast.moderators_role}
        for person in (cast.vip, *persons[-2:]):
            self.world.people[person.id].roles = {cast.vip_role}
        for person in (cast.vip, cast.moderator, persons[-2]):  # edits notify them and retract from them
            for channel_id in self.world.channels:
                self._prefer(person.id, channel_id, "mentions", None)
        self.turns = cycle(self.persons)
        for author in (cast.moderator, cast.vip, cast.admin):
            for channel_id in self.world.channels:
                self._post(author.id, channel_id, *self.draw_content(data))
        for run_id in list(self.world.runs)[::2]:
            self._process_run(run_id)

    def api(self, person: Person) -> Api:
        return Api(self.app.test_client(), person.token)

    def api_of(self, number: int) -> Api:
        return self.api(self.persons[number])

    def draw_mostly(self, data: Any, label: str, likely: Iterable[Any], possible: Iterable[Any]) -> Any:
        """Draw mostly from the likely choices, which have an effect, and sometimes from all possible ones."""
        choices, others = list(likely), list(possible)
        use_any = not choices or data.draw(st.integers(0, 3), label="any") == 3
        return data.draw(st.sampled_from(others if use_any else choices), label=label)

    def draw_user_with_unread(self, data: Any) -> int:
        unread = [number for number in self.persons if self.world.shown(number, unread=True)]
        return int(self.draw_mostly(data, "user", unread, self.persons))

    def draw_user(self, data: Any) -> int:
        return data.draw(st.sampled_from(list(self.persons)), label="user")

    def draw_channel(self, data: Any) -> int:
        return data.draw(st.sampled_from(list(self.world.channels)), label="channel")

    def draw_message(self, data: Any) -> int:
        return data.draw(st.sampled_from(list(self.world.messages)), label="message")

    def draw_content(self, data: Any) -> tuple[str, Mentions]:
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

    @rule(data=st.data(), notify=st.booleans())
    def post(self, data: Any, notify: bool) -> None:
        channel_id = self.draw_channel(data)
        allowed = [one for one in self.persons if not self.world.refusal_to_post(one, channel_id)]
        run_id = self._post(self.draw_mostly(data, "user", allowed, self.persons), channel_id, *self.draw_content(data))
        if notify and run_id:
            self._process_run(run_id)

    def _post(self, author: int, channel_id: int, content: str, wanted: Mentions) -> int:
        """Post a message; return the run's id, or 0 if the author may not post."""
        response = self.api_of(author).post("/api/messages", json={"channel_id": channel_id, "content": content})
        refused = self.world.refusal_to_post(author, channel_id)
        assert response.status_code == (refused or 201), response.get_json()
        if refused:
            return 0
        posted = response.get_json()
        mentions = self.world.resolve(author, channel_id, wanted)
        self.world.messages[posted["id"]] = Message(channel_id, author, mentions)
        self.world.runs[posted["run"]["id"]] = Run(posted["id"], "message")
        return int(posted["run"]["id"])

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data(), notify=st.booleans())
    def edit(self, data: Any, notify: bool) -> None:

        allowed = [
            id_
            for id_, one in self.world.messages.items()
            if not one.deleted and not self.world.refusal_to_post(one.author, one.channel)
        ]
        message_id = self.draw_mostly(data, "message", allowed, self.world.messages)
        message = self.world.messages[message_id]
        content, wanted = self.draw_content(data)
        response = self.api_of(message.author).patch(f"/api/messages/{message_id}", json={"content": content})
        refused = 404 if message.deleted else self.world.refusal_to_post(message.author, message.channel)
        assert response.status_code == (refused or 200), response.get_json()
        if not refused:
            old, message.mentions = message.mentions, self.world.resolve(message.author, message.channel, wanted)
            added, removed = message.mentions.without(old), old.without(message.mentions)
            if added != Mentions() or removed != Mentions():
                run_id = response.get_json()["run"]["id"]
                self.world.runs[run_id] = Run(message_id, "edit", added, removed)
                if notify:
                    self._process_run(run_id)

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        message_id = self.draw_message(data)
        status = 404 if self.world.messages[message_id].deleted else 200
        assert self.root.delete(f"/api/messages/{message_id}").status_code == status
        self.world.messages[message_id].deleted = True

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def replay(self, data: Any) -> None:
        message_id = self.draw_message(data)
        (first,) = fetch_all("SELECT min(id) AS id FROM run WHERE message_id = %(id)s", {"id": message_id})
        response = self.root.post(f"/api/runs/{first['id']}/replay", json={"dry_run": False})
        if self.world.messages[message_id].deleted:
            assert response.status_code == 403
            return
        adds = self.world.replay_adds(message_id, self.now)
        assert (response.status_code, response.get_json()["inserted"]) == (202 if adds else 200, adds)
        if adds:
            self.world.runs[response.get_json()["run"]["id"]] = Run(message_id, "replay")

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def fan_out(self, data: Any) -> None:
        self._process_run(data.draw(st.sampled_from(list(self.world.runs)), label="run"))

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def fan_out_one_work_item(self, data: Any) -> None:
        items = [item for id_ in self.world.runs for item in remaining_work_items(id_)]
        self._process_work_item(data.draw(st.sampled_from(items), label="work item"))

    def _process_run(self, run_id: int) -> None:
        while run_id in self.world.runs:
            slices = self.world.runs[run_id].slices
            self._process_work_item(WorkItem(run_id, min(slices) if slices else None))

    def _process_work_item(self, item: WorkItem) -> None:
        claim_and_process(item)
        self.world.process_work_item(item.run_id, item.after_user_id, self.now)
        left = self.world.runs.get(item.run_id)
        expected = sorted(left.slices or ()) if left else []
        assert [one.after_user_id for one in remaining_work_items(item.run_id)] == expected

    @precondition(lambda self: self.world.runs)
    @rule()
    def fan_out_together(self) -> None:
        """Process the waiting runs of small audiences in one batch."""
        first, *others = self.world.runs
        processed = fanout.process_batch(claims.claim_batch(first, others, 1_000))
        done = [run["run_id"] for run in processed]
        expected = [id_ for id_, run in self.world.runs.items() if run.kind == "message" and run.slices is None]
        assert done == expected
        self.world.transaction += 1
        for run_id in done:
            self.world.process_run(run_id, self.now)

    # Reading and dismissing --------------------------------------------------------------------------------

    def _read(self, number: int, selector: dict[str, Any], marked: list[int]) -> None:
        response = self.api_of(number).post("/api/notifications/read", json=selector)
        assert response.status_code == 200, response.get_json()
        for message_id in marked:
            self.world.notified[number, message_id].read = True
        assert response.get_json() == {"marked": len(marked), "unread": self.world.unread(number)["unread"]}

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def read_some(self, data: Any) -> None:
        number = self.draw_user_with_unread(data)
        unread = self.world.shown(number, unread=True)
        chosen = {self.draw_mostly(data, "one", unread, self.world.messages) for _ in range(2)}
        ids = [f"{number}-{one}" for one in chosen]
        self._read(number, {"ids": ids}, [one for one in unread if one in chosen])

    @precondition(lambda self: self.world.messages)
    @rule(data=st.data())
    def read_up_to(self, data: Any) -> None:
        number = self.draw_user_with_unread(data)
        unread = self.world.shown(number, unread=True)
        last = self.draw_mostly(data, "last", unread, self.world.messages)
        self._read(number, {"up_to": f"{number}-{last}"}, self.world.read_up_to(number, last))

    @rule(data=st.data())
    def read_channel(self, data: Any) -> None:
        number, channel_id = self.draw_user_with_unread(data), self.draw_channel(data)
        if self.world.sees(number, channel_id):
            unread = self.world.shown(number, unread=True, channel_id=channel_id)
            self._read(number, {"channel_id": channel_id}, list(unread))
        else:
            response = self.api_of(number).post("/api/notifications/read", json={"channel_id": channel_id})
            assert response.status_code == 404

    @rule(data=st.data())
    def read_all(self, data: Any) -> None:
        number = self.draw_user_with_unread(data)
        self._read(number, {"all": True}, list(self.world.shown(number, unread=True)))

    @precondition(lambda self: self.world.notified)
    @rule(data=st.data())
    def dismiss(self, data: Any) -> None:
        shown = [(number, message_id) for number in self.persons for message_id in self.world.shown(number)]
        number, message_id = self.draw_mostly(data, "notification", shown, self.world.notified)
        response = self.api_of(number).delete(f"/api/notifications/{number}-{message_id}")
        is_shown = (number, message_id) in shown
        assert response.status_code == (204 if is_shown else 404)
        if is_shown:
            self.world.notified[number, message_id].dismissed = True

    @rule(data=st.data(), level=st.sampled_from(["all", "mentions", "none"]), hours=st.sampled_from([None, -1, 1]))
    def prefer(self, data: Any, level: str, hours: int | None) -> None:
        until = self.now + timedelta(hours=hours) if hours else None
        self._prefer(self.draw_user(data), self.draw_channel(data), level, until)

    def _prefer(self, number: int, channel_id: int, level: str, until: datetime | None) -> None:
        body = {"level": level, "muted_until": until.isoformat() if until else None}
        response = self.api_of(number).put(f"/api/channels/{channel_id}/preference", json=body)
        sees = self.world.sees(number, channel_id)
        assert response.status_code == (200 if sees else 404)
        if sees:
            self.world.people[number].preferences[channel_id] = oracle.Preference(level, until)

    # Rights that change ------------------------------------------------------------------------------------

    @rule(data=st.data(), roles=st.sampled_from([None, (), ("vip",), ("moderators",), ("vip", "moderators")]))
    def change_membership(self, data: Any, roles: tuple[str, ...] | None) -> None:
        number = self.draw_user(data)
        person, path = self.world.people[number], f"/api/servers/{self.cast.server_id}/members/{number}"
        if roles is None:
            assert self.root.delete(path).status_code == (204 if person.member else 404)
            person.member, person.roles = False, set()
        else:
            person.roles = {self.cast.vip_role if role == "vip" else self.cast.moderators_role for role in roles}
            assert self.root.put(path, json={"role_ids": list(person.roles)}).status_code == 200
            person.member = True

    @rule(data=st.data(), right=st.sampled_from([{"is_admin": True}, {"is_admin": False}, "active", "canceled"]))
    def change_user(self, data: Any, right: Any) -> None:
        number = self.draw_user(data)
        if isinstance(right, dict):
            assert self.root.patch(f"/api/users/{number}", json=right).status_code == 200
            self.world.people[number].admin = right["is_admin"]
        else:
            assert self.root.put(f"/api/users/{number}/subscription", json={"status": right}).status_code == 200
            self.world.people[number].subscription = oracle.Subscription(right)

    @rule(data=st.data(), right=st.sampled_from([{"private": True}, {"private": False}, {"posting": "admins"},
                                                 {"posting": "members"}, {"vip"}, {"moderators"}, set()]))  # fmt: skip
    def change_channel(self, data: Any, right: Any) -> None:
        channel_id = self.draw_channel(data)
        channel, path = self.world.channels[channel_id], f"/api/channels/{channel_id}"
        if isinstance(right, dict):
            assert self.root.patch(path, json=right).status_code == 200
            channel.private = right.get("private", channel.private)
            channel.posting = right.get("posting", channel.posting)
        else:
            channel.roles = {self.cast.vip_role if role == "vip" else self.cast.moderators_role for role in right}
            assert self.root.put(f"{path}/roles", json={"role_ids": list(channel.roles)}).status_code == 200

    # Invariants --------------------------------------------------------------------------------------------

    def check(self, number: int) -> None:
        api = self.api_of(number)
        expected = self.world.shown(number, unread=True)
        items = all_pages(api, "unread=1")
        assert {item["message_id"]: item["reason"] for item in items} == {
            message_id: one.reason for message_id, one in expected.items()
        }
        assert [item["message_id"] for item in items] == list(expected)
        assert api.get(COUNT).get_json() == self.world.unread(number) == counted(items)

    def check_all_pages(self, number: int) -> None:
        shown = self.world.shown(number)
        found = all_pages(self.api_of(number), "")
        assert {item["message_id"]: item["read_at"] is not None for item in found} == {
            message_id: one.read for message_id, one in shown.items()
        }
        assert [item["message_id"] for item in found] == list(shown)
        for channel_id in self.world.channels:
            if self.world.sees(number, channel_id):
                here = all_pages(self.api_of(number), f"channel_id={channel_id}")
                assert [one["message_id"] for one in here] == list(self.world.shown(number, channel_id=channel_id))

    @invariant()
    def the_next_two_users_see_what_the_model_says(self) -> None:
        if hasattr(self, "turns"):
            self.check(next(self.turns))
            self.check(next(self.turns))

    def teardown(self) -> None:
        if not hasattr(self, "turns"):
            return
        try:
            for number in self.persons:
                self.check(number)
                self.check_all_pages(number)
            while self.world.runs:
                self._process_run(next(iter(self.world.runs)))
            for number in self.persons:
                self.check(number)
            assert verify() == []
        finally:
            self.overrides.close()


def test_unread_counts_match_the_model_after_any_sequence_of_operations(app):
    machine = type("UnreadOf", (Unread,), {"app": app})
    case = machine.TestCase
    case.settings = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking takes five minutes: add Phase.shrink after a failure
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
