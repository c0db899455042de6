"""Dramatiq, one process with its eight threads. `python peer_dramatiq.py` enqueues."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))


@dramatiq.actor
def task(message_id: int) -> None:
    from statement import notify

    notify(message_id)


if __name__ == "__main__":
    from statement import enqueue_from_stdin

    enqueue_from_stdin(task.send)
