"""How the browser of tests and screenshots is found, and what is reported without one."""

import os
import re
import subprocess
import sys

import pytest

from tools.dev import ROOT, CommandError, chromium

pytestmark = pytest.mark.slow


@pytest.fixture
def install_programs(tmp_path, monkeypatch):
    """`install_programs("chromium")`: make PATH contain only these programs; their directory."""

    def install(*names: str):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CHROMIUM", raising=False)
        return tmp_path

    return install


def test_the_first_chromium_on_the_path_is_used(install_programs):
    directory = install_programs("google-chrome", "chromium")
    assert chromium.find() == directory / "chromium"


def test_the_named_chromium_is_preferred(install_programs, monkeypatch):
    directory = install_programs("chromium", "mine")
    monkeypatch.setenv("CHROMIUM", str(directory / "mine"))
    assert chromium.find() == directory / "mine"


def test_a_named_chromium_that_is_missing_is_an_error(install_programs, monkeypatch):
    monkeypatch.setenv("CHROMIUM", str(install_programs("chromium") / "missing"))
    with pytest.raises(CommandError, match="missing"):
        chromium.find()


def test_the_summary_counts_tests_that_need_a_missing_chromium(install_programs):
    install_programs()
    assert chromium.find() is None
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/browser", "tests/test_layers.py", "--collect-only", "-q"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert collected.returncode == 0, collected.stdout
    assert re.search(r"^\d+ browser tests were left out: no Chromium\. Install ", collected.stdout, re.MULTILINE)
    assert "tests/test_layers.py::" in collected.stdout
    assert "tests/browser/" not in collected.stdout
