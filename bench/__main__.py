"""`make bench`: sets up servers of its own, as the demo does, and measures.

Prints a table, and JSON with --json. The peers of `bench.small` are installed into environments of their own, once.
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
    parser.add_argument("--members", type=int, default=100_000, help="members of the large audience (100000)")
    parser.add_argument("--runs", type=int, default=7, help="measurements of each fan-out")
    parser.add_argument("--posts", type=int, default=200, help="posts to each audience")
    parser.add_argument("--messages", type=int, default=3_000, help="small messages to each worker")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of small messages")
    parser.add_argument("--lone", type=int, default=60, help="lone messages to each worker")
    parser.add_argument("--people", type=int, default=5_000, help="recipients of django-notifications-hq's message")
    parser.add_argument("--json", action="store_true", help="print JSON as well")
    arguments = parser.parse_args()
    with ExitStack() as stage:
        listening = stage.enter_context(ports.listen())
        data_dir = stage.enter_context(temporary_data_dir())
        urls = stage.enter_context(private(stage.enter_context(servers(data_dir)), "bench"))
        env = stack.environment(urls, ports.address_of(listening))
        env |= {"RATE_LIMIT_MESSAGES": "1000000 per minute", "LOG_LEVEL": "WARNING"}
        os.environ.update(env)
        from bench import measure, small  # reads the environment that was just made

        stack.migrate(env)
        results = measure.everything(
            env,
            listening,
            data_dir,
            sizes=(SMALL, 1_000, arguments.members),
            runs=arguments.runs,
            posts=arguments.posts,
        )
        results["small"] = small.measure(
            env, data_dir, messages=arguments.messages, repeats=arguments.repeats, lone=arguments.lone
        )
        results["small"]["django_rows_per_s"] = small.django_rows(env, arguments.people, arguments.repeats)
    print(measure.table(results))
    print(small.table(results["small"]))
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
