"""RQ as its documentation shows it. `python peer_rq.py` enqueues; the worker is `rq worker`."""

import os

from redis import Redis
from rq import Queue


def task(message_id: int) -> None:
    from statement import notify  # in the fork, as everything that a task needs

    notify(message_id)


if __name__ == "__main__":
    from statement import enqueue_from_stdin

    queue = Queue("peer", connection=Redis.from_url(os.environ["REDIS_URL"]))
    enqueue_from_stdin(lambda message_id: queue.enqueue("peer_rq.task", message_id, result_ttl=0))
