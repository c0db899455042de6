"""The jobs in the queues and their order."""

import pytest
from rq import Queue, Retry

from belfry.fanout.claims import WorkItem
from belfry.queue import queues, registries
from config import settings


@pytest.mark.parametrize(
    ("name", "item", "function", "arguments"),
    [
        (queues.NOTIFICATIONS, WorkItem(7), "jobs.notify", (7,)),
        (queues.BULK, WorkItem(7, 40), "jobs.notify_slice", (7, 40)),
    ],
)
def test_a_job_is_stored_as_rq_itself_stores_it(redis, override, name, item, function, arguments):
    override(retry_jitter=0)
    assert queues.enqueue([item])
    [job_id] = queues.queue(name).get_job_ids()
    key, queue_keys = f"rq:job:{job_id}", redis.smembers("rq:queues")
    ours = redis.hgetall(key)
    redis.flushdb()
    Queue(name, connection=redis, serializer="json").enqueue_many(
        [
            Queue.prepare_data(
                function,
                args=arguments,
                timeout=settings.job_timeout_seconds,
                result_ttl=86_400,
                failure_ttl=7 * 86_400,
                description=str(item),
                job_id=job_id,
                retry=Retry(max=5, interval=queues.retry_intervals(), enqueue_at_front=True),
            )
        ]
    )
    theirs = redis.hgetall(key)
    for job in (ours, theirs):
        assert job[b"created_at"][:10] == job.pop(b"enqueued_at")[:10]
        del job[b"created_at"]
    assert ours == theirs
    assert queue_keys == redis.smembers("rq:queues")
    assert [job_id] == queues.queue(name).get_job_ids()


def test_lost_work_items_are_enqueued_first_in_their_order(redis, override):
    override(enqueue_batch_size=3)
    assert queues.enqueue([WorkItem(9), WorkItem(10)])
    assert queues.enqueue([WorkItem(number) for number in range(1, 9)], lost=True)
    assert queues.queue().get_job_ids() == [f"run-{number}" for number in range(1, 11)]


def test_many_work_items_are_enqueued_in_batches(redis, override):
    override(enqueue_batch_size=3)
    assert queues.enqueue([WorkItem(7, after) for after in range(8)])
    assert queues.queue(queues.BULK).get_job_ids() == [f"slice-7-{after}" for after in range(8)]
    assert [job.args for job in queues.queue(queues.BULK).jobs] == [[7, after] for after in range(8)]


def test_an_abandoned_job_is_replaced_completely(redis):
    redis.hset("rq:job:run-1", mapping={"exc_info": "an old error", "number_of_retries": 3})
    redis.expire("rq:job:run-1", 50)
    redis.set("rq:job:run-2", "not a job")
    assert queues.enqueue([WorkItem(1), WorkItem(2)])
    assert [job.args for job in queues.queue().jobs] == [[1], [2]]
    assert redis.ttl("rq:job:run-1") > registries.FAILURE_SECONDS
    assert redis.hget("rq:job:run-1", "exc_info") is None


def test_enqueuing_loads_its_script_again_after_redis_lost_it(redis):
    assert queues.enqueue([WorkItem(1)])
    redis.script_flush()
    assert queues.enqueue([WorkItem(2)])
    assert queues.queue().count == 2


def test_foreign_keys_with_the_names_of_rqs_keys_do_not_block_a_job(redis):
    for key in ("executions:run-1", "results:run-1", "finished:notifications", "wip:notifications"):
        redis.set(f"rq:{key}", "foreign")
    assert queues.enqueue([WorkItem(1)])
    assert queues.queue().get_job_ids() == ["run-1"]
    assert not redis.exists("rq:executions:run-1", "rq:results:run-1")
