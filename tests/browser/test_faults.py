"""The fixture `faults` detects what no page may do."""

import pytest

from tests.browser.browsing import Faults, accessibility_violations
from tests.processes import wait_until


@pytest.mark.parametrize(
    ("fault", "script"),
    [
        ("policy violated: script-src", "document.body.setAttribute('onclick', 'alert(1)')"),
        ("policy violated: img-src", "new Image().src = 'https://elsewhere.example/x.png'"),
        ("exception: .*oh no", "setTimeout(() => { throw new Error('oh no') })"),
        ("console: oh no", "console.error('oh no')"),
        ("dialog: oh no", "setTimeout(() => alert('oh no'))"),
        ("request to another host: http://elsewhere.example/", "setTimeout(() => location = 'http://elsewhere.example/')"),
    ],
    ids=["script", "image", "exception", "console", "dialog", "request"],
)
def test_each_forbidden_fault_fails_a_test(visit, faults, fault, script) -> None:
    page = visit("/login")
    page.evaluate(f"() => {{ {script} }}")
    # Any request to Playwright delivers the pending events.
    wait_until(lambda: page.context.cookies() is not None and faults.has_occurred(fault), fault)
    with pytest.raises(AssertionError, match="unexpected faults"):
        faults.check()
    faults.expect(".")


def test_an_expected_fault_must_occur() -> None:
    faults = Faults("http://127.0.0.1:1")
    faults.check()
    faults.expect("401")
    with pytest.raises(AssertionError, match="did not occur"):
        faults.check()


def test_axe_finds_violations(visit) -> None:
    page = visit("/login")
    assert accessibility_violations(page) == []
    page.evaluate("() => document.querySelector('label').remove()")
    assert "label" in [fault.split()[0] for fault in accessibility_violations(page)]
