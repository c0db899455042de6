"""Compare who was notified with who should have been, by the tests' oracle and nothing else."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime

from belfry.core.db import IDLE_IN_TRANSACTION_SECONDS, fetch_all
from belfry.integrity.verification import verify
from tests.oracle import NOTIFY_DECISIONS, SILENT_DECISIONS, Member, Scenario, decision
from tools.chaos.load import Client, History, PostedMessage, Revision
from tools.chaos.world import World

EARLY_SECONDS = 1.0  # the client and the database read the clock at different times
LATE_SECONDS = IDLE_IN_TRANSACTION_SECONDS + 1.0
"""A run's `finished_at` is when its transaction began; the transaction may have waited for so long."""


@dataclass
class Findings:
    """The errors, a sentence each. Of the decisions of messages that were not deleted, `predicted` have one correct
    value; `ambiguous` have several, because a setting changed meanwhile."""

    missing: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    wrong_decision: list[str] = field(default_factory=list)
    unresolved_runs: list[str] = field(default_factory=list)
    predicted: int = 0
    ambiguous: int = 0

    def all(self) -> list[str]:
        return self.missing + self.duplicates + self.wrong_decision + self.unresolved_runs


def audit(world: World, history: History, address: str) -> Findings:
    """Compare the stored data, and what the API shows of it, with the expected data."""
    findings = Findings()
    stored = {found["id"]: found for found in fetch_all("SELECT id, content, deleted_at FROM message")}
    runs = defaultdict(list)
    for run in fetch_all("SELECT id, message_id, kind, state, error, decisions, finished_at FROM run ORDER BY id"):
        runs[run["message_id"]].append(run)
        if run["state"] != "succeeded":
            findings.unresolved_runs.append(f"run {run['id']} is {run['state']}: {run['error']}")
    notified: dict[int, dict[int, dict]] = defaultdict(dict)
    for row in fetch_all("SELECT user_id, message_id, reason::text AS reason, read_at FROM notification"):
        notified[row["message_id"]][row["user_id"]] = row

    known = Counter(posted.id for posted in history.posted)
    findings.duplicates += [f"message {id_} was created by no request" for id_ in stored.keys() - known.keys()]
    findings.duplicates += [f"{times} requests created message {id_}" for id_, times in known.items() if times > 1]
    findings.missing += [f"message {id_} was created, and does not exist" for id_ in known.keys() - stored.keys()]
    for posted in history.posted:
        if posted.id in stored and _has_expected_content(posted, stored[posted.id], findings):
            final = None if posted.deleted else posted.revisions[stored[posted.id]["content"]]
            _check_message(world, posted, final, runs[posted.id], notified[posted.id], findings)
    _check_reading(world, history, notified, findings)
    _check_inboxes(world, history, address, stored, notified, findings)
    findings.wrong_decision += [f"verify: {finding}" for finding in verify() if " failed: " not in finding]
    findings.wrong_decision += history.errors
    return findings


def _has_expected_content(posted: PostedMessage, stored: dict, findings: Findings) -> bool:
    """Check that a message is deleted or not, and has the last revision, or one that may have been late."""
    errors = []
    if posted.deleted != (stored["deleted_at"] is not None):
        errors.append("was deleted, and is not" if posted.deleted else "is deleted without a request")
    if stored["content"] not in {[*posted.revisions][-1], *posted.late_revisions} and not posted.deleted:
        errors.append(f"says {stored['content']!r}, which is not the last revision")
    findings.wrong_decision += [f"message {posted.id} {error}" for error in errors]
    return not errors


def _decision(posted: PostedMessage, member: Member, user_id: int, revision: Revision) -> str:
    private = posted.channel_id == posted.server.channels.get("vip")
    scenario = Scenario(
        members={user_id: member},
        author=posted.author,
        private=private,
        channel_roles=frozenset({posted.server.vip_role}) if private else frozenset(),
        mentioned=revision.mentioned_users,
        mentioned_roles=revision.mentioned_roles,
        everyone=revision.everyone,
    )
    return decision(scenario, user_id, datetime.now(UTC))


def _check_message(
    world: World,
    posted: PostedMessage,
    final: Revision | None,
    runs: list[dict],
    notified: dict[int, dict],
    findings: Findings,
) -> None:
    """Check the notifications and statistics of a message.

    A user whose settings did not change is notified by the last revision. For others, each setting that may have been
    in effect is allowed. Of a deleted message (no `final`) any revision may have notified, or none.
    """
    finished = [run["finished_at"].timestamp() for run in runs if run["finished_at"]]
    since, until = posted.sent_at - EARLY_SECONDS, max(finished, default=float("inf")) + LATE_SECONDS
    allowed: dict[int, set[str]] = {}
    for user_id in posted.server.members:
        revisions = [final] if final and user_id not in world.changing_users else [*posted.revisions.values()]
        states = world.possible_members(posted.server, posted.channel_id, user_id, since, until)
        allowed[user_id] = {_decision(posted, state, user_id, one) for state in states for one in revisions}
    for user_id, right in allowed.items() if final else ():
        if len(right) == 1:
            findings.predicted += 1
        else:
            findings.ambiguous += 1
        if user_id not in notified and right <= set(NOTIFY_DECISIONS):
            findings.missing.append(f"user {user_id} has no notification of message {posted.id}: {right}")
    for user_id, found in notified.items():
        right = allowed.get(user_id, set()) & set(NOTIFY_DECISIONS)
        if found["reason"] not in right:
            findings.wrong_decision.append(
                f"user {user_id} was notified of message {posted.id} for {found['reason']}, not {right or 'any reason'}"
            )
    if len(posted.revisions) == 1 and not posted.deleted:
        for run in runs:
            if run["state"] == "succeeded":
                _check_statistics(run, [*allowed.values()], findings)


def _check_statistics(run: dict, allowed: list[set[str]], findings: Findings) -> None:
    """Check that a run counts each member once, under a decision that is allowed for them."""
    counted = run["decisions"]
    if sum(counted.values()) != len(allowed):
        findings.wrong_decision.append(f"run {run['id']} counts {sum(counted.values())} members, not {len(allowed)}")
    for kind in NOTIFY_DECISIONS + SILENT_DECISIONS:
        least = sum(one == {kind} for one in allowed)
        most = sum(kind in one for one in allowed)
        if not least <= counted.get(kind, 0) <= most:
            findings.wrong_decision.append(f"run {run['id']} counts {counted} for {kind}, not {least} to {most}")


def _check_reading(world: World, history: History, notified: dict, findings: Findings) -> None:
    """Check that what a user has read still exists, and is still read, unless an edit mentions the user."""
    posted = {one.id: one for one in history.posted}
    for user_id, message_id in history.read:
        message, found = posted[message_id], notified[message_id].get(user_id)
        edits = [*message.revisions.values()][1:]
        roles = world.small.members[user_id].roles
        mentioned = any(
            user_id in edit.mentioned_users or edit.everyone or roles & edit.mentioned_roles for edit in edits
        )
        if found is None:
            findings.missing.append(f"user {user_id} had read message {message_id}, and it does not exist")
        if found and found["read_at"] is None and not mentioned:
            findings.duplicates.append(f"user {user_id} had read message {message_id}, and was notified of it again")


def _check_inboxes(
    world: World, history: History, address: str, stored: dict, notified: dict, findings: Findings
) -> None:
    """Check that the API shows each notification of the small server once, and none of a deleted message."""
    for user_id in world.small.members:
        client = Client(address, world.tokens[user_id], history)
        shown: list[int] = []
        cursor = ""
        while True:
            status, page = client.send("GET", f"/api/notifications?limit=100{cursor}")
            if status != 200:
                findings.wrong_decision.append(f"the inbox of user {user_id} answered {status}: {page}")
                break
            shown += [item["message_id"] for item in page["items"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
        client.close()
        due = {id_ for id_ in notified if user_id in notified[id_] and not stored[id_]["deleted_at"]}
        findings.duplicates += [
            f"user {user_id} sees message {id_} {times} times" for id_, times in Counter(shown).items() if times > 1
        ]
        findings.missing += [f"user {user_id} does not see message {id_}" for id_ in due - set(shown)]
        findings.wrong_decision += [f"user {user_id} sees message {id_}, and should not" for id_ in set(shown) - due]
