"""`demo`: one message, from the POST to the notified members; all data is removed afterwards."""

import time
from datetime import datetime
from typing import Any

from tools.dev import CommandError, say, signals, stack
from tools.dev.client import Client
from tools.dev.harness import Harness
from tools.dev.processes import Child

MEMBERS = 10_000
RUN_SECONDS = 120
NOTIFY_DECISIONS = ("message", "mention", "mention_role", "mention_everyone")


def demo() -> int:
    """Returns 0 where the message's run succeeded and its numbers add up; raises CommandError otherwise."""
    say("Starting PostgreSQL and Redis …")
    with Harness.start("demo") as harness:
        say(f"Creating a server of {MEMBERS:,} members …")
        token, server = stack.create_admin_and_server(harness.env, MEMBERS)
        say("Starting a web process and a worker …")
        with harness.workers(1) as (worker,), harness.web() as web:
            _show(Client(harness.address, token), server, (web, worker))
            say("Stopping everything …")
    say(
        "\nNext: `make run` serves until Ctrl-C, with tokens and commands to try and the queues under /rq;"
        "\n      README.md has the rest."
    )
    return 0


def _show(client: Client, server: dict[str, Any], children: tuple[Child, ...]) -> None:
    content = f"gold breaks out, @{server['usernames'][0]}"
    client.get("/api/me")  # otherwise the time below includes the first connections of the process
    began = time.perf_counter()
    message = client.post("/api/messages", {"channel_id": server["channel_ids"][0], "content": content})
    took = time.perf_counter() - began
    say(f"\nPOST /api/messages  {content!r}")
    say(f"  answered in {took * 1000:.0f} ms: message {message['id']}, run {message['run']['state']}")
    run = _watch(client, message["run"]["url"], children)
    _check(run)
    _table(run["stats"])
    seconds = (_time(run["finished_at"]) - _time(message["created_at"])).total_seconds()
    say(f"\nAll members were notified {seconds:.2f} s after the message was created.")
    _explain(client, message)


def _watch(client: Client, url: str, children: tuple[Child, ...]) -> dict[str, Any]:
    """Show the run's progress until it is finished; returns the run."""
    deadline, shown = time.monotonic() + RUN_SECONDS, ""
    while True:
        run: dict[str, Any] = client.get(url)
        done, total = run["progress"]["done"], run["progress"]["total"]
        progress = f"  run {run['id']}: {run['state']}, {done:,} of {f'{total:,}' if total else '…'} members"
        if progress != shown:
            say(progress)
            shown = progress
        if run["state"] in ("succeeded", "failed"):
            return run
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            raise CommandError(f"The run did not end within {RUN_SECONDS} seconds.")
        signals.sleep(0.2)


def _check(run: dict[str, Any]) -> None:
    """Raises CommandError where the run failed, or its statistics contradict themselves."""
    if run["state"] != "succeeded":
        raise CommandError(f"The run failed: {run['error']}")
    decisions, audience, notified = (run["stats"][name] for name in ("decisions", "audience", "notified"))
    if sum(decisions.values()) != audience:
        raise CommandError(f"The decisions do not add up to the audience of {audience}: {decisions}")
    if sum(decisions[reason] for reason in NOTIFY_DECISIONS) != notified:
        raise CommandError(f"The notifying decisions do not add up to the {notified} notified: {decisions}")
    if audience < MEMBERS:
        raise CommandError(f"The audience has {audience} members and not the {MEMBERS} of the server.")


def _table(stats: dict[str, Any]) -> None:
    say(f"\n  {'decision':<20} {'members':>9}   notified")
    for decision, count in stats["decisions"].items():
        say(f"  {decision:<20} {count:>9,}   {'yes' if decision in NOTIFY_DECISIONS else 'no'}")
    say(f"  {'-' * 30}")
    say(f"  {'audience':<20} {stats['audience']:>9,}")
    say(f"  {'notified':<20} {stats['notified']:>9,}")


def _explain(client: Client, message: dict[str, Any]) -> None:
    """Show why one member was notified, and why the next member who was not notified was not."""
    user_id = message["mentions"]["users"][0]["id"]
    say(f"\nWhy?  GET /api/messages/{message['id']}/explain?user_id=…")
    for offset in range(50):
        answer = client.get(f"/api/messages/{message['id']}/explain?user_id={user_id + offset}")
        if offset == 0 or answer["notified_at"] is None:
            notified = "notified" if answer["notified_at"] else "not notified"
            say(f"  {answer['user_id']:>6}  {notified:<9} {answer['decision']:<20} {answer['detail']}")
        if answer["notified_at"] is None:
            return


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
