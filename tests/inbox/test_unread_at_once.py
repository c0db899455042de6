"""Unread counts with everything at once: in one snapshot of the database what is counted is what is shown, and what the
stored rows say by the model in plain Python; and at rest as well."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from flask import Flask

from belfry.core.db import db, execute, fetch_all
from belfry.fanout import claims, fanout
from belfry.fanout.claims import WorkItem
from belfry.integrity.verification import verify
from belfry.servers import servers
from tests.fanout_helpers import run_to_end
from tests.inbox.test_unread import COUNT, counted
from tests.inbox.unread_model import Channel, Mentions, Message, Notification, World
from tests.inbox.unread_model import Person as Modelled
from tests.people import Api, Cast, Person, make_person

pytestmark = pytest.mark.slow

ROUNDS = 40  # of each thread
TEXTS = ("gold", "gold @vera", "@moira @sam", "@vip", "@everyone", "@lars @quentin @vera")


def stored_world(cast: Cast) -> World:
    """The model, of what is in the database."""
    roles, opening = fetch_all("SELECT user_id, role_id FROM member_role"), fetch_all("SELECT * FROM channel_role")
    members = {one["user_id"] for one in fetch_all("SELECT user_id FROM member")}
    return World(
        people={
            one["id"]: Modelled(
                one["username"],
                admin=one["is_admin"],
                member=one["id"] in members,
                roles={role["role_id"] for role in roles if role["user_id"] == one["id"]},
            )
            for one in fetch_all("SELECT id, username, is_admin FROM user_account")
        },
        channels={
            one["id"]: Channel(
                one["private"], one["posting"], {role["role_id"] for role in opening if role["channel_id"] == one["id"]}
            )
            for one in fetch_all("SELECT id, private, posting FROM channel")
        },
        moderators=cast.moderators_role,
        fanout_slice_size=0,
        messages={
            one["id"]: Message(one["channel_id"], one["author_id"], Mentions(), one["deleted_at"] is not None)
            for one in fetch_all("SELECT id, channel_id, author_id, deleted_at FROM message")
        },
        notified={
            (one["user_id"], one["message_id"]): Notification(
                one["reason"], one["read_at"] is not None, one["dismissed_at"] is not None
            )
            for one in fetch_all("SELECT user_id, message_id, reason::text, read_at, dismissed_at FROM notification")
        },
    )


@contextmanager
def one_snapshot(app: Flask, person: Person) -> Iterator[Callable[[str], Any]]:
    """`get(path)` as one person: all those of the block see the database as it is at its beginning.

    Each is a whole request but for its end, which comes after the block: it gives the connection back.
    """
    headers = {"Authorization": f"Bearer {person.token}"}
    with ExitStack() as requests:

        def get(path: str) -> Any:
            requests.enter_context(app.test_request_context(path, headers=headers))
            answer = app.full_dispatch_request()
            assert answer.status_code == 200, answer.get_data(as_text=True)
            return answer.get_json()

        with db.atomic():
            execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield get


def check(get: Callable[[str], Any], cast: Cast, person: Person) -> int:
    """How many they have, as all three say."""
    world, items, cursor = stored_world(cast), [], ""
    while cursor is not None:
        page = get(f"/api/notifications?unread=1&limit=40{cursor}")
        items += page["items"]
        cursor = f"&cursor={page['next']}" if page["next"] else None
    assert [item["message_id"] for item in items] == list(world.shown(person.id, unread=True))
    assert get(COUNT) == counted(items) == world.unread(person.id)
    return len(items)


class _Crowd:
    """What the threads do, each by its own chance, over HTTP; a fan-out by the function that the job calls."""

    def __init__(self, app: Flask, cast: Cast, seed: int) -> None:
        self.app, self.cast = app, cast
        self.root = make_person("root", admin=True)
        self.persons = [*cast.everybody.values(), make_person("quentin")]
        servers.put_member(cast.server_id, self.persons[-1].id, [cast.vip_role])
        self.seed = seed
        self.broken: list[str] = []
        self.counted = 0  # unread ones, in all checks

    def send(self, person: Person, method: str, path: str, body: Any = None) -> Any:
        answer = Api(self.app.test_client(), person.token).open(method, path, json=body)
        assert answer.status_code < 500, f"{method} {path} {body}: {answer.get_data(as_text=True)}"
        return answer.get_json() if answer.data else None

    def messages(self) -> list[dict[str, Any]]:
        return fetch_all("SELECT id, author_id FROM message WHERE deleted_at IS NULL ORDER BY id DESC LIMIT 6")

    def notify(self, rng: random.Random) -> None:
        author, channel_id = rng.choice(self.persons), rng.choice([self.cast.general, self.cast.vault])
        self.send(author, "POST", "/api/messages", {"channel_id": channel_id, "content": rng.choice(TEXTS)})
        left = fetch_all(
            "SELECT r.id AS run_id, s.after_user_id FROM run r LEFT JOIN slice s ON s.run_id = r.id"
            " WHERE r.state NOT IN ('succeeded', 'failed')"
        )
        for part in [WorkItem(**one) for one in rng.sample(left, min(4, len(left)))]:
            if (attempt := claims.claim(part)) is not None:
                fanout.process_work_item(part, attempt)

    def read(self, rng: random.Random) -> None:
        person = rng.choice(self.persons)
        ids = [one["id"] for one in self.messages()] or [1]
        some = {"ids": [f"{person.id}-{one}" for one in rng.sample(ids, min(2, len(ids)))]}
        much = ({"up_to": f"{person.id}-{rng.choice(ids)}"}, {"channel_id": self.cast.general}, {"all": True})
        which = some if rng.random() < 0.8 else rng.choice(much)  # or there would be little to count
        self.send(person, "POST", "/api/notifications/read", which)

    def change(self, rng: random.Random) -> None:
        for message in rng.sample(found, 1) if (found := self.messages()) else ():
            author = next(one for one in self.persons if one.id == message["author_id"])
            if rng.random() < 0.9:
                self.send(author, "PATCH", f"/api/messages/{message['id']}", {"content": rng.choice(TEXTS)})
            elif rng.random() < 0.5:
                self.send(author, "DELETE", f"/api/messages/{message['id']}")
            person = rng.choice(self.persons)
            self.send(person, "DELETE", f"/api/notifications/{person.id}-{message['id']}")

    def govern(self, rng: random.Random) -> None:
        """Take a right from somebody, see what that comes to, and give it back."""
        person, cast = rng.choice(self.persons[1:]), self.cast
        member, channel = f"/api/servers/{cast.server_id}/members/{person.id}", f"/api/channels/{cast.general}"
        rights = {cast.moderator.id: [cast.moderators_role], cast.lapsed.id: []}.get(person.id, [cast.vip_role])
        taken, given = rng.choice(
            [
                (("DELETE", member, None), ("PUT", member, {"role_ids": rights})),
                (("PUT", member, {"role_ids": []}), ("PUT", member, {"role_ids": rights})),
                (("PATCH", channel, {"private": True}), ("PATCH", channel, {"private": False})),
                (("PATCH", channel, {"posting": "admins"}), ("PATCH", channel, {"posting": "members"})),
                *(
                    (("PUT", f"/api/channels/{id_}/roles", {"role_ids": []}),
                     ("PUT", f"/api/channels/{id_}/roles", {"role_ids": [cast.vip_role]}))
                    for id_ in (cast.vault, cast.general)
                ),
                *(
                    (("PATCH", f"/api/users/{cast.admin.id}", {"is_admin": one}),
                     ("PATCH", f"/api/users/{cast.admin.id}", {"is_admin": True}))
                    for one in (True, False)
                ),
            ]
        )  # fmt: skip
        self.send(self.root, *taken)
        self.check_one(rng)
        self.send(self.root, *given)

    def check_one(self, rng: random.Random) -> None:
        person = rng.choice(self.persons)
        with one_snapshot(self.app, person) as get:
            self.counted += check(get, self.cast, person)

    def work(self, what: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        try:
            for _ in range(ROUNDS):
                what(rng)
                self.check_one(rng)
        except BaseException as error:
            self.broken.append(f"{what.__name__}: {error!r}")
        finally:
            if not db.is_closed():
                db.close()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_counted_is_what_is_shown_with_everything_at_once(app, cast, slices_of, seed):
    slices_of(3)
    crowd = _Crowd(app, cast, seed)
    for number in range(10):
        crowd.notify(random.Random(number))
    deeds = (crowd.notify, crowd.notify, crowd.read, crowd.read, crowd.change, crowd.govern)
    threads = [threading.Thread(target=crowd.work, args=(what, number)) for number, what in enumerate(deeds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd.broken == []
    for unfinished in fetch_all("SELECT id FROM run WHERE state <> 'succeeded' ORDER BY id"):
        assert run_to_end(unfinished["id"]) == "succeeded"
    assert crowd.counted > 2 * ROUNDS, "there was something to count"
    for person in crowd.persons:
        with one_snapshot(app, person) as get:
            check(get, cast, person)
    assert verify() == []
