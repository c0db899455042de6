"""The browser of the tests and of the screenshots: the machine's own Chromium, for Playwright downloads none here."""

import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Playwright

from tools.dev import CommandError

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
HOW_TO = "Install Chromium (Debian: apt-get install chromium), or set CHROMIUM=/path/to/it."


def find() -> Path | None:
    """CHROMIUM, or the first of `NAMES` on the PATH; None where there is none.

    Raises CommandError where CHROMIUM names nothing that can be run: who sets it wants that one.
    """
    if named := os.environ.get("CHROMIUM", "").strip():
        if shutil.which(named) is None:
            raise CommandError(f"CHROMIUM is {named!r}, and that is no program. {HOW_TO}")
        return Path(named)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return Path(found) if found else None


def launch(playwright: Playwright, executable: Path) -> Browser:
    """A browser without a window, which knows no host but this machine."""
    arguments = [
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--disable-dev-shm-usage",  # containers have little of it
        "--force-color-profile=srgb",  # a screenshot is the same on every machine
        "--font-render-hinting=none",
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # it refuses to start as root otherwise
    return playwright.chromium.launch(executable_path=executable, args=arguments)
