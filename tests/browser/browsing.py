"""A browser at Belfry's pages: signing in, what axe-core finds, and what must not happen on any page."""

import re
from collections.abc import Callable
from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Locator, Page, Request, Response, Route, expect

from tests.people import Cast
from tests.processes import PATIENCE

expect.set_options(timeout=PATIENCE * 1000)

# What a policy refuses is said on the console too, but not of everything that one has to know to mend it.
REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => console.error(
  `policy violated: ${event.effectiveDirective} by ${event.blockedURI} ${event.sourceFile} ${event.sample}`
));
"""


class Faults:
    """What went wrong on the pages of a test; a test with any fails when it ends.

    - an error on the console, and with it whatever the content security policy refuses
    - an exception that nobody caught, and a dialog
    - a request to another host than the site's
    - an answer of 500 or more
    """

    def __init__(self, site: str) -> None:
        self._site = site
        self._found: list[str] = []
        self._expected: list[str] = []
        self._allowed: list[str] = []

    def watch(self, context: BrowserContext) -> None:
        """From here on, all pages of it."""
        context.add_init_script(REPORT_VIOLATIONS)
        context.on("console", self._console)
        context.on("weberror", lambda error: self._add(f"exception: {error.error}"))
        context.on("dialog", self._dialog)
        context.on("request", self._request)
        context.on("response", self._response)

    def expect(self, pattern: str) -> None:
        """One like this (a pattern, found anywhere in it) is what the test is about: it must be there at the end."""
        self._expected.append(pattern)

    def allow(self, pattern: str) -> None:
        """One like this may be there, or not: it is a matter of moments."""
        self._allowed.append(pattern)

    def seen(self, pattern: str) -> bool:
        return any(re.search(pattern, fault) for fault in self._found)

    def check(self) -> None:
        """Fails with all that was found and not expected, and with what was expected and not found."""
        known = [*self._expected, *self._allowed]
        unexpected = [fault for fault in self._found if not any(re.search(pattern, fault) for pattern in known)]
        missing = [pattern for pattern in self._expected if not self.seen(pattern)]
        assert not unexpected, "the browser found fault:\n" + "\n".join(unexpected)
        assert not missing, f"expected of the browser, and not seen: {missing}"

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
            self._add(f"request elsewhere: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 500:
            self._add(f"answer {response.status}: {response.url}")


def sign_in(page: Page, token: str) -> None:
    """Through the form at /login, which says in the end who that is."""
    page.goto("/login?next=/login")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("Signed in as")).to_be_visible()


def address(cast: Cast, channel_id: int, rest: str = "") -> str:
    return f"/servers/{cast.server_id}/channels/{channel_id}{rest}"


def wait_until_live(page: Page) -> None:
    """Returns when the page hears the stream: what is notified from now on, it must show."""
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")


def composer(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message to #")


def lose_first_response(page: Page, lose: Callable[[Route], None] = Route.abort) -> list[int]:
    """The first post is through, and `lose` is what becomes of its answer; whose status there is, once it is lost."""
    lost: list[int] = []

    def answer(route: Route) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch().status)
            lose(route)

    page.route("**/api/messages", answer)
    return lost


def bell(page: Page) -> Locator:
    """By its number, which is hidden while nothing is unread."""
    return page.locator("#bell .number")


def message(page: Page, message_id: int) -> Locator:
    return page.locator(f"#message-{message_id}")


def shown(page: Page) -> list[int]:
    """The ids of the messages, or of the messages of the notifications, in the order in which they stand there."""
    return [int(id_) for id_ in page.locator("main li[data-id]").evaluate_all("all => all.map(one => one.dataset.id)")]


def accessibility_violations(page: Page, within: str | None = None) -> list[str]:
    """What axe-core finds on the page as it is now, or in the elements of a selector; a line for each element."""
    page.evaluate(AXE_SCRIPT)
    found: dict[str, Any] = page.evaluate("(within) => axe.run(within || document)", within)
    return [
        f"{violation['id']} ({violation['impact']}): {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def watch_requests(page: Page, kind: str) -> Callable[[], list[str]]:
    """From here on; the addresses of all requests of that kind (`script`, `image`, `stylesheet`, `fetch`, …)."""
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url) if request.resource_type == kind else None)
    return lambda: seen
