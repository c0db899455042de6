"""The lock files contain exactly the packages that the short lists need, with hashes."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SHORT_LISTS = {
    "requirements.lock": ["requirements.txt"],
    "requirements-dev.lock": ["requirements.txt", "requirements-dev.txt"],
}


def listed(name: str) -> list[Requirement]:
    """The packages of a short list."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def locked(lock: str) -> dict[str, tuple[Requirement, set[str]]]:
    """{canonical name: (requirement, hashes)} of a lock file."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / lock).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        words, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        requirement = Requirement(words)
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), requirement
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), f"{requirement} is not one version"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} has two versions"
        found[name] = requirement, set(hashes)
    return found


def applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def pulled_in(requirements: list[Requirement]) -> set[str]:
    """The names of these packages and of all their installed dependencies."""
    names: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [one for one in requirements if applies(one)]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        names.add(name)
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        for needed in map(Requirement, distribution(name).requires or []):
            if any(applies(needed, extra) for extra in ("", *one.extras)):
                waiting.append(needed)
    return names


@pytest.mark.parametrize("lock", SHORT_LISTS)
def test_a_lock_file_is_what_its_short_lists_pull_in(lock):
    short = [one for name in SHORT_LISTS[lock] for one in listed(name)]
    in_lock = locked(lock)
    for one in short:
        assert in_lock[canonicalize_name(one.name)][0].specifier == one.specifier, f"{one}: run `make lock`"
    here = {name for name, (requirement, _) in in_lock.items() if applies(requirement)}
    assert here == pulled_in(short), "run `make lock`, or `make setup`"


def test_what_is_installed_is_what_is_locked():
    for name, (requirement, _) in locked("requirements-dev.lock").items():
        if applies(requirement):
            assert distribution(name).version in requirement.specifier, f"{requirement}: run `make setup`"


def test_both_lock_files_agree():
    production, development = locked("requirements.lock"), locked("requirements-dev.lock")
    for name, (requirement, hashes) in production.items():
        assert (str(development[name][0]), development[name][1]) == (str(requirement), hashes)


@pytest.mark.parametrize("lock", SHORT_LISTS)
def test_a_lock_file_names_no_place_to_install_from(lock):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, re.MULTILINE)
