"""Celery, its prefork pool with one process. `python peer_celery.py` enqueues."""

import os

from celery import Celery

url = os.environ["REDIS_URL"]
if url.startswith("unix://"):  # which Celery spells its own way
    url = url.replace("unix://", "redis+socket://").replace("?db=", "?virtual_host=")
app = Celery("peer_celery", broker=url)
app.conf.task_ignore_result = True
app.conf.worker_prefetch_multiplier = 64  # the best of 1, 4, 16 and 64
app.conf.broker_connection_retry_on_startup = True


@app.task
def task(message_id: int) -> None:
    from statement import notify

    notify(message_id)


if __name__ == "__main__":
    from peer_celery import task as named
    from statement import enqueue_from_stdin

    enqueue_from_stdin(named.delay)
