"""After the play: who was told, and who should have been, by the oracle that the tests use and nothing else."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime

from belfry.sql import rows
from belfry.verification import verify
from chaos.load import Client, Diary, Posted, Text
from chaos.world import World
from tests.oracle import TELLING, Community, Member, decision, statistics

EDGE_SECONDS = 1.0  # a statement's `now()` is the beginning of its transaction


@dataclass
class Findings:
    """What must all be empty, a sentence each."""

    missing: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    wrong_decision: list[str] = field(default_factory=list)
    unresolved_runs: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        return self.missing + self.duplicates + self.wrong_decision + self.unresolved_runs


def audit(world: World, diary: Diary, address: str) -> Findings:
    """Hold everything that is stored, and what the API shows of it, against what should be."""
    findings = Findings(wrong_decision=list(diary.wrong))
    stored = {found["id"]: found for found in rows("SELECT id, content, deleted_at FROM message")}
    runs = defaultdict(list)
    for run in rows("SELECT id, message_id, kind, state, error, done, decisions, finished_at FROM run ORDER BY id"):
        runs[run["message_id"]].append(run)
        if run["state"] != "succeeded":
            findings.unresolved_runs.append(f"run {run['id']} is {run['state']}: {run['error']}")
    told: dict[int, dict[int, dict]] = defaultdict(dict)
    for row in rows("SELECT user_id, message_id, reason::text AS reason, read_at FROM notification"):
        told[row["message_id"]][row["user_id"]] = row

    known = Counter(posted.id for posted in diary.posted)
    findings.duplicates += [f"message {id_} was made by no request" for id_ in stored.keys() - known.keys()]
    findings.duplicates += [f"{times} requests made one message, {id_}" for id_, times in known.items() if times > 1]
    findings.missing += [f"message {id_} was answered, and is gone" for id_ in known.keys() - stored.keys()]
    for posted in diary.posted:
        if posted.id in stored and not stored[posted.id]["deleted_at"]:
            final = posted.revisions[stored[posted.id]["content"]]
            _check_message(world, posted, final, runs[posted.id], told[posted.id], findings)
    _check_reading(diary, runs, told, findings)
    _check_inboxes(world, address, stored, told, findings)
    findings.wrong_decision += [f"verify: {finding}" for finding in verify() if " failed: " not in finding]
    return findings


def _decision(posted: Posted, member: Member, user_id: int, text: Text) -> str:
    private = posted.channel_id == posted.server.channels.get("vip")
    community = Community(
        members={user_id: member},
        author=posted.author,
        private=private,
        opening_roles=frozenset({posted.server.vip_role}) if private else frozenset(),
        named=text.named,
        named_roles=text.named_roles,
        everyone=text.everyone,
    )
    return decision(community, user_id, datetime.now(UTC))


def _check_message(
    world: World, posted: Posted, final: Text, runs: list[dict], told: dict[int, dict], findings: Findings
) -> None:
    """Who did not change anything is told exactly as the last revision says; of the others everything that may have
    counted meanwhile is allowed, and nothing else."""
    finished = [run["finished_at"].timestamp() for run in runs if run["finished_at"]]
    since, until = posted.sent_at - EDGE_SECONDS, max(finished, default=float("inf")) + EDGE_SECONDS
    expected: dict[int, str] = {}
    for user_id in posted.server.members:
        states = world.possible_members(posted.server, posted.channel_id, user_id, since, until)
        if user_id in world.changing:
            texts = list(posted.revisions.values())
        else:
            texts = [final]
            expected[user_id] = _decision(posted, states[0], user_id, final)
        allowed = {_decision(posted, state, user_id, text) for state in states for text in texts}
        found = told.get(user_id)
        if found is None and allowed <= set(TELLING):
            findings.missing.append(f"user {user_id} has no notification of message {posted.id}: {allowed}")
        if found is not None and found["reason"] not in allowed & set(TELLING):
            findings.wrong_decision.append(
                f"user {user_id} was told of message {posted.id} for {found['reason']}, not {allowed}"
            )
    if expected.keys() == posted.server.members.keys() and len(runs) == 1 and runs[0]["state"] == "succeeded":
        counted = {name: number for name, number in runs[0]["decisions"].items() if number}
        right = {name: number for name, number in statistics(expected)["decisions"].items() if number}
        if counted != right:
            findings.wrong_decision.append(f"run {runs[0]['id']} counts {counted}, not {right}")


def _check_reading(diary: Diary, runs: dict, told: dict, findings: Findings) -> None:
    """What somebody has read stays read, unless an edit mentions them."""
    for user_id, message_id, when in diary.read:
        found = told[message_id].get(user_id)
        edited = any(
            run["kind"] == "edit" and (run["finished_at"] is None or run["finished_at"].timestamp() > when - 60)
            for run in runs[message_id]
        )
        if found and found["read_at"] is None and not edited:
            findings.duplicates.append(f"user {user_id} had read message {message_id}, and was told of it again")


def _check_inboxes(world: World, address: str, stored: dict, told: dict, findings: Findings) -> None:
    """What the API shows each member of the small server is what they were told of, once, and not what was deleted."""
    for user_id in world.small.members:
        client = Client(address, world.tokens[user_id], Diary())
        shown: list[int] = []
        cursor = ""
        while True:
            _, page = client.send("GET", f"/api/notifications?limit=100{cursor}")
            shown += [item["message_id"] for item in page["items"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
        client.close()
        due = {id_ for id_ in told if user_id in told[id_] and not stored[id_]["deleted_at"]}
        findings.duplicates += [
            f"user {user_id} is shown message {id_} {times} times" for id_, times in Counter(shown).items() if times > 1
        ]
        findings.missing += [f"user {user_id} is not shown message {id_}" for id_ in due - set(shown)]
        findings.wrong_decision += [f"user {user_id} is shown message {id_}" for id_ in set(shown) - due]
