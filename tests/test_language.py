"""Code, documents and pages use the words of docs/glossary.md, and SQL aliases are words."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.dev import ROOT

TEXT = {".py", ".md", ".html", ".js", ".css", ".conf", ".cfg", ".toml", ".txt", ".example", ""}
NOT_OURS = re.compile(r"^(tests/golden/|tests/data/|requirements.*\.lock|docs/charts/|migrations/000|migrations/0010)")
"""Files with words of others: golden files, published lists, and migrations with earlier column names."""
WORDS = {
    r"tell|tells|telling|tellings|told|untold": "notify, notified",
    r"whoever|whomever|whosoever": "the user, the worker that …",
    r"withdraw|withdraws|withdrawn|withdrawal": "retract",
    r"take[ns]? back|took back": "retract",
    r"as it were|so to speak": "(nothing)",
    r"in hand": "current",
    r"is dear|are dear|too dear": "expensive",
}
NAMES = {
    "told": "notified", "tell": "notify", "telling": "notification", "tellings": "notifications",
    "person": "user", "people": "users", "persons": "users", "community": "server", "communities": "servers",
    "tries": "attempts", "trial": "attempt", "trials": "attempts", "withdrawn": "retracted", "withdraw": "retract",
    "hold": "lock", "held": "locked", "look": "poll", "listener": "client", "listeners": "clients",
}  # fmt: skip
"""Parts of identifiers in the product, and what to write instead."""
ALIAS = re.compile(r"(?<![\w.%('\\])([a-z])\.[a-z_]{2,}")


def files() -> list[Path]:
    found = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    paths = [ROOT / name for name in found if not NOT_OURS.match(name)]
    return [path for path in paths if path.suffix in TEXT and path.is_file()]


def product() -> list[Path]:
    paths = [path for path in files() if path.suffix == ".py"]
    return [path for path in paths if path.relative_to(ROOT).parts[0] not in ("tests", "tools")]


@pytest.mark.parametrize("word", WORDS)
def test_replaced_words_of_the_glossary_are_not_used(word):
    pattern = re.compile(rf"\b({word})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line.replace("_", " "))
    ]
    assert not found, f"{len(found)} lines; write: {WORDS[word]}\n" + "\n".join(found[:40])


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno


def test_identifiers_use_the_glossarys_terms():
    found = []
    for path in product():
        for name, line in identifiers(ast.parse(path.read_text())):
            for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name):
                if part.lower() in NAMES:
                    found.append(f"{path.relative_to(ROOT)}:{line}: {name} ({NAMES[part.lower()]})")
    assert not found, f"{len(found)} names:\n" + "\n".join(found[:60])


def test_sql_aliases_are_words():
    found = []
    for path in product():
        tree = ast.parse(path.read_text())
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        docstrings = {id(node.value) for node in statements if isinstance(node.value, ast.Constant)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
            if isinstance(text, str) and (match := ALIAS.search(text)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {match[0]}")
    assert not found, f"{len(found)} aliases:\n" + "\n".join(found[:40])
