"""The task of every peer: the one statement, for one message, on a connection that stays open.

It has Belfry's rules and table; `bench.small` writes the file that STATEMENT names. Only psycopg is imported: a peer's
environment has nothing else but the peer.
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
        _here.connection.execute("SET jit = off; SET plan_cache_mode = force_custom_plan")  # as in Belfry
    parameters = {**_here.statement["parameters"], "message_id": message_id}
    _here.connection.execute(_here.statement["sql"], parameters)


def enqueue_from_stdin(enqueue) -> None:
    """Enqueue the task of each line with a message id. After an empty line, print that all before it are enqueued."""
    import sys

    for line in sys.stdin:
        if line.strip():
            enqueue(int(line))
        else:
            print("enqueued", flush=True)
