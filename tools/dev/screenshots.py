"""`screenshots`: take screenshots of the main screens for the documents, with data that is removed afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tools.dev import ROOT, CommandError, chromium, say, signals, stack
from tools.dev.client import Client
from tools.dev.harness import Harness

MEMBERS = 4_000
SCREENSHOTS = ROOT / "docs" / "screenshots"
FANOUT_SECONDS = 60

USERS = {"nora": "Nora Lind", "emil": "Emil Brandt", "ida": "Ida Okafor"}
MESSAGES = (
    ("announcements", "admin", "Welcome. **Signals** are in #general; the weekly outlook comes here, on Sundays."),
    ("general", "emil", "Morning all. Anything moving before the open?"),
    (
        "general",
        "ida",
        "Gold is *quiet*, silver less so:\n\n- support at `23.10`, tested twice\n- volume above its average",
    ),
    ("general", "emil", "Thanks, @ida. Watching that one, too."),
    (
        "general",
        "admin",
        "**Gold breaks out** above 2,075. Plan as [discussed](https://example.com/plan):"
        "\n\n> half now, half on the retest\n\n@nora please confirm your stop.",
    ),
    ("general", "nora", "Stop is at 2,058. In with half."),
    ("announcements", "admin", "@everyone The call is at 15:00 today, an hour earlier than usual."),
    ("general", "ida", "Same here. @emil @nora see you at the call?"),
)


@dataclass(frozen=True)
class Screen:
    """What a screenshot shows. `path` may name a channel; `signed_in` is a username; `prepare` opens dialogs."""

    name: str
    path: str
    signed_in: str = ""
    dark: bool = False
    width: int = 1280
    height: int = 800
    prepare: Callable[[Page], None] | None = None


def _open_setting(page: Page) -> None:
    page.locator("#setting-button").click()
    page.get_by_label("mentions only").check()
    page.get_by_role("button", name="For an hour").click()
    page.get_by_role("button", name="Unmute").wait_for()


def _open_run(page: Page) -> None:
    _message(page, "Gold breaks out").get_by_role("button", name="Recipients").click()
    page.get_by_text("members were notified").wait_for()


def _open_why(page: Page) -> None:
    _message(page, "Gold breaks out").get_by_role("button", name="Why?").click()
    page.get_by_label("Another user").fill("nora")
    page.get_by_role("option").click()
    page.get_by_text("@nora was notified").wait_for()


def _mention(page: Page) -> None:
    page.get_by_role("textbox").press_sequentially("Good morning @")
    page.get_by_role("option").first.wait_for()


def _open_shortcuts(page: Page) -> None:
    page.locator("#main").focus()
    page.keyboard.press("?")
    page.get_by_role("dialog").wait_for()


def _edit(page: Page) -> None:
    _message(page, "Morning all").get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").wait_for()


def _message(page: Page, text: str) -> Any:
    return page.locator("#messages > li", has_text=text).first


PHONE: dict[str, Any] = {"width": 390, "height": 780}
SMALL: dict[str, Any] = {"width": 900, "height": 640}
SCREENS = (
    Screen("sign-in", "/login", width=800, height=500),
    Screen("sign-in-dark", "/login", dark=True, width=800, height=500),
    Screen("api", "/docs"),
    Screen("inbox", "/inbox", "nora", **SMALL),
    Screen("inbox-phone", "/inbox", "nora", dark=True, **PHONE),
    Screen("channel", "/{general}", "emil"),
    Screen("channel-dark", "/{general}", "nora", dark=True),
    Screen("channel-phone", "/{general}", "nora", **PHONE),
    Screen("mention", "/{general}", "ida", prepare=_mention, **SMALL),
    Screen("setting", "/{general}", "ida", prepare=_open_setting, **SMALL),
    Screen("search", "/search?q=gold", "ida", **SMALL),
    Screen("shortcuts", "/inbox", "ida", dark=True, prepare=_open_shortcuts, **SMALL),
    Screen("edit", "/{general}", "emil", prepare=_edit, **SMALL),
    Screen("recipients", "/{general}", "admin", prepare=_open_run, **SMALL),
    Screen("why", "/{general}", "admin", dark=True, prepare=_open_why, **SMALL),
)


def screenshots() -> int:
    """Take every screenshot; returns 0. Raises CommandError where there is no Chromium."""
    executable = chromium.find()
    if executable is None:
        raise CommandError(f"No Chromium. {chromium.HOW_TO}")
    say("Starting PostgreSQL and Redis …")
    with Harness.start("screenshots") as harness:
        token, server = stack.create_admin_and_server(harness.env, MEMBERS)
        say("Starting a web process and a worker …")
        with harness.workers(1), harness.web(), sync_playwright() as playwright:
            SCREENSHOTS.mkdir(exist_ok=True)
            tokens, channels = _post_messages(harness.address, token, server["server_id"])
            with chromium.launch(playwright, executable) as browser:
                for screen in SCREENS:
                    _take_screenshot(browser, harness.address, tokens, channels, screen)
                    say(f"  docs/screenshots/{screen.name}.png")
    return 0


def _post_messages(address: str, token: str, server_id: int) -> tuple[dict[str, str], dict[str, str]]:
    """Create users and messages, and wait for their runs: (tokens by username, paths by channel name)."""
    admin = Client(address, token)
    tokens = {"admin": token}
    for username, name in USERS.items():
        user = admin.post("/api/users", {"username": username, "name": name})
        admin.put(f"/api/users/{user['id']}/subscription", {"status": "active"})
        admin.put(f"/api/servers/{server_id}/members/{user['id']}", {"role_ids": []})
        tokens[username] = admin.post(f"/api/users/{user['id']}/tokens", {})["token"]
    channels = {channel["name"]: channel["id"] for channel in admin.get("/api/channels")["items"]}
    for channel, username, content in MESSAGES:
        posted = Client(address, tokens[username]).post(
            "/api/messages", {"channel_id": channels[channel], "content": content}
        )
        succeeded = partial(_has_succeeded, admin, posted["run"]["url"])
        signals.wait_until(succeeded, f"run {posted['run']['id']}", FANOUT_SECONDS)
    return tokens, {name: f"servers/{server_id}/channels/{id_}" for name, id_ in channels.items()}


def _has_succeeded(admin: Client, run_url: str) -> bool:
    return bool(admin.get(run_url)["state"] == "succeeded")


def _take_screenshot(
    browser: Browser, address: str, tokens: dict[str, str], channels: dict[str, str], screen: Screen
) -> None:
    context = browser.new_context(
        base_url=address,
        viewport={"width": screen.width, "height": screen.height},
        color_scheme="dark" if screen.dark else "light",
        reduced_motion="reduce",
        has_touch=screen.width < 500,
    )
    page = context.new_page()
    if screen.signed_in:
        _sign_in(page, tokens[screen.signed_in])
    page.goto(screen.path.format(**channels), wait_until="load")
    if screen.signed_in:
        page.locator("#connection[data-state=live]").wait_for()
        page.wait_for_timeout(1_000)  # by then the visible messages are marked as read
    if screen.prepare:
        screen.prepare(page)
    page.screenshot(path=SCREENSHOTS / f"{screen.name}.png", animations="disabled", caret="hide")
    context.close()


def _sign_in(page: Page, token: str) -> None:
    page.goto("/login?next=/docs")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/docs")
