"""The commands: `flask --app app COMMAND`. Each has --help, and --json where it prints data."""

import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from flask import Flask
from marshmallow import ValidationError

import schemas
from belfry.cli import seeding
from belfry.cli.command import COMMANDS, Output, command
from belfry.cli.runs import run_output
from belfry.core import migrations
from belfry.core.db import LARGEST_ID, db
from belfry.fanout import runs
from belfry.identity import subscriptions, tokens, users
from belfry.integrity import verification
from belfry.messages import explanation
from belfry.messages.send_test import AUDIENCES, send_test
from belfry.queue import queues
from belfry.worker import supervisor
from config import settings
from models import SUBSCRIPTION_STATUSES, User

WAIT_SECONDS = 600


def register(app: Flask) -> None:
    """Register the commands."""
    for one in COMMANDS:
        app.cli.add_command(one)


@command("migrate")
def migrate() -> Output:
    """Bring the schema up to date. Safe to run twice and concurrently."""
    applied = migrations.migrate()
    return Output({"applied": applied}, "\n".join(f"applied {name}" for name in applied) or "nothing to do")


@command("create-user")
@click.argument("username", metavar="USERNAME")
@click.option("--admin", is_flag=True, help="Make the user an admin.")
@click.option("--display-name", metavar="N", help="The name that others see; USERNAME by default.")
@click.option("--email")
@click.option("--subscription", type=click.Choice(SUBSCRIPTION_STATUSES), help="Add a subscription that does not end.")
@click.option("--token", "with_token", is_flag=True, help="Create a token as well, and print it once.")
def create_user(
    username: str,
    admin: bool,
    display_name: str | None,
    email: str | None,
    subscription: str | None,
    with_token: bool,
) -> Output:
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
        token = {"token": tokens.create_token(user)[1]} if with_token else {}
    return Output(
        {"id": user.id, "username": user.username, "name": user.name, "is_admin": user.is_admin, **token},
        f"user {user.id}: {user.username}{' (admin)' if admin else ''}"
        + (f"\ntoken: {token['token']}" if token else ""),
    )


@command("create-token")
@click.argument("username", metavar="USERNAME")
@click.option("--days", type=click.IntRange(1, 36_500), help="Days until the token expires; by default it does not.")
def create_token(username: str, days: int | None) -> Output:
    """Create a token for a user, and print it once."""
    user = users.find_user_by_username(username)
    stored, token = tokens.create_token(user, datetime.now(UTC) + timedelta(days=days) if days else None)
    expires_at = stored["expires_at"].isoformat() if days else None
    return Output({"username": user.username, "token": token, "expires_at": expires_at}, token)


@command("login-link")
@click.argument("username", metavar="USERNAME")
def login_link(username: str) -> Output:
    """Print a link that signs a user in once, in a browser, within ten minutes."""
    secret = tokens.create_login_link(users.find_user_by_username(username))
    link = f"{settings.public_url}/login/link/{secret}"
    return Output({"username": username, "link": link}, link)


@command("seed")
@click.option("--members", type=click.IntRange(1, 10_000_000), required=True)
@click.option("--channels", type=click.IntRange(1, 1000), default=3, show_default=True)
def seed(members: int, channels: int) -> Output:
    """Create sample data: a server with members, roles, channels, subscriptions and preferences."""
    with click.progressbar(length=members, label="members", file=sys.stderr) as bar:
        created = seeding.seed(members, channels, bar.update)
    text = (
        f"server {created['server_id']}, channels {', '.join(map(str, created['channel_ids']))}, "
        f"{members} members ({', '.join(created['usernames'])}, …)"
    )
    return Output(created, text)


@command("send-test-notification")
@click.option("--channel", "channel_id", type=click.IntRange(1, LARGEST_ID), help="By default the first channel.")
@click.option("--audience", type=click.Choice(AUDIENCES), default="me", show_default=True)
@click.option("--sender", metavar="USERNAME", help="Who sends it; by default the first admin.")
@click.option("--wait", is_flag=True, help="Show progress and statistics; exit with 1 if the run failed.")
def send_test_notification(channel_id: int | None, audience: str, sender: str | None, wait: bool) -> Output:
    """Send a test notification through the real queue."""
    run_id = send_test(_sender(sender), channel_id, None, audience)
    if not queues.enqueue_run(run_id):
        click.echo("Redis is unavailable. A worker will find the run when Redis is available again.", err=True)
    return run_output(_wait(run_id) if wait else runs.find_run(run_id))


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


@command("worker")
@click.option("--burst", is_flag=True, help="Stop when the queues are empty.")
def worker(burst: bool) -> None:
    """Run jobs: fan-out, retries, recovery. SIGTERM lets the current job finish."""
    supervisor.work(burst)


@command("explain")
@click.argument("message_id", type=click.IntRange(1, LARGEST_ID))
@click.argument("username")
def explain(message_id: int, username: str) -> Output:
    """Explain why a user was or was not notified of a message."""
    user = users.find_user_by_username(username)
    found = schemas.Explanation().dump(explanation.explain(None, message_id, user.id))
    when = f"notified at {found['notified_at']}" if found["notified_at"] else "not notified"
    read = f", read at {found['read_at']}" if found["read_at"] else ""
    return Output(found, f"{user.username}: {when}{read}: {found['decision']}. {found['detail']}")


@command("verify")
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
def verify(decisions: bool, limit: int, since: int) -> Output:
    """Check the stored data for contradictions and against the rules; exit with 1 if anything is wrong.

    Nothing is locked or changed, so it can run at any time.
    """
    with click.progressbar(length=1, label="notifications", file=sys.stderr) as bar:

        def show(done: int, partitions: int) -> None:
            bar.length = partitions
            bar.update(done - bar.pos)

        report = verification.check(since=since, decisions=limit if decisions else 0, on_partition=show)
    texts = [finding.text for finding in report.findings]
    texts = texts or [f"nothing is wrong: {len(verification.CHECKS) + decisions} checks"]
    return Output(
        {"findings": [finding._asdict() for finding in report.findings], "notes": report.notes},
        "\n".join(texts + report.notes),
        succeeded=not report.findings,
    )
