"""Draw what `make bench` measured: `python tools/bench/charts.py RESULTS.json DIRECTORY`. Needs matplotlib.

Imports nothing of Belfry. Draws the parts that the results have.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # needs to know that there is no display

OURS, OTHERS, LIMIT = "#1f5fa8", "#9aa5b1", "#c9a227"
WORKERS = {"1": "one worker", "2": "two workers"}
ALPHA = {"1": 1.0, "2": 0.55}
OTHER_NAMES = {
    "limit": "one statement (limit)",
    "four indexes": "one with four indexes",
    "django": "django-notifications-hq,\nto {people:,}",
}


def main(results: dict[str, Any], directory: Path) -> None:
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    queue, server = results["versions"]["queue"], results["versions"]["PostgreSQL"]
    source = f"PostgreSQL {server}, {queue}, {results['machine']}; {results['date'][:10]}, {results['tree']}"
    for part, charts in CHARTS.items():
        for chart in charts if part in results["parts"] else ():
            figure, title = chart(results["parts"][part])
            figure.suptitle(f"{title}; {results['cores']} cores", x=0.012, ha="left", fontsize=12)
            figure.text(0.988, 0.012, source, ha="right", va="bottom", fontsize=8, color="#666666")
            figure.tight_layout(rect=(0, 0.045, 1, 1))
            figure.savefig(directory / f"{chart.__name__}.png", dpi=130)
            pyplot.close(figure)


def _bars(axes: Any, values: dict[str, float], labels: list[str], unit: str) -> None:
    """Horizontal bars, each with its label, the first at the top."""
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=[_colour(name) for name in names])
    axes.bar_label(bars, labels[::-1], padding=4)
    axes.set_xlim(0, max(values.values()) * 1.15)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(unit)


def _colour(name: str) -> str:
    return OURS if name.startswith("Belfry") else LIMIT if "statement" in name else OTHERS


def small_messages(part: dict[str, Any]) -> tuple[Any, str]:
    figure, axes = pyplot.subplots(figsize=(8.5, 4.4))
    values = {name: one["median"] for name, one in part["messages_per_s"].items()}
    _bars(axes, values, [f"{rate:,.0f}" for rate in values.values()], "messages a second, on a logarithmic scale")
    axes.set_xscale("log")
    axes.set_xlim(min(values.values()) / 2, max(values.values()) * 2.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, (
        f"Small messages to {part['recipients']} recipients each, one worker process,\n"
        f"in a database with a server of {part['beside']:,}"
    )


def lone_message(part: dict[str, Any]) -> tuple[Any, str]:
    figure, axes = pyplot.subplots(figsize=(8.5, 4.2))
    all_ = part["lone_ms"]
    _bars(axes, {name: one["p50"] for name, one in all_.items()}, [""] * len(all_), "milliseconds")
    for number, one in enumerate(reversed(all_.values())):
        axes.plot([one["p50"], one["p95"]], [number, number], color="black", linewidth=1.2, marker="|")
        label, place = f"{one['p50']:.1f}  ({one['p95']:.1f})", (one["p95"], number)
        axes.annotate(label, place, (6, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(one["p95"] for one in all_.values()) * 1.2)
    return figure, (
        f"A lone message to {part['recipients']} recipients, from enqueueing to its committed rows:\n"
        "median (bar) and 95th percentile (line)"
    )


def large_message(part: dict[str, Any]) -> tuple[Any, str]:
    sizes = part["sizes"]
    figure, all_axes = pyplot.subplots(len(sizes), 1, figsize=(8.5, 1 + 2.7 * len(sizes)), squeeze=False)
    for axes, (members, found) in zip(all_axes[:, 0], sizes.items(), strict=True):
        rates = {
            OTHER_NAMES.get(name, name).format(people=part["people"]): one["rows_per_s"]
            for name, one in found["figures"].items()
        }
        _bars(axes, rates, [f"{rate:,}" for rate in rates.values()], "notifications a second")
        axes.set_title(f"to {int(members):,} members, {found['rows']:,} of whom are notified", loc="left", fontsize=10)
    return figure, "One large message, from the POST to the last commit"


def growth(part: dict[str, Any]) -> tuple[Any, str]:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.6), width_ratios=(3, 2))
    for (workers, found), marker in zip(part["audiences"].items(), "os", strict=True):
        sizes = sorted(map(int, found))
        seconds = [found[str(size)]["s"] for size in sizes]
        left.plot(sizes, seconds, marker=marker, label=WORKERS[workers], color=OURS, alpha=ALPHA[workers])
    left.set(xscale="log", yscale="log", xlabel="members", ylabel="seconds, from the POST to the last commit")
    for axis in (left.xaxis, left.yaxis):
        axis.set_minor_formatter("")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylim(10 ** math.floor(math.log10(left.get_ylim()[0])), 10 ** math.ceil(math.log10(left.get_ylim()[1])))
    left.set_title("one message", loc="left", fontsize=10)
    left.grid(alpha=0.3)
    left.legend(frameon=False)
    servers = sorted(part["servers"]["1"], key=int)
    for number, workers in enumerate(part["servers"]):
        places = [place + 0.4 * number for place in range(len(servers))]
        rates = [part["servers"][workers][one] for one in servers]
        bars = right.bar(places, rates, 0.38, label=WORKERS[workers], color=OURS, alpha=ALPHA[workers])
        right.bar_label(bars, [f"{rate:,}" for rate in rates], padding=2)
    names = [f"to {one} server{'s' * (one != '1')}" for one in servers]
    right.set_xticks([place + 0.2 for place in range(len(servers))], names)
    right.set_ylabel("messages a second, through the queue")
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set_title(f"{part['messages']:,} small messages at once", loc="left", fontsize=10)
    right.set_ylim(0, right.get_ylim()[1] * 1.25)
    right.legend(frameon=False, loc="upper right", ncols=2)
    return figure, "Growth with the audience, and with the number of servers"


CHARTS: dict[str, list[Callable[[dict[str, Any]], tuple[Any, str]]]] = {
    "large": [large_message],
    "small": [small_messages, lone_message],
    "growth": [growth],
}
"""Part of the results: its charts. Each is named like its file, and returns the figure and its title."""

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
