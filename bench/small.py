"""A part of `make bench`: many small messages, Belfry's worker beside a loop and the peers.

Each gets the same messages to the same community, on an empty table, one worker process each: the statement in a loop
without any queue; Belfry; RQ's default worker and its SimpleWorker, Celery, Dramatiq and Huey with that statement as
their task, each in an environment of its own. A rate counts from the first committed notification to the last, so no
start of a process is in it; a lone message from enqueueing to its committed rows, as another connection sees them.
Every count of rows is checked.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg

from dev import CommandError, say, stack
from dev.processes import finish

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "bench" / "peers"
MEMBERS = 57  # of whom 50 are told
RQ_MESSAGES = 100  # it would take minutes for more
PATIENCE = 120.0  # seconds without any progress

WORKERS: dict[str, tuple[str, str, list[str]]] = {
    "RQ, default worker": ("rq", "peer_rq.py", ["rq", "worker", "-q", "peer"]),
    "RQ, SimpleWorker": ("rq", "peer_rq.py", ["rq", "worker", "-q", "-w", "rq.SimpleWorker", "peer"]),
    "Celery, prefork": ("celery", "peer_celery.py", ["celery", "-A", "peer_celery", "-q", "worker", "-c", "1"]),
    "Dramatiq, 8 threads": ("dramatiq", "peer_dramatiq.py", ["dramatiq", "peer_dramatiq", "-p", "1", "-t", "8"]),
    "Huey, 8 threads": ("huey", "peer_huey.py", ["huey_consumer", "peer_huey.huey", "-w", "8", "-k", "thread", "-q"]),
}
"""Name: the environment, the program that enqueues, the worker's command."""


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, which is made when its requirements are new."""
    wanted = (PEERS / f"requirements-{name}.txt").read_bytes()
    home = ROOT / ".venv" / "peers" / f"{name}-{hashlib.sha256(wanted).hexdigest()[:12]}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        say(f"making an environment for {name} …")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "-r", str(PEERS / f"requirements-{name}.txt")], check=True
        )
        (home / "complete").touch()
    return python


class Bench:
    """A community of MEMBERS in one channel, and messages to it that nobody has been told of."""

    def __init__(self, env: dict[str, str], data_dir: Path) -> None:
        from belfry import accounts, recipients, seeding
        from belfry.sql import rows
        from bench.measure import BARE_STATEMENT
        from models import db

        self.env, self.data_dir = env, data_dir
        db.connect(reuse_if_open=True)
        self.admin = accounts.create_user("bench-of-small", is_admin=True)
        community = seeding.seed(MEMBERS, 1)
        self.channel_id = community["channel_ids"][0]
        (message_id,) = self.messages(1)
        subject = recipients.subject_of(message_id)
        assert subject is not None
        self.parameters = subject.parameters()
        self.statement = BARE_STATEMENT
        found = rows("SELECT user_id FROM member WHERE server_id = %(server_id)s ORDER BY 1", community)
        self.members = [one["user_id"] for one in found]
        (data_dir / "statement.json").write_text(json.dumps({"sql": self.statement, "parameters": self.parameters}))
        self.reader = psycopg.connect(env["DATABASE_URL"], autocommit=True)
        with psycopg.connect(env["DATABASE_URL"], autocommit=True) as connection:
            self.recipients = connection.execute(
                self.statement, {**self.parameters, "message_id": message_id}
            ).rowcount

    def messages(self, number: int) -> list[int]:
        from belfry.sql import execute, rows

        execute("TRUNCATE notification; TRUNCATE run CASCADE; CHECKPOINT")
        made = rows(
            "INSERT INTO message (channel_id, author_id, content)"
            " SELECT %(channel_id)s, %(author_id)s, 'gold ' || n FROM generate_series(1, %(number)s) AS n RETURNING id",
            {"channel_id": self.channel_id, "author_id": self.admin.id, "number": number},
        )
        return [one["id"] for one in made]

    def count(self) -> int:
        found = self.reader.execute("SELECT count(*) FROM notification").fetchone()
        assert found is not None
        return int(found[0])

    def rate(self, messages: int) -> float:
        """Messages a second, from the first that is there to the last."""
        give_up = time.monotonic() + PATIENCE
        while not (first := self.count()):
            _check(give_up)
            time.sleep(0.002)
        began, wanted = time.perf_counter(), messages * self.recipients
        while (there := self.count()) < wanted:
            _check(give_up)
            time.sleep(0.01)
        assert there == wanted, (there, wanted)
        return (wanted - first) / self.recipients / (time.perf_counter() - began)

    def until_it_is_there(self, enqueue: Callable[[int], None], message_id: int) -> float:
        began, give_up = time.perf_counter(), time.monotonic() + PATIENCE
        enqueue(message_id)
        question = "SELECT count(*) FROM notification WHERE message_id = %s AND user_id = ANY(%s)"
        while self.reader.execute(question, (message_id, self.members)).fetchone() != (self.recipients,):
            _check(give_up)
        return time.perf_counter() - began


def _check(give_up: float) -> None:
    if time.monotonic() > give_up:
        raise CommandError(f"Nothing came for {PATIENCE:.0f} s.")


def loop(bench: Bench, messages: int) -> float:
    """The statement for one message after the other, a commit each."""
    ids = bench.messages(messages)
    with psycopg.connect(bench.env["DATABASE_URL"], autocommit=True) as connection:
        connection.execute("SET jit = off; SET plan_cache_mode = force_custom_plan")  # as Belfry has it
        began = time.perf_counter()
        for message_id in ids:
            connection.execute(bench.statement, {**bench.parameters, "message_id": message_id})
        took = time.perf_counter() - began
    assert bench.count() == messages * bench.recipients
    return messages / took


def _runs(message_ids: list[int]) -> list[int]:
    from belfry.sql import rows

    statement = (
        "INSERT INTO run (message_id, kind, state) SELECT unnest(%(ids)s::bigint[]), 'message', 'queued' RETURNING id"
    )
    return [one["id"] for one in rows(statement, {"ids": message_ids})]


def belfry_rate(bench: Bench, messages: int) -> dict[str, float]:
    """All are in the queue before the worker starts; with them what Belfry alone does: states and statistics."""
    import jobs
    from belfry.leases import Part
    from belfry.sql import row

    assert jobs.enqueue([Part(run_id) for run_id in _runs(bench.messages(messages))], lost=True)
    with stack.worker(bench.env, bench.data_dir / "worker.log") as worker:
        rate = bench.rate(messages)
        used = _used(worker.process.pid)
    assert row("SELECT count(*) AS done FROM run WHERE state = 'succeeded'") == {"done": messages}
    return {"rate": rate, **used}


def belfry_lone(bench: Bench, repeats: int) -> list[float]:
    import jobs

    ids = bench.messages(repeats + 5)
    runs = dict(zip(ids, _runs(ids), strict=True))
    with stack.worker(bench.env, bench.data_dir / "worker.log"):
        took = []
        for message_id in ids:
            took.append(bench.until_it_is_there(lambda id_: bool(jobs.enqueue_run(runs[id_])), message_id))
            time.sleep(0.05)
    return took[5:]


@contextmanager
def _peer(bench: Bench, name: str) -> Iterator[tuple[Callable[[list[int]], None], Callable[[], Any]]]:
    """A way to enqueue messages, and one to start the worker."""
    environment, program, command = WORKERS[name]
    python = python_of(environment)
    env = {**bench.env, "STATEMENT": str(bench.data_dir / "statement.json"), "PYTHONPATH": str(PEERS)}
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    arguments = [*command[:-1], "--url", env["REDIS_URL"], command[-1]] if command[0] == "rq" else command
    with ExitStack() as running:
        log = running.enter_context(open(bench.data_dir / "peer.log", "wb"))

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
                raise CommandError(f"{name} did not enqueue: {(bench.data_dir / 'peer.log').read_text()[-2000:]}")

        enqueue([])
        yield enqueue, lambda: start([str(python.parent / arguments[0]), *arguments[1:]], stdout=log)


def peer_rate(bench: Bench, name: str, messages: int) -> dict[str, float]:
    with _peer(bench, name) as (enqueue, start_worker):
        enqueue(bench.messages(messages))
        worker = start_worker()
        rate = bench.rate(messages)
        return {"rate": rate, **_used(worker.pid)}


def peer_lone(bench: Bench, name: str, repeats: int) -> list[float]:
    with _peer(bench, name) as (enqueue, start_worker):
        ids = bench.messages(repeats + 5)
        start_worker()
        took = []
        for message_id in ids:
            took.append(bench.until_it_is_there(lambda id_: enqueue([id_], wait=False), message_id))  # type: ignore[call-arg]
            time.sleep(0.05)
    return took[5:]


def _used(pid: int) -> dict[str, float]:
    """CPU seconds and MiB of a process and its children, as they are now."""
    seconds = mib = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            times, memory = process.cpu_times(), process.memory_full_info()
        except psutil.Error:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
        mib += memory.pss / 2**20
    return {"cpu_s": round(seconds, 2), "pss_mib": round(mib, 1)}


def measure(env: dict[str, str], data_dir: Path, *, messages: int, repeats: int, lone: int) -> dict[str, Any]:
    """All of them in turn, so many times; medians of the rates, and of the times of a lone message."""
    bench = Bench(env, data_dir)
    rates: dict[str, list[dict[str, float]]] = {}
    ratios: list[float] = []
    for repeat in range(repeats):
        say(f"small messages: {repeat + 1} of {repeats}")
        rates.setdefault("the statement in a loop, no queue", []).append({"rate": loop(bench, messages)})
        rates.setdefault("Belfry", []).append(belfry_rate(bench, messages))
        ratios.append(rates["Belfry"][-1]["rate"] / rates["the statement in a loop, no queue"][-1]["rate"])
        for name in WORKERS:
            slow = name == "RQ, default worker"
            rates.setdefault(name, []).append(peer_rate(bench, name, RQ_MESSAGES if slow else messages))
    say("a lone message")
    times = {"Belfry": belfry_lone(bench, lone)} | {name: peer_lone(bench, name, lone) for name in WORKERS}
    return {
        "recipients": bench.recipients,
        "messages": messages,
        "ratio_to_the_loop": round(statistics.median(ratios), 2),
        "messages_per_s": {
            name: {
                "median": round(statistics.median(one["rate"] for one in all_), 1),
                "least": round(min(one["rate"] for one in all_), 1),
                **{key: statistics.median(one[key] for one in all_) for key in ("cpu_s", "pss_mib") if key in all_[0]},
            }
            for name, all_ in rates.items()
        },
        "lone_ms": {
            name: {
                "p50": round(statistics.median(all_) * 1000, 2),
                "p95": round(sorted(all_)[int(len(all_) * 0.95)] * 1000, 2),
            }
            for name, all_ in times.items()
        },
    }


def django_rows(env: dict[str, str], people: int, repeats: int) -> float:
    """django-notifications-hq: rows a second, the median."""
    answer = subprocess.run(
        [str(python_of("django")), "peer_django.py", str(people), str(repeats)],
        cwd=PEERS,
        env={**env, "PYTHONPATH": str(PEERS)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(answer.stdout.splitlines()[-1])
    return float(found["rows"] / statistics.median(found["seconds"]))


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lone = results["lone_ms"]
    lines = [
        f"{results['messages']:,} messages to {results['recipients']} recipients each, one worker process",
        f"  {'':34} {'messages/s':>11} {'lone p50':>9} {'p95':>8}   CPU s   PSS MiB",
    ]
    for name, found in results["messages_per_s"].items():
        times = f"{lone[name]['p50']:6.2f} ms {lone[name]['p95']:5.2f} ms" if name in lone else " " * 18
        used = f"{found['cpu_s']:7.2f} {found['pss_mib']:9.1f}" if "cpu_s" in found else ""
        lines.append(f"  {name:34} {found['median']:11,.0f} {times} {used}")
    lines.append(f"  Belfry to the loop, median of pairs: {results['ratio_to_the_loop']:.2f}")
    if "django_rows_per_s" in results:
        lines.append(f"  django-notifications-hq, one message to many: {results['django_rows_per_s']:,.0f} rows/s")
    return "\n".join(lines)
