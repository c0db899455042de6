"""`make bench`: sets up servers of its own, as the demo does, and measures.

Options: --members N (100000), --runs N (7), --posts N (200). Prints a table, and JSON with --json.
"""

import argparse
import json
import os
from contextlib import ExitStack

from dev import ports, stack
from dev.own import private
from dev.places import temporary_data_dir
from dev.servers import servers

SMALL = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--members", type=int, default=100_000, help="members of the large audience")
    parser.add_argument("--runs", type=int, default=7, help="measurements of each fan-out")
    parser.add_argument("--posts", type=int, default=200, help="posts to each audience")
    parser.add_argument("--json", action="store_true", help="print JSON as well")
    arguments = parser.parse_args()
    with ExitStack() as stage:
        listening = stage.enter_context(ports.listen())
        data_dir = stage.enter_context(temporary_data_dir())
        urls = stage.enter_context(private(stage.enter_context(servers(data_dir)), "bench"))
        env = stack.environment(urls, ports.address_of(listening))
        env |= {"RATE_LIMIT_MESSAGES": "1000000 per minute", "LOG_LEVEL": "WARNING"}
        os.environ.update(env)
        from bench import measure  # reads the environment that was just made

        stack.migrate(env)
        results = measure.everything(
            env,
            listening,
            data_dir,
            sizes=(SMALL, 1_000, arguments.members),
            runs=arguments.runs,
            posts=arguments.posts,
        )
    print(measure.table(results))
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
