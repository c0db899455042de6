"""Helpers for browser tests: signing in, accessibility checks, and faults that no page may have."""

import re
from collections.abc import Callable
from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Locator, Page, Request, Response, Route, expect

from tests.people import Cast
from tests.processes import WAIT_SECONDS

expect.set_options(timeout=WAIT_SECONDS * 1000)

# The browser's own console message about a policy violation lacks the element and the source.
REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => console.error(
  `policy violated: ${event.effectiveDirective} by ${event.blockedURI} ${event.sourceFile} ${event.sample}`
));
"""


class Faults:
    """Collects the faults of a test's pages. A test with an unexpected fault fails when it ends.

    - an error on the console, which includes every violation of the content security policy
    - an uncaught exception, and a dialog
    - a request to another host than the site's
    - a response with status 500 or more
    """

    def __init__(self, site: str) -> None:
        self._site = site
        self._found: list[str] = []
        self._expected: list[str] = []
        self._allowed: list[str] = []

    def watch(self, context: BrowserContext) -> None:
        """Watch all pages of a context from now on."""
        context.add_init_script(REPORT_VIOLATIONS)
        context.on("console", self._console)
        context.on("weberror", lambda error: self._add(f"exception: {error.error}"))
        context.on("dialog", self._dialog)
        context.on("request", self._request)
        context.on("response", self._response)

    def expect(self, pattern: str) -> None:
        """Expect a fault that matches a pattern: it must occur until the end of the test."""
        self._expected.append(pattern)

    def allow(self, pattern: str) -> None:
        """Allow a fault that matches a pattern, which may or may not occur."""
        self._allowed.append(pattern)

    def has_occurred(self, pattern: str) -> bool:
        return any(re.search(pattern, fault) for fault in self._found)

    def check(self) -> None:
        """Fail with the unexpected faults that occurred, and with the expected ones that did not."""
        known = [*self._expected, *self._allowed]
        unexpected = [fault for fault in self._found if not any(re.search(pattern, fault) for pattern in known)]
        missing = [pattern for pattern in self._expected if not self.has_occurred(pattern)]
        assert not unexpected, "unexpected faults in the browser:\n" + "\n".join(unexpected)
        assert not missing, f"expected faults did not occur: {missing}"

    def _add(self, fault: str) -> None:
        self._found.append(fault)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._add(f"console: {message.text} ({message.location.get('url', '')})")

    def _dialog(self, dialog: Dialog) -> None:
        self._add(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        if not request.url.startswith((f"{self._site}/", "data:", "blob:")):
            self._add(f"request to another host: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 500:
            self._add(f"response {response.status}: {response.url}")


def sign_in(page: Page, token: str) -> None:
    """Sign in with the form at /login."""
    page.goto("/login?next=/login")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("Signed in as")).to_be_visible()


def address(cast: Cast, channel_id: int, rest: str = "") -> str:
    return f"/servers/{cast.server_id}/channels/{channel_id}{rest}"


def wait_until_live(page: Page) -> None:
    """Wait until the page's stream is open, so that it shows everything from now on."""
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")


def composer(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message to #")


def lose_first_response(page: Page, lose: Callable[[Route], None] = Route.abort) -> list[int]:
    """Let the first post reach the server and lose its response; a list with the lost status, once it is lost."""
    lost: list[int] = []

    def lose_first(route: Route) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch().status)
            lose(route)

    page.route("**/api/messages", lose_first)
    return lost


def bell(page: Page) -> Locator:
    """The number in the bell, which is hidden while nothing is unread."""
    return page.locator("#bell .number")


def message(page: Page, message_id: int) -> Locator:
    return page.locator(f"#message-{message_id}")


def shown(page: Page) -> list[int]:
    """The message ids of the listed messages or notifications, in the order of the page."""
    return [int(id_) for id_ in page.locator("main li[data-id]").evaluate_all("all => all.map(one => one.dataset.id)")]


def accessibility_violations(page: Page, within: str | None = None) -> list[str]:
    """What axe-core finds on the page, or in the elements of a selector: one line for each element."""
    page.evaluate(AXE_SCRIPT)
    found: dict[str, Any] = page.evaluate("(within) => axe.run(within || document)", within)
    return [
        f"{violation['id']} ({violation['impact']}): {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def watch_requests(page: Page, kind: str) -> Callable[[], list[str]]:
    """Record requests from now on; returns a function that gives the URLs of one kind (`script`, `fetch`, …)."""
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url) if request.resource_type == kind else None)
    return lambda: seen
