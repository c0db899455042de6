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
    requirements_by_name = {}
    for line in text.splitlines():
        specification, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        requirement = Requirement(specification)
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), requirement
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), f"{requirement} is not one version"
        name = canonicalize_name(requirement.name)
        assert name not in requirements_by_name, f"{name} has two versions"
        requirements_by_name[name] = requirement, set(hashes)
    return requirements_by_name


def applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def installed_dependencies(requirements: list[Requirement]) -> set[str]:
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
        for dependency in map(Requirement, distribution(name).requires or []):
            if any(applies(dependency, extra) for extra in ("", *one.extras)):
                waiting.append(dependency)
    return names


@pytest.mark.parametrize("lock", SHORT_LISTS)
def test_a_lock_file_contains_exactly_the_dependencies_of_its_short_lists(lock):
    requirements = [one for name in SHORT_LISTS[lock] for one in listed(name)]
    in_lock = locked(lock)
    for one in requirements:
        assert in_lock[canonicalize_name(one.name)][0].specifier == one.specifier, f"{one}: run `make lock`"
    applicable = {name for name, (requirement, _) in in_lock.items() if applies(requirement)}
    assert applicable == installed_dependencies(requirements), "run `make lock`, or `make setup`"


def test_installed_versions_are_the_locked_ones():
    for name, (requirement, _) in locked("requirements-dev.lock").items():
        if applies(requirement):
            assert distribution(name).version in requirement.specifier, f"{requirement}: run `make setup`"


def test_both_lock_files_have_the_same_versions_and_hashes():
    production, development = locked("requirements.lock"), locked("requirements-dev.lock")
    for name, (requirement, hashes) in production.items():
        assert (str(development[name][0]), development[name][1]) == (str(requirement), hashes)


@pytest.mark.parametrize("lock", SHORT_LISTS)
def test_a_lock_file_contains_no_url_or_option(lock):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, re.MULTILINE)
