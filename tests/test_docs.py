"""The documents say what there is: every variable, command, address and queue, and no more."""

import re
from dataclasses import fields
from pathlib import Path

import click

from belfry.cli.commands import COMMANDS
from belfry.queue import queues
from config import Settings
from models import TABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows_of(heading: str) -> list[str]:
    """The first cells of the first table under a heading of the README."""
    section = README.split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table
    return [line.split("|")[1].strip() for line in table[0].splitlines()[2:]]


def test_every_variable_is_in_the_readme_with_its_default_and_in_the_example():
    variables = {variable.name.upper(): variable.default for variable in fields(Settings)}
    assert sorted(cell.strip("`") for cell in rows_of("## Environment")) == sorted(variables)
    for line in (line for line in README.splitlines() if line.startswith("| `") and line.count("|") == 4):
        name, default = (cell.strip() for cell in line.split("|")[1:3])
        value = variables.get(name.strip("`"))
        if value not in (None, ""):
            shown = str(int(value) if isinstance(value, bool) else value)
            assert default == f"`{shown}`", name
    example = dict(
        line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"[A-Z_]+=", line)
    )
    assert sorted(example) == sorted(variables)
    for name, value in example.items():
        shown = variables[name]
        assert value == str(int(shown) if isinstance(shown, bool) else shown), name


def test_nothing_else_reads_the_environment():
    for path in [*ROOT.glob("*.py"), *(ROOT / "belfry").glob("*.py"), *(ROOT / "views").glob("*.py")]:
        if path.name != "config.py":
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), path


def test_every_command_is_in_the_readme_and_has_help():
    documented = " ".join(rows_of("## Commands"))
    for command in COMMANDS:
        assert command.help, command.name
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                assert f"`{command.name} {name}" in documented, (command.name, name)
                assert inner.help, name
        else:
            assert f"`{command.name}" in documented, command.name


def test_every_address_is_in_the_readme_and_in_the_map_of_app_py(app):
    documented = README.split("## The API by example", 1)[1].split("### Who is notified", 1)[0]
    addresses = {
        (method, re.sub(r"\{\w+\}", "{id}", re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint != "static" and not rule.rule.startswith("/rq")
    }
    said = set()
    method = "(?:GET|POST|PUT|PATCH|DELETE)"
    for methods, address in re.findall(rf"({method}(?:, {method})*) (/[\w/{{}}-]*)", documented):
        said |= {(method, address) for method in methods.split(", ")}
    said |= {(method, address) for address in ("/login",) for method in ("GET", "POST")} | {("POST", "/logout")}
    said |= {("GET", address) for address in re.findall(r"`(/[a-z.]+)`", documented) if address != "/rq"}
    said -= {("GET", "/logout")}
    assert addresses == said
    app_map = (ROOT / "app.py").read_text()
    for view in (ROOT / "views").glob("*.py"):
        if "blueprint" in view.read_text() or "@api." in view.read_text():
            assert view.name in app_map or view.name in ("__init__.py", "endpoint.py", "problems.py", "limits.py"), view


def test_every_queue_is_in_the_readme():
    for queue in queues.QUEUES:
        assert queue in README


def test_every_linked_file_is_there():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_every_make_target_that_the_readme_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)):
        assert re.search(rf"^{target}:|^[a-z ]*\b{target}\b[a-z ]*:", makefile, re.MULTILINE), target


def test_every_table_is_in_the_design():
    design = (ROOT / "docs" / "design.md").read_text()
    for table in TABLES:
        assert f"`{table._meta.table_name}`" in design, table
