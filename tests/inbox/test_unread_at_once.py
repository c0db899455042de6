"""Unread counts under concurrent changes: in one snapshot of the database the counts match the pages of the inbox and a
model in plain Python of the stored rows; and also after all threads have ended."""

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
    """The model, built from the rows in the database."""
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
    """`get(path)` as one user: all requests in the block see the database as it is at the start of the block.

    Each request ends only after the block, because the end of a request returns the database connection.
    """
    headers = {"Authorization": f"Bearer {person.token}"}
    with ExitStack() as requests:

        def get(path: str) -> Any:
            requests.enter_context(app.test_request_context(path, headers=headers))
            response = app.full_dispatch_request()
            assert response.status_code == 200, response.get_data(as_text=True)
            return response.get_json()

        with db.atomic():
            execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield get


def check(get: Callable[[str], Any], cast: Cast, person: Person) -> int:
    """Assert that pages, counts and model agree; return the number of unread notifications of the user."""
    world, items, cursor = stored_world(cast), [], ""
    while cursor is not None:
        page = get(f"/api/notifications?unread=1&limit=40{cursor}")
        items += page["items"]
        cursor = f"&cursor={page['next']}" if page["next"] else None
    assert [item["message_id"] for item in items] == list(world.shown(person.id, unread=True))
    assert get(COUNT) == counted(items) == world.unread(person.id)
    return len(items)


class _Operations:
    """The operations of the threads, at random: HTTP requests, and fan-out by the function that the job calls."""

    def __init__(self, app: Flask, cast: Cast, seed: int) -> None:
        self.app, self.cast = app, cast
        self.root = make_person("root", admin=True)
        self.persons = [*cast.everybody.values(), make_person("quentin")]
        servers.put_member(cast.server_id, self.persons[-1].id, [cast.vip_role])
        self.seed = seed
        self.errors: list[str] = []
        self.counted = 0  # unread notifications in all checks

    def send(self, person: Person, method: str, path: str, body: Any = None) -> Any:
        response = Api(self.app.test_client(), person.token).open(method, path, json=body)
        assert response.status_code < 500, f"{method} {path} {body}: {response.get_data(as_text=True)}"
        return response.get_json() if response.data else None

    def messages(self) -> list[dict[str, Any]]:
        return fetch_all("SELECT id, author_id FROM message WHERE deleted_at IS NULL ORDER BY id DESC LIMIT 6")

    def notify(self, rng: random.Random) -> None:
        author, channel_id = rng.choice(self.persons), rng.choice([self.cast.general, self.cast.vault])
        self.send(author, "POST", "/api/messages", {"channel_id": channel_id, "content": rng.choice(TEXTS)})
        left = fetch_all(
            "SELECT r.id AS run_id, s.after_user_id FROM run r LEFT JOIN slice s ON s.run_id = r.id"
            " WHERE r.state NOT IN ('succeeded', 'failed')"
        )
        for item in [WorkItem(**one) for one in rng.sample(left, min(4, len(left)))]:
            if (attempt := claims.claim(item)) is not None:
                fanout.process_work_item(item, attempt)

    def read(self, rng: random.Random) -> None:
        person = rng.choice(self.persons)
        ids = [one["id"] for one in self.messages()] or [1]
        few = {"ids": [f"{person.id}-{one}" for one in rng.sample(ids, min(2, len(ids)))]}
        many = ({"up_to": f"{person.id}-{rng.choice(ids)}"}, {"channel_id": self.cast.general}, {"all": True})
        selector = few if rng.random() < 0.8 else rng.choice(many)  # mostly few, so that unread ones are left to count
        self.send(person, "POST", "/api/notifications/read", selector)

    def change(self, rng: random.Random) -> None:
        for message in rng.sample(found, 1) if (found := self.messages()) else ():
            author = next(one for one in self.persons if one.id == message["author_id"])
            if rng.random() < 0.9:
                self.send(author, "PATCH", f"/api/messages/{message['id']}", {"content": rng.choice(TEXTS)})
            elif rng.random() < 0.5:
                self.send(author, "DELETE", f"/api/messages/{message['id']}")
            person = rng.choice(self.persons)
            self.send(person, "DELETE", f"/api/notifications/{person.id}-{message['id']}")

    def change_rights(self, rng: random.Random) -> None:
        """Revoke a right, check one user, and grant it again."""
        person, cast = rng.choice(self.persons[1:]), self.cast
        member, channel = f"/api/servers/{cast.server_id}/members/{person.id}", f"/api/channels/{cast.general}"
        rights = {cast.moderator.id: [cast.moderators_role], cast.lapsed.id: []}.get(person.id, [cast.vip_role])
        revoke, grant = rng.choice(
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
        self.send(self.root, *revoke)
        self.check_one(rng)
        self.send(self.root, *grant)

    def check_one(self, rng: random.Random) -> None:
        person = rng.choice(self.persons)
        with one_snapshot(self.app, person) as get:
            self.counted += check(get, self.cast, person)

    def repeat(self, operation: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        try:
            for _ in range(ROUNDS):
                operation(rng)
                self.check_one(rng)
        except BaseException as error:
            self.errors.append(f"{operation.__name__}: {error!r}")
        finally:
            if not db.is_closed():
                db.close()


@pytest.mark.parametrize("seed", range(3))
def test_unread_counts_match_the_inbox_under_concurrent_changes(app, cast, set_slice_size, seed):
    set_slice_size(3)
    operations = _Operations(app, cast, seed)
    for number in range(10):
        operations.notify(random.Random(number))
    loops = (
        *(operations.notify, operations.notify, operations.read, operations.read),
        *(operations.change, operations.change_rights),
    )
    threads = [threading.Thread(target=operations.repeat, args=(loop, number)) for number, loop in enumerate(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert operations.errors == []
    for unfinished in fetch_all("SELECT id FROM run WHERE state <> 'succeeded' ORDER BY id"):
        assert run_to_end(unfinished["id"]) == "succeeded"
    assert operations.counted > 2 * ROUNDS, "the checks counted unread notifications"
    for person in operations.persons:
        with one_snapshot(app, person) as get:
            check(get, cast, person)
    assert verify() == []
