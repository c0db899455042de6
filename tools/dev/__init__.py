"""For development only: embedded servers, and what `make demo`, `run`, `web`, `worker` and `test` do.

Nothing of Belfry imports this package, and production needs none of it.
"""

from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA_DIR = ROOT / ".belfry"  # what `make run`, `web` and `worker` keep between two runs


class CommandError(Exception):
    """Ends the command with status 1; its text is all that the person at the terminal gets to read."""


def say(text: str = "", end: str = "\n") -> None:
    """Print at once. A terminal that has gone away is no error: whatever comes next may be cleaning up."""
    with suppress(OSError):
        print(text, end=end, flush=True)


def last_lines(path: Path, count: int = 15) -> str:
    """The last lines of a log, indented; empty where there is no such file."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16_384))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-count:])
