"""CPU seconds and memory of processes with their descendants, and the versions of everything."""

import os
import platform
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis

from tools.bench import peer_processes
from tools.dev import ROOT

SAMPLE_SECONDS = 0.2  # between two samples of the memory: each takes some milliseconds
PACKAGES = ("flask", "gunicorn", "rq", "redis", "peewee", "psycopg")


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """Return the processes that exist, with their descendants."""
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return found


def cpu_of(pids: Iterable[int]) -> float:
    """Return the CPU seconds of the processes and their descendants, including those that have ended."""
    seconds = 0.0
    for process in family(pids):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def memory_of(pids: Iterable[int]) -> float:
    """Return the MiB of the processes and their descendants: PSS, or USS on other systems than Linux."""
    total = 0
    for process in family(pids):
        try:
            full = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(full, "pss", full.uss)
    return total / 2**20


def peak_of(pid: int) -> float:
    """Return the peak RSS of a process in MiB, or its present RSS on other systems than Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        return float(psutil.Process(pid).memory_info().rss) / 2**20


@contextmanager
def watch(pids: list[int]) -> Iterator[dict[str, float]]:
    """Measure the processes and their descendants while the block runs. The dict has {"cpu_s", "pss_mib"} at its end:
    CPU seconds, and the peak of the memory."""
    used: dict[str, float] = {}
    peak, ended, began = memory_of(pids), threading.Event(), cpu_of(pids)

    def sample() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_SECONDS):
            peak = max(peak, memory_of(pids))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        seconds = cpu_of(pids) - began
        ended.set()
        thread.join()
        used.update(cpu_s=round(seconds, 2), pss_mib=round(max(peak, memory_of(pids)), 1))


def postmaster(connection: psycopg.Connection[Any]) -> list[int]:
    """Return the pid of the postmaster, for `cpu_of`; [] where it runs on another machine."""
    try:
        backend = psutil.Process(connection.info.backend_pid)
        return [backend.ppid()] if "postgres" in backend.name() else []
    except psutil.Error:
        return []


def describe(env: dict[str, str]) -> dict[str, Any]:
    """Return {"tree", "cores", "machine", "versions"}."""
    with psycopg.connect(env["DATABASE_URL"]) as connection:
        server = connection.info.parameter_status("server_version")
    with redis.Redis.from_url(env["REDIS_URL"]) as client:
        found: dict[str, Any] = client.info("server")
    queue = f"Valkey {found['valkey_version']}" if "valkey_version" in found else f"Redis {found['redis_version']}"
    return {
        "tree": _tree(),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {
            "Python": platform.python_version(),
            "PostgreSQL": server,
            "queue": queue,
            **{name: version(name) for name in PACKAGES},
            "peers": peer_processes.versions(),
        },
    }


def _tree() -> str | None:
    """Return the commit, with `-dirty` after changes; None where there is no git, or no repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--tags"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
