"""The documents name every variable, command, route, metric, decision, queue, table and room."""

import re
from dataclasses import fields
from pathlib import Path

import click
import pytest

from belfry.cli.command import COMMANDS
from belfry.fanout.decision import DECISIONS
from belfry.queue import queues
from config import Settings
from models import TABLES
from tools.dev import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
METHODS = "(?:GET|POST|PUT|PATCH|DELETE)"


def reference(name: str) -> str:
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text()


def rows(text: str, heading: str = "") -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = re.search(r"(?:^\|.*\n)+", text.split(heading, 1)[1] if heading else text, re.MULTILINE)
    assert table
    lines = table[0].replace(r"\|", "/").splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_every_variable_is_in_the_reference_with_its_default_and_in_the_example():
    variables = {variable.name.upper(): variable.default for variable in fields(Settings)}
    documented = {name.strip("`"): default for name, default, _ in rows(reference("environment"))}
    assert documented.keys() == variables.keys()
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    assert example.keys() == variables.keys()
    for name, value in variables.items():
        text = str(int(value) if isinstance(value, bool) else value)
        assert example[name] == text, name
        assert documented[name].startswith(f"`{text}`" if text else "none"), name


def test_only_config_reads_the_environment():
    for path in [*ROOT.glob("*.py"), *(ROOT / "belfry").rglob("*.py")]:
        if path.name != "config.py":
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), path


def test_every_command_is_in_the_reference_and_has_help():
    documented = " ".join(row[0] for row in rows(reference("commands")))
    for command in COMMANDS:
        assert command.help, command.name
        inner = command.commands if isinstance(command, click.Group) else {}
        names = [f"{command.name} {name}" for name in inner] or [command.name]
        for name in names:
            assert f"`{name}" in documented, name


def test_every_route_is_in_the_reference_and_no_other(app):
    routes = {
        (method, re.sub(r"<[^>]+>", "{id}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint != "static" and not rule.rule.startswith("/rq")
    }
    documented = {
        (method, path)
        for methods, path in re.findall(
            rf"^\| `({METHODS}(?:, {METHODS})*) (/[^`?]*)`", reference("http"), re.MULTILINE
        )
        for method in methods.split(", ")
    }
    assert documented == routes


def test_every_metric_is_in_the_reference_and_no_other(api, cast):
    printed = set(re.findall(r"^# TYPE (\w+) gauge$", api(cast.admin).get("/metrics").text, re.MULTILINE))
    assert {row[0].strip("`") for row in rows(reference("metrics"))} == printed


def test_every_decision_is_in_the_reference():
    assert {row[0].strip("`") for row in rows(reference("decisions"))} == set(DECISIONS)


def test_every_queue_is_in_the_reference():
    assert [row[0].strip("`") for row in rows(reference("queues"))] == list(queues.QUEUES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_every_make_target_exists(document: Path):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)\b|^make ([a-z]+)\b", text, re.MULTILINE)):
        name = "".join(target)
        assert re.search(rf"^(?:[a-z]+ )*{name}(?: [a-z]+)*:", makefile, re.MULTILINE), name


def test_every_table_and_every_room_is_in_the_design():
    design = (ROOT / "docs" / "design.md").read_text()
    for table in TABLES:
        assert f"`{table._meta.table_name}`" in design, table
    for room in (ROOT / "belfry").iterdir():
        if (room / "__init__.py").exists():
            assert f"`belfry/{room.name}`" in design, room
