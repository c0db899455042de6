"""`make bench`: start servers and measure Belfry and its peers, part by part.

Prints tables; `--json FILE` writes all figures with the versions of everything, `--charts DIR` draws charts. Each peer
is installed once, into its own environment.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.bench.harness import BenchHarness
from tools.bench.peer_processes import python_of
from tools.dev import ROOT, CommandError, say
from tools.dev.harness import UNDER_LOAD

PARTS = {
    "large": "tools.bench.large",
    "small": "tools.bench.small",
    "growth": "tools.bench.growth",
    "web": "tools.bench.web",
    "live": "tools.bench.live",
    "inbox": "tools.bench.inbox",
    "table": "tools.bench.table",
}
"""Name: module. It has `measure(harness, arguments)`, which returns a dict that JSON can represent, and
`table(results)`, which formats that dict after a round trip through JSON: its keys are strings."""
SIZES = (1_000, 10_000)  # members of servers that are created in addition to those of --members


def main() -> int:
    arguments = _arguments()
    try:
        if arguments.draw:
            results = json.loads(arguments.draw.read_text())
        else:
            # A round trip through JSON turns keys into strings, as in a file.
            results = json.loads(json.dumps(measure(arguments)))
    except CommandError as error:
        say(str(error))
        return 1
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.charts:
        draw(results, arguments.charts)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--members", type=_numbers, default="100000,1000000", help="large audiences (%(default)s)")
    parser.add_argument("--runs", type=int, help="rounds for each size (5; 3 above 100000)")
    parser.add_argument("--users", type=int, default=1_500, help="recipients for django-notifications-hq (%(default)s)")
    parser.add_argument("--messages", type=int, default=2_000, help="small messages for a worker (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions for small messages (%(default)s)")
    parser.add_argument("--lone", type=int, default=45, help="lone messages for each worker, in rounds (%(default)s)")
    parser.add_argument("--rows", type=int, default=50_000_000, help="notifications in a full table (%(default)s)")
    parser.add_argument(
        "--inbox-rows", type=int, default=10_000_000, help="notifications in the table of a large inbox (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="draw charts into that directory")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="only draw charts of what --json wrote")
    arguments = parser.parse_args()
    if arguments.draw and not arguments.charts:
        parser.error("--draw needs --charts")
    return arguments


def _numbers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the results of every part, the machine and the versions. Prints the table of each part when it is done."""
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": round(os.getloadavg()[0], 2),
        "command": shlex.join(["python", "-m", "tools.bench", *sys.argv[1:]]),
    }
    began, seconds, parts = time.perf_counter(), {}, {}
    with BenchHarness.start("bench", UNDER_LOAD) as harness:
        from tools.bench import machine

        harness.create_servers([*SIZES, *arguments.members])
        seconds["servers"] = time.perf_counter() - began
        for name in arguments.only:
            began, module = time.perf_counter(), import_module(PARTS[name])
            parts[name] = module.measure(harness, arguments)
            seconds[name] = time.perf_counter() - began
            say(f"\n{module.table(json.loads(json.dumps(parts[name])))}\n")
        results |= machine.describe(harness.env)
    results |= {"seconds": {name: round(took) for name, took in seconds.items()}, "parts": parts}
    versions = {name: version for name, version in results["versions"].items() if name != "peers"}
    say(", ".join(f"{name} {version}" for name, version in versions.items()))
    say(f"{results['machine']}, {results['cores']} cores, {results['tree'] or 'no commit'}, {results['date']}")
    say(f"Load average before: {results['load_before']}. Other load changes the times, and the ratios less")
    say("Seconds: " + ", ".join(f"{name} {took}" for name, took in results["seconds"].items()))
    return results


def draw(results: dict[str, Any], directory: Path) -> None:
    """Draw charts of the results, by matplotlib in its own environment."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(results, file)
        file.flush()
        line = [str(python_of("charts")), "tools/bench/charts.py", file.name, str(directory.resolve())]
        subprocess.run(line, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
