"""The commands: `flask --app app COMMAND`. Each has --help, and --json where it prints data."""

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any

import click
from flask import Flask
from marshmallow import ValidationError
from peewee import InterfaceError, OperationalError, ProgrammingError

import schemas
from belfry.cli import seeding
from belfry.core import migrations
from belfry.core.db import db
from belfry.core.errors import DomainError
from belfry.fanout import recovery, runs
from belfry.identity import subscriptions, tokens, users
from belfry.integrity import verification
from belfry.messages import explanation, test_notifications
from belfry.queue import queues
from belfry.web.api.runs import describe_run
from belfry.worker import supervisor
from models import LARGEST_ID, RUN_STATES, SUBSCRIPTION_STATUSES, User

WAIT_SECONDS = 600

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def command(group: list[click.Command] | click.Group, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Register a command that prints the domain's errors as one sentence, exits with 1, and closes its connection."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def guarded(*arguments: Any, **options: Any) -> None:
            try:
                function(*arguments, **options)
            except DomainError as error:
                raise click.ClickException(error.detail) from None
            except (OperationalError, InterfaceError) as error:
                raise click.ClickException(f"The database is unavailable: {str(error).strip()}") from None
            except ProgrammingError as error:
                if migrations.missing_migrations():
                    raise click.ClickException("The database has no tables yet: flask --app app migrate") from error
                raise
            finally:
                if not db.is_closed():
                    db.close()

        made = click.command(name)(guarded)
        if isinstance(group, click.Group):
            group.add_command(made)
        else:
            group.append(made)
        return made

    return decorate


COMMANDS: list[click.Command] = []


def register(app: Flask) -> None:
    """Register the commands."""
    for one in COMMANDS:
        app.cli.add_command(one)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


@command(COMMANDS, "migrate")
@json_option
def migrate(as_json: bool) -> None:
    """Bring the schema up to date. Safe to run twice and concurrently."""
    applied = migrations.migrate()
    if as_json:
        _print_json({"applied": applied})
    else:
        click.echo("\n".join(f"applied {name}" for name in applied) or "nothing to do")


@command(COMMANDS, "create-user")
@click.argument("username", metavar="USERNAME")
@click.option("--admin", is_flag=True, help="Make the user an admin.")
@click.option("--display-name", metavar="N", help="The name that others see; USERNAME by default.")
@click.option("--email")
@click.option("--subscription", type=click.Choice(SUBSCRIPTION_STATUSES), help="Add a subscription that does not end.")
@click.option("--token", "with_token", is_flag=True, help="Create a token as well, and print it once.")
@json_option
def create_user(
    username: str,
    admin: bool,
    display_name: str | None,
    email: str | None,
    subscription: str | None,
    with_token: bool,
    as_json: bool,
) -> None:
    """Create a user."""
    given = {"username": username, "name": display_name, "email": email}
    try:
        loaded = schemas.UserIn().load({field: value for field, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(f"{field}: {' '.join(why)}" for field, why in error.messages_dict.items())
        raise click.UsageError(wrong) from None
    with db.atomic():
        user = users.create_user(loaded["username"], loaded["name"], loaded["email"], is_admin=admin)
        if subscription:
            subscriptions.set_subscription(user.id, subscription, None)
        token = tokens.create_token(user)[1] if with_token else None
    created = {"id": user.id, "username": user.username, "name": user.name, "is_admin": user.is_admin}
    if token:
        created["token"] = token
    if as_json:
        _print_json(created)
        return
    click.echo(f"user {user.id}: {user.username}{' (admin)' if admin else ''}")
    if token:
        click.echo(f"token: {token}")


@command(COMMANDS, "create-token")
@click.argument("username", metavar="USERNAME")
@click.option("--days", type=click.IntRange(1, 36_500), help="Days until the token expires; by default it does not.")
@json_option
def create_token(username: str, days: int | None, as_json: bool) -> None:
    """Create a token for a user, and print it once."""
    user = users.find_user_by_username(username)
    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    stored, token = tokens.create_token(user, expires_at)
    if as_json:
        expires = stored["expires_at"]
        _print_json(
            {"username": user.username, "token": token, "expires_at": expires.isoformat() if expires else None}
        )
    else:
        click.echo(token)


@command(COMMANDS, "seed")
@click.option("--members", type=click.IntRange(1, 10_000_000), required=True)
@click.option("--channels", type=click.IntRange(1, 1000), default=3, show_default=True)
@json_option
def seed(members: int, channels: int, as_json: bool) -> None:
    """Create sample data: a server with members, roles, channels, subscriptions and preferences."""
    with click.progressbar(length=members, label="members", file=sys.stderr) as bar:
        created = seeding.seed(members, channels, bar.update)
    if as_json:
        _print_json(created)
    else:
        click.echo(
            f"server {created['server_id']}, channels {', '.join(map(str, created['channel_ids']))}, "
            f"{members} members ({', '.join(created['usernames'])}, …)"
        )


@command(COMMANDS, "send-test-notification")
@click.option("--channel", "channel_id", type=click.IntRange(1, LARGEST_ID), help="By default the first channel.")
@click.option("--audience", type=click.Choice(test_notifications.AUDIENCES), default="me", show_default=True)
@click.option("--sender", metavar="USERNAME", help="Who sends it; by default the first admin.")
@click.option("--wait", is_flag=True, help="Show progress and statistics; exit with 1 if the run failed.")
@json_option
def send_test_notification(
    channel_id: int | None, audience: str, sender: str | None, wait: bool, as_json: bool
) -> None:
    """Send a test notification through the real queue."""
    run_id = test_notifications.send_test(_sender(sender), channel_id, None, audience)
    if not queues.enqueue_run(run_id):
        click.echo("Redis is unavailable. A worker will find the run when Redis is available again.", err=True)
    run = _wait(run_id) if wait else runs.find_run(run_id)
    _print_run(run, as_json)
    if run["state"] == "failed":
        raise SystemExit(1)


def _sender(username: str | None) -> User:
    if username:
        return users.find_user_by_username(username)
    admin: User | None = User.select().where(User.is_admin).order_by(User.id).first()
    if admin is None:
        raise click.ClickException("There is no admin yet: flask --app app create-user USERNAME --admin --token")
    return admin


def _wait(run_id: int) -> dict[str, Any]:
    """Wait until the run is finished, and show its progress. Raises ClickException after WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    with click.progressbar(length=1, label=f"run {run_id}", file=sys.stderr) as bar:
        while time.monotonic() < deadline:
            run = runs.find_run(run_id)
            bar.length = run["members_total"] or 1
            bar.update(run["members_processed"] - bar.pos)
            if run["finished_at"]:
                return run
            time.sleep(0.1)
    raise click.ClickException(f"Run {run_id} is not finished after {WAIT_SECONDS} seconds. Is a worker running?")


def _print_run(run: dict[str, Any], as_json: bool) -> None:
    sent = schemas.Run().dump(describe_run(run))
    if as_json:
        _print_json(sent)
        return
    statistics = sent["stats"]
    click.echo(
        f"run {sent['id']} ({sent['kind']}) of message {sent['message_id']}: {sent['state']}, "
        f"attempt {sent['attempts']}, {sent['progress']['done']} of {sent['progress']['total'] or '?'} members"
    )
    if sent["error"]:
        click.echo(f"  error: {sent['error']}")
    click.echo(
        f"  {statistics['notified']} of {statistics['audience']} members notified;"
        f" {statistics['inserted']} notifications inserted"
    )
    for decision, members in statistics["decisions"].items():
        if members:
            click.echo(f"  {decision:20} {members:>10}")


@command(COMMANDS, "worker")
@click.option("--burst", is_flag=True, help="Stop when the queues are empty.")
def worker(burst: bool) -> None:
    """Run jobs: fan-out, retries, recovery. SIGTERM lets the current job finish."""
    supervisor.work(burst)


@command(COMMANDS, "explain")
@click.argument("message_id", type=click.IntRange(1, LARGEST_ID))
@click.argument("username")
@json_option
def explain(message_id: int, username: str, as_json: bool) -> None:
    """Explain why a user was or was not notified of a message."""
    user = users.find_user_by_username(username)
    found = schemas.Explanation().dump(explanation.explain(None, message_id, user.id))
    if as_json:
        _print_json(found)
        return
    when = f"notified at {found['notified_at']}" if found["notified_at"] else "not notified"
    read = f", read at {found['read_at']}" if found["read_at"] else ""
    click.echo(f"{user.username}: {when}{read}: {found['decision']}. {found['detail']}")


@command(COMMANDS, "verify")
@click.option("--decisions", is_flag=True, help="Also repeat recent decisions, and compare them member by member.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    help="Runs for --decisions, newest first.",
)
@click.option(
    "--since", type=click.IntRange(1, LARGEST_ID), default=1, help="Skip notifications of messages with a lower id."
)
@json_option
def verify(decisions: bool, limit: int, since: int, as_json: bool) -> None:
    """Check the stored data for contradictions and against the rules; exit with 1 if anything is wrong.

    Nothing is locked or changed, so it can run at any time.
    """
    with click.progressbar(length=1, label="notifications", file=sys.stderr) as bar:

        def show(done: int, partitions: int) -> None:
            bar.length = partitions
            bar.update(done - bar.pos)

        report = verification.check(since=since, decisions=limit if decisions else 0, on_partition=show)
    if as_json:
        _print_json({"findings": [finding._asdict() for finding in report.findings], "notes": report.notes})
    else:
        texts = [finding.text for finding in report.findings]
        checks = len(verification.CHECKS) + decisions
        click.echo("\n".join(texts or [f"nothing is wrong: {checks} checks"]))
        click.echo("\n".join(report.notes))
    if report.findings:
        raise SystemExit(1)


@click.group("runs")
def runs_group() -> None:
    """Operate runs: list, show, replay, retry."""


COMMANDS.append(runs_group)


@command(runs_group, "list")
@click.option("--state", type=click.Choice(RUN_STATES))
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def list_runs(state: str | None, limit: int, as_json: bool) -> None:
    """List the newest runs."""
    found = runs.list_runs(before=None, limit=limit, state=state)
    if as_json:
        _print_json([schemas.Run().dump(describe_run(run)) for run in found])
        return
    for run in found:
        click.echo(
            f"{run['id']:>8}  {run['kind']:8} {run['state']:10} message {run['message_id']:<8} "
            f"{run['members_processed']} of {run['members_total'] if run['members_total'] is not None else '?'} members"
            + (f"  {run['error'].splitlines()[0][:100]}" if run["error"] else "")
        )


@command(runs_group, "show")
@click.argument("run_id", type=click.IntRange(1, LARGEST_ID))
@json_option
def show_run(run_id: int, as_json: bool) -> None:
    """Show one run and its statistics."""
    _print_run(runs.find_run(run_id), as_json)


@command(runs_group, "replay")
@click.argument("run_id", type=click.IntRange(1, LARGEST_ID))
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@json_option
def replay_run(run_id: int, dry_run: bool, as_json: bool) -> None:
    """Repeat a run by the rules of now. Nobody is notified twice."""
    replayed = runs.replay(run_id, dry_run=dry_run)
    if replayed["run_id"]:
        queues.enqueue_run(replayed["run_id"])
    if as_json:
        _print_json(replayed)
        return
    action = "to insert" if dry_run or not replayed["run_id"] else "being inserted"
    click.echo(f"{replayed['inserted']} notifications {action}, {replayed['unchanged']} unchanged")
    click.echo(f"  {'decision':20} {'before':>10} {'after':>10}")
    for decision, after in replayed["decisions_after"].items():
        before = replayed["decisions_before"][decision]
        if before or after:
            click.echo(f"  {decision:20} {before:>10} {after:>10}")
    if replayed["run_id"]:
        click.echo(f"run {replayed['run_id']}")


@command(runs_group, "retry")
@click.argument("run_ids", metavar="[ID]...", nargs=-1, type=click.IntRange(1, LARGEST_ID))
@click.option("--failed", is_flag=True, help="All failed runs.")
@json_option
def retry_runs(run_ids: tuple[int, ...], failed: bool, as_json: bool) -> None:
    """Retry failed runs, all (--failed) or the given ones. They continue where they stopped."""
    if bool(run_ids) == failed:
        raise click.UsageError("Give either run ids or --failed.")
    items = recovery.retry_failed(None if failed else run_ids)
    queues.enqueue(items)
    retried = sorted({item.run_id for item in items})
    if as_json:
        _print_json({"retried": retried})
    else:
        click.echo(f"{len(retried)} run(s) retried: {', '.join(map(str, retried))}" if retried else "no failed runs")
