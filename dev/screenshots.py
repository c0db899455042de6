"""`screenshots`: pictures of the main screens for the documents, of a small community that is gone afterwards."""

from contextlib import ExitStack
from dataclasses import dataclass

from playwright.sync_api import Browser, Page, sync_playwright

from dev import ROOT, CommandError, chromium, ports, say, stack
from dev.own import private
from dev.places import temporary_data_dir
from dev.servers import servers

MEMBERS = 50
PICTURES = ROOT / "docs" / "screenshots"


@dataclass(frozen=True)
class Screen:
    """What is pictured: `signed_in` as the administrator."""

    name: str
    path: str
    signed_in: bool = False
    dark: bool = False
    width: int = 1280
    height: int = 800


SCREENS = (
    Screen("sign-in", "/login", width=800, height=500),
    Screen("sign-in-dark", "/login", dark=True, width=800, height=500),
    Screen("api", "/docs"),
)


def screenshots() -> int:
    """Returns 0 where every picture was made. Raises CommandError where there is no Chromium."""
    executable = chromium.find()
    if executable is None:
        raise CommandError(f"No Chromium. {chromium.HOW_TO}")
    with ExitStack() as stage:
        listening = stage.enter_context(ports.listen())
        address = ports.address_of(listening)
        say("Starting PostgreSQL and Redis …")
        data_dir = stage.enter_context(temporary_data_dir())
        urls = stage.enter_context(private(stage.enter_context(servers(data_dir)), "screenshots"))
        env = stack.environment(urls, address)
        stack.migrate(env)
        token, _ = stack.make_community(env, MEMBERS)
        say("Starting a web process and a worker …")
        stage.enter_context(stack.worker(env, data_dir / "worker.log"))
        stage.enter_context(stack.web(env, listening, data_dir / "web.log"))
        browser = stage.enter_context(chromium.launch(stage.enter_context(sync_playwright()), executable))
        PICTURES.mkdir(exist_ok=True)
        for screen in SCREENS:
            _picture(browser, address, token, screen)
            say(f"  docs/screenshots/{screen.name}.png")
    return 0


def _picture(browser: Browser, address: str, token: str, screen: Screen) -> None:
    context = browser.new_context(
        base_url=address,
        viewport={"width": screen.width, "height": screen.height},
        color_scheme="dark" if screen.dark else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    if screen.signed_in:
        _sign_in(page, token)
    page.goto(screen.path, wait_until="load")
    page.screenshot(path=PICTURES / f"{screen.name}.png", animations="disabled", caret="hide")
    context.close()


def _sign_in(page: Page, token: str) -> None:
    page.goto("/login?next=/docs")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/docs")
