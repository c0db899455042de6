"""The peers of `bench.small`: how each enqueues, and how its worker starts."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tools.bench.environments import PEERS, python_of
from tools.bench.harness import BenchHarness
from tools.dev import CommandError, last_lines
from tools.dev.processes import finish

WORKERS: dict[str, tuple[str, str, list[str]]] = {
    "RQ, default worker": ("rq", "peer_rq.py", ["rq", "worker", "-q", "peer"]),
    "RQ, SimpleWorker": ("rq", "peer_rq.py", ["rq", "worker", "-q", "-w", "rq.SimpleWorker", "peer"]),
    "Celery, prefork": ("celery", "peer_celery.py", ["celery", "-A", "peer_celery", "-q", "worker", "-c", "1"]),
    "Dramatiq, 8 threads": ("dramatiq", "peer_dramatiq.py", ["dramatiq", "peer_dramatiq", "-p", "1", "-t", "8"]),
    "Huey, 8 threads": ("huey", "peer_huey.py", ["huey_consumer", "peer_huey.huey", "-w", "8", "-k", "thread", "-q"]),
}
"""Name: the environment, the program that enqueues, the worker's command."""


@contextmanager
def peer(harness: BenchHarness, name: str) -> Iterator[tuple[Callable[..., None], Callable[[], int]]]:
    """A way to enqueue messages, and one to start the worker, which answers its process's id."""
    environment, program, command = WORKERS[name]
    python = python_of(environment)
    env = {**harness.env, "STATEMENT": str(harness.data_dir / "statement.json"), "PYTHONPATH": str(PEERS)}
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    arguments = [*command[:-1], "--url", env["REDIS_URL"], command[-1]] if command[0] == "rq" else command
    with ExitStack() as running:
        log = running.enter_context(open(harness.data_dir / "peer.log", "wb"))

        def start(line: list[str], **pipes: Any) -> subprocess.Popen[str]:
            process = subprocess.Popen(line, cwd=PEERS, env=env, stderr=log, text=True, **pipes)
            running.callback(finish, process)
            return process

        enqueuer = start([str(python), program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

        def enqueue(ids: list[int], *, wait: bool = True) -> None:
            assert enqueuer.stdin is not None
            assert enqueuer.stdout is not None
            enqueuer.stdin.write("".join(f"{message_id}\n" for message_id in ids) + ("\n" if wait else ""))
            enqueuer.stdin.flush()
            if wait and enqueuer.stdout.readline() != "enqueued\n":
                raise CommandError(f"{name} did not enqueue:\n{last_lines(harness.data_dir / 'peer.log')}")

        def start_worker() -> int:
            return start([str(python.parent / arguments[0]), *arguments[1:]], stdout=log).pid

        enqueue([])
        yield enqueue, start_worker
