"""The commands of `flask runs`."""

from typing import Any

import click

import schemas
from belfry.cli.command import COMMANDS, Output, command
from belfry.core.db import LARGEST_ID
from belfry.fanout import recovery, runs
from belfry.queue import queues
from models import RUN_STATES


@click.group("runs")
def group() -> None:
    """Operate runs: list, show, replay, retry."""


COMMANDS.append(group)


def run_output(run: dict[str, Any]) -> Output:
    """One run, its error and its statistics. A failed run does not succeed."""
    data = schemas.Run().dump(run)
    statistics = data["stats"]
    lines = [
        f"run {data['id']} ({data['kind']}) of message {data['message_id']}: {data['state']}, "
        f"attempt {data['attempts']}, {data['progress']['done']} of {data['progress']['total'] or '?'} members",
        *([f"  error: {data['error']}"] if data["error"] else []),
        f"  {statistics['notified']} of {statistics['audience']} members notified;"
        f" {statistics['inserted']} notifications inserted",
        *(f"  {decision:20} {members:>10}" for decision, members in statistics["decisions"].items() if members),
    ]
    return Output(data, "\n".join(lines), succeeded=data["state"] != "failed")


@command("list", group)
@click.option("--state", type=click.Choice(RUN_STATES))
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
def list_runs(state: str | None, limit: int) -> Output:
    """List the newest runs."""
    found = runs.list_runs(before=None, limit=limit, state=state)
    lines = [
        f"{run['id']:>8}  {run['kind']:8} {run['state']:10} message {run['message_id']:<8} "
        f"{run['members_processed']} of {run['members_total'] if run['members_total'] is not None else '?'} members"
        + (f"  {run['error'].splitlines()[0][:100]}" if run["error"] else "")
        for run in found
    ]
    return Output(schemas.Run(many=True).dump(found), "\n".join(lines) or "no runs")


@command("show", group)
@click.argument("run_id", type=click.IntRange(1, LARGEST_ID))
def show_run(run_id: int) -> Output:
    """Show one run and its statistics."""
    shown = run_output(runs.find_run(run_id))
    return Output(shown.data, shown.text)


@command("replay", group)
@click.argument("run_id", type=click.IntRange(1, LARGEST_ID))
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
def replay_run(run_id: int, dry_run: bool) -> Output:
    """Repeat a run by the rules of now. Nobody is notified twice."""
    replayed = runs.replay(run_id, dry_run=dry_run)
    new_run = replayed["run_id"]
    if new_run:
        queues.enqueue_run(new_run)
    decisions = [
        (decision, replayed["decisions_before"][decision], after)
        for decision, after in replayed["decisions_after"].items()
    ]
    lines = [
        f"{replayed['inserted']} notifications {'being inserted' if new_run else 'to insert'},"
        f" {replayed['unchanged']} unchanged",
        f"  {'decision':20} {'before':>10} {'after':>10}",
        *(f"  {decision:20} {before:>10} {after:>10}" for decision, before, after in decisions if before or after),
        *([f"run {new_run}"] if new_run else []),
    ]
    return Output(replayed, "\n".join(lines))


@command("retry", group)
@click.argument("run_ids", metavar="[ID]...", nargs=-1, type=click.IntRange(1, LARGEST_ID))
@click.option("--failed", is_flag=True, help="All failed runs.")
def retry_runs(run_ids: tuple[int, ...], failed: bool) -> Output:
    """Retry failed runs, all (--failed) or the given ones. They continue where they stopped."""
    if bool(run_ids) == failed:
        raise click.UsageError("Give either run ids or --failed.")
    items = recovery.retry_failed(None if failed else run_ids)
    queues.enqueue(items, lost=True)
    retried = sorted({item.run_id for item in items})
    text = f"{len(retried)} run(s) retried: {', '.join(map(str, retried))}" if retried else "no failed runs"
    return Output({"retried": retried}, text)
