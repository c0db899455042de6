"""A part of `make bench`: `POST /api/messages` to a small and to the largest audience in turn, while no worker runs."""

import argparse
import time
from typing import Any

import jobs
from belfry.sql import execute
from bench.stage import WARM, Stage


def measure(stage: Stage, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"posts", "ms": {members: {"p50", "p99"}}}."""
    channels = {size: stage.communities[size] for size in (min(stage.communities), max(stage.communities))}
    times: dict[int, list[float]] = {size: [] for size in channels}
    with stage.web():
        for _ in range(arguments.posts + WARM):
            for size, channel_id in channels.items():
                began = time.perf_counter()
                stage.post(channel_id)
                times[size].append((time.perf_counter() - began) * 1000)
    jobs.queue().empty()  # nobody is to be told of these
    execute("TRUNCATE run CASCADE")
    return {
        "posts": arguments.posts,
        "ms": {
            size: {"p50": _percentile(all_[WARM:], 50), "p99": _percentile(all_[WARM:], 99)}
            for size, all_ in times.items()
        },
    }


def _percentile(values: list[float], percent: int) -> float:
    return round(sorted(values)[max(0, round(len(values) * percent / 100) - 1)], 2)


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [f"POST /api/messages, {results['posts']:,} each in turn, while no worker runs"]
    for members, one in results["ms"].items():
        lines.append(f"  {int(members):10,} members   p50 {one['p50']:7.2f} ms   p99 {one['p99']:7.2f} ms")
    return "\n".join(lines)
