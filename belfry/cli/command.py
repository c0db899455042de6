"""The decorator of all commands: it registers them, prints their output and reports their errors."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click
from peewee import InterfaceError, OperationalError, ProgrammingError

from belfry.core import migrations
from belfry.core.db import db
from belfry.core.errors import DomainError


@dataclass(frozen=True)
class Output:
    """The output of a command: `data` with --json, otherwise `text`. The exit status is 1 unless `succeeded`."""

    data: Any
    text: str
    succeeded: bool = True


COMMANDS: list[click.Command] = []


def command(name: str, group: click.Group | None = None) -> Callable[[Callable[..., Output | None]], click.Command]:
    """Register a command, in a group or at the top level.

    It gets the option --json where it returns Output. An error of the domain or of the database is printed as one
    sentence with exit status 1. Its database connection is closed.
    """

    def decorate(function: Callable[..., Output | None]) -> click.Command:
        @wraps(function)
        def run(*arguments: Any, as_json: bool = False, **options: Any) -> None:
            try:
                output = function(*arguments, **options)
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
            if output:
                click.echo(json.dumps(output.data, ensure_ascii=False) if as_json else output.text)
                if not output.succeeded:
                    raise SystemExit(1)

        made = click.command(name)(run)
        if function.__annotations__["return"] is Output:
            made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."))
        if group is not None:
            group.add_command(made)
        else:
            COMMANDS.append(made)
        return made

    return decorate
