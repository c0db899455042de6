"""Huey, one process with eight threads. `python peer_huey.py` enqueues."""

import os

from huey import RedisHuey

huey = RedisHuey("peer", url=os.environ["REDIS_URL"], results=False)


@huey.task()
def task(message_id: int) -> None:
    from statement import notify

    notify(message_id)


if __name__ == "__main__":
    from peer_huey import task as named
    from statement import enqueue_from_stdin

    enqueue_from_stdin(named)
