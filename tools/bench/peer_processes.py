"""The peers of the benchmarks: an environment for each, its worker, and the process that enqueues.

An environment is created once, and again when its requirements change.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tools.dev import ROOT, CommandError, last_lines, say
from tools.dev.harness import Harness
from tools.dev.processes import finish

PEERS = ROOT / "tools" / "bench" / "peers"
WORKERS: dict[str, tuple[str, str, list[str]]] = {
    "RQ, default worker": ("rq", "peer_rq.py", ["rq", "worker", "-q", "peer"]),
    "RQ, SimpleWorker": ("rq", "peer_rq.py", ["rq", "worker", "-q", "-w", "rq.SimpleWorker", "peer"]),
    "Celery, prefork": ("celery", "peer_celery.py", ["celery", "-A", "peer_celery", "-q", "worker", "-c", "1"]),
    "Dramatiq, 8 threads": ("dramatiq", "peer_dramatiq.py", ["dramatiq", "peer_dramatiq", "-p", "1", "-t", "8"]),
    "Huey, 8 threads": ("huey", "peer_huey.py", ["huey_consumer", "peer_huey.huey", "-w", "8", "-k", "thread", "-q"]),
}
"""Name: the environment, the program that enqueues, the worker's command."""
_VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


def python_of(name: str) -> Path:
    """Return the interpreter of a peer's environment. It is created if it does not exist, or was made elsewhere."""
    home, requirements = _home(name), PEERS / f"requirements-{name}.txt"
    python = home / "bin" / "python"
    if not _is_complete(name):
        say(f"creating an environment for {name} …")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements)], check=True)
        (home / "complete").write_text(str(home))
    return python


def _is_complete(name: str) -> bool:
    """Whether the environment of a peer was installed, at this path: its scripts contain their path."""
    complete = _home(name) / "complete"
    return complete.exists() and complete.read_text() == str(_home(name))


def versions() -> dict[str, str]:
    """Return the versions of the peers whose environments exist."""
    found: dict[str, str] = {}
    for requirements in sorted(PEERS.glob("requirements-*.txt")):
        name = requirements.stem.removeprefix("requirements-")
        if name != "charts" and _is_complete(name):
            packages = re.findall(r"^[\w.-]+", requirements.read_text(), re.MULTILINE)
            line = [str(python_of(name)), "-c", _VERSIONS, *packages]
            output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
            found |= dict(zip(packages, output.split(), strict=True))
    return found


def _home(name: str) -> Path:
    requirements = (PEERS / f"requirements-{name}.txt").read_bytes()
    return ROOT / ".venv" / "peers" / f"{name}-{hashlib.sha256(requirements).hexdigest()[:12]}"


class PeerProcess:
    """A process of a peer that reads lines from its standard input and answers lines."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self._name, self._process, self._log = name, process, log
        self.pid = process.pid

    def send(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def receive(self) -> str:
        """Return the next line. Raises CommandError, with the end of the log, where the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise CommandError(f"{self._name} did not answer:\n{last_lines(self._log)}")
        return line


@contextmanager
def start_peers(harness: Harness, environment: str, **env: str) -> Iterator[Callable[..., PeerProcess]]:
    """Yield a function that starts a program of a peer's environment; the processes end with the block."""
    python = python_of(environment)
    env = {**harness.env, "PATH": f"{python.parent}:{harness.env['PATH']}", "PYTHONPATH": str(PEERS), **env}
    log_path = harness.data_dir / "peer.log"
    with ExitStack() as running:
        log = running.enter_context(log_path.open("wb"))

        def start(program: str, *arguments: str, **pipes: Any) -> PeerProcess:
            line = [str(python.parent / program), *arguments]
            process = subprocess.Popen(line, cwd=PEERS, env=env, stderr=log, text=True, **{"stdout": log, **pipes})
            running.callback(finish, process)
            return PeerProcess(environment, process, log_path)

        yield start


@contextmanager
def queue_peer(harness: Harness, name: str) -> Iterator[tuple[Callable[..., None], Callable[[], int]]]:
    """Yield a function that enqueues messages, and one that starts the worker and returns its pid."""
    environment, program, command = WORKERS[name]
    if command[0] == "rq":
        command = [*command[:-1], "--url", harness.env["REDIS_URL"], command[-1]]
    with start_peers(harness, environment, STATEMENT=str(harness.data_dir / "statement.json")) as start:
        enqueuer = start("python", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

        def enqueue(ids: list[int], *, wait: bool = True) -> None:
            enqueuer.send("".join(f"{message_id}\n" for message_id in ids) + ("\n" if wait else ""))
            if wait:
                assert enqueuer.receive() == "enqueued"

        enqueue([])
        yield enqueue, lambda: start(*command).pid
