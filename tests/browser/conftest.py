"""Fixtures of the browser tests: Chromium, a web process, and a worker for tests that need one.

Without Chromium they are left out, and the summary says so. Tests open pages with `visit`; a page with a fault makes
its test fail (see `Faults`).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.browsing import Faults, sign_in
from tests.people import Api, Cast, Person
from tests.processes import WAIT_SECONDS, Process, web_process, worker_process
from tools.dev import CommandError, chromium

HERE = Path(__file__).parent
SCREENSHOTS = HERE.parent.parent / ".belfry" / "failed-in-browser"
SKIPPED = pytest.StashKey[int]()
MEASURED = pytest.StashKey[list[str]]()
FAILED = pytest.StashKey[bool]()

Visit = Callable[..., Page]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark these tests slow. Leave them out where there is no Chromium; raise UsageError where CHROMIUM names none."""
    browser_tests = [item for item in items if HERE in item.path.parents]
    for item in browser_tests:
        item.add_marker("slow")
    try:
        if chromium.find() is not None:
            return
    except CommandError as error:
        raise pytest.UsageError(str(error)) from None
    items[:] = [item for item in items if item not in browser_tests]
    config.stash[SKIPPED] = len(browser_tests)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(SKIPPED, 0):
        terminalreporter.write_line(f"{count} browser tests were left out: no Chromium. {chromium.HOW_TO}", yellow=True)
    for line in config.stash.get(MEASURED, []):
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture(scope="package")
def launch() -> Iterator[Callable[[], Browser]]:
    """Playwright runs only during these tests, because its event loop would disturb others."""
    executable = chromium.find()
    assert executable
    with sync_playwright() as playwright, ExitStack() as started:
        running: list[Browser] = []

        def launch() -> Browser:
            if not running or not running[-1].is_connected():
                running.append(started.enter_context(chromium.launch(playwright, executable)))
            return running[-1]

        yield launch


@pytest.fixture
def browser(launch: Callable[[], Browser]) -> Browser:
    """The browser of all tests. A crashed browser is replaced, so that only one test fails."""
    return launch()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`measured("it took 3 ms")`: a line of the summary. No test fails because of a figure."""
    return request.config.stash.setdefault(MEASURED, []).append


@pytest.fixture(scope="package")
def shared_web_process() -> Iterator[str]:
    """The web process of all tests, because starting one takes longer than most tests."""
    with web_process() as address:
        yield address


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of the web process. A test that sets environment variables gets a process of its own."""
    if not hasattr(request, "param"):
        yield request.getfixturevalue("shared_web_process")
        return
    with web_process(**request.param) as address:
        yield address


@pytest.fixture
def worker() -> Iterator[Process]:
    """A worker, for tests in which users are notified."""
    with worker_process() as process:
        yield process


@pytest.fixture
def post(api: Callable[..., Api], cast: Cast) -> Callable[..., int]:
    """`post("text")`: post over the API, by default in #general as sam; the message's id."""

    def post_message(content: str, channel_id: int | None = None, author: Person | None = None) -> int:
        body = {"channel_id": channel_id or cast.general, "content": content}
        response = api(author or cast.subscriber).post("/api/messages", json=body)
        assert response.status_code == 201, response.json
        return int(response.json["id"])

    return post_message


@pytest.fixture
def faults(site: str) -> Iterator[Faults]:
    """The faults of a test's pages, for tests that expect some."""
    faults = Faults(site)
    yield faults
    faults.check()


@pytest.fixture
def visit(browser: Browser, site: str, faults: Faults, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """`visit("/login")`: open a page in a new context; `visit("/", cast.admin)`: after signing in as that user.

    `color_scheme="dark"`, `viewport={"width": 390, "height": 844}` and other options of a browser context may follow.
    If the test fails, screenshots of its pages are stored in .belfry/failed-in-browser/.
    """
    pages: list[Page] = []

    def open_page(path: str, person: Person | None = None, **options: object) -> Page:
        context = browser.new_context(base_url=site, reduced_motion="reduce", **options)
        context.set_default_timeout(WAIT_SECONDS * 1000)
        faults.watch(context)
        page = context.new_page()
        pages.append(page)
        if person:
            sign_in(page, person.token)
        page.goto(path)
        return page

    yield open_page
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    for number, page in enumerate(pages, start=1):
        if request.node.stash.get(FAILED, False):
            page.screenshot(path=SCREENSHOTS / f"{name}-{number}.png", full_page=True)
        page.context.close()
