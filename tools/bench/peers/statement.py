"""What every peer's task does: the one statement, for one message, on a connection that stays open.

Belfry's own rules and table; the file of STATEMENT is written by `bench.small`. Nothing here but psycopg is imported:
a peer's environment has that, and the peer.
"""

import json
import os
import threading

import psycopg

_here = threading.local()


def notify(message_id: int) -> None:
    """Insert the notifications of one message, and commit."""
    if getattr(_here, "connection", None) is None:
        with open(os.environ["STATEMENT"]) as file:
            _here.statement = json.load(file)
        _here.connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
        _here.connection.execute("SET jit = off; SET plan_cache_mode = force_custom_plan")  # as Belfry has it
    parameters = {**_here.statement["parameters"], "message_id": message_id}
    _here.connection.execute(_here.statement["sql"], parameters)


def enqueue_from_stdin(enqueue) -> None:
    """For each line with a message's id: put its task into the queue. An empty line means that all before it are in."""
    import sys

    for line in sys.stdin:
        if line.strip():
            enqueue(int(line))
        else:
            print("enqueued", flush=True)
