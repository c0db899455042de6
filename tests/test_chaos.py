"""The short form of `make chaos`; and that the harness would see what it looks for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from belfry.points import POINTS
from chaos.recovery import _Run
from chaos.stage import Sign
from dev.processes import finish

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    os.environ.get("BELFRY_TEST_EXTERNAL") == "1",
    reason="it kills its servers, which are embedded ones, and those are not used when DATABASE_URL is set",
)
def test_nobody_is_missed_or_told_twice_while_everything_is_killed():
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
    process = subprocess.Popen(
        [sys.executable, "-m", "chaos", "--kills", "25", "--minutes", "2", "--seed", "7"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        finish(process)
    result = json.loads(output.splitlines()[-1])
    off = {name: result[name] for name in ("missing", "duplicates", "wrong_decision", "unresolved_runs")}
    assert set(off.values()) == {0}, output
    assert process.returncode == 0, output
    assert result["kills"] >= 20, output
    assert result["points_covered"] >= 5, output
    assert result["posts"] > 20, output


def test_every_point_is_in_the_code_and_every_one_in_the_code_is_known():
    sources = [*ROOT.glob("*.py"), *(ROOT / "belfry").glob("*.py"), *(ROOT / "views").glob("*.py")]
    reached = set()
    for path in sources:
        for call in re.findall(r"\breach\(([^()]*)\)", path.read_text()):
            reached |= set(re.findall(r'"([a-z]+\.[a-z]+)"', call))
    assert reached == set(POINTS)


def signs(*of: tuple[float, str, str]) -> list[Sign]:
    return [Sign(when, 1, after, point) for when, after, point in of]


def test_a_run_has_gone_on_with_its_next_sign_of_life():
    taken, again, done = (12, "None", "run.taken"), (20, "None", "run.taken"), (30, "None", "run.committed")
    run = _Run(1, 10.0, 30.0, signs(taken, again, done))
    assert [run.wait(when) for when in (9.9, 10, 13, 29, 30)] == [None, 2.0, 7.0, 1.0, None]


def test_a_run_that_never_goes_on_is_never_recovered():
    assert _Run(1, 10.0, float("inf"), signs((12, "None", "run.taken"))).wait(13) == float("inf")


def test_a_slice_that_failed_waits_for_its_retry_and_another_does_not():
    run = _Run(
        1, 0.0, 99.0,
        signs((1, "0", "slice.taken"), (2, "0", "failure.written"), (3, "50", "slice.taken"), (20, "0", "slice.taken"),
              (40, "50", "slice.taken")),
    )  # fmt: skip
    assert run.wait(4) is None
    assert run.wait(21) == 19
