"""An environment for each peer, beside Belfry's own: made once, and anew when its requirements change."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from tools.dev import ROOT, say

PEERS = ROOT / "tools" / "bench" / "peers"
_VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, which is made when its requirements are new."""
    home, requirements = _home(name), PEERS / f"requirements-{name}.txt"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        say(f"making an environment for {name} …")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements)], check=True)
        (home / "complete").touch()
    return python


def versions() -> dict[str, str]:
    """The versions of what the peers' requirements name, of those environments that are there."""
    found: dict[str, str] = {}
    for requirements in sorted(PEERS.glob("requirements-*.txt")):
        name = requirements.stem.removeprefix("requirements-")
        if name != "charts" and (_home(name) / "complete").exists():
            packages = re.findall(r"^[\w.-]+", requirements.read_text(), re.MULTILINE)
            line = [str(python_of(name)), "-c", _VERSIONS, *packages]
            answer = subprocess.run(line, capture_output=True, text=True, check=True).stdout
            found |= dict(zip(packages, answer.split(), strict=True))
    return found


def _home(name: str) -> Path:
    wanted = (PEERS / f"requirements-{name}.txt").read_bytes()
    return ROOT / ".venv" / "peers" / f"{name}-{hashlib.sha256(wanted).hexdigest()[:12]}"
