"""Belfry works with exactly the Redis permissions that docs/guides/deploy.md lists."""

import os
import re
import secrets
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest
from redis import Redis
from redis.connection import parse_url
from rq import Queue

from belfry.core.db import execute
from belfry.fanout.claims import WorkItem
from belfry.queue import queues
from config import settings
from models import Run
from tests.fanout_helpers import add_members, fault_on_insert, post
from tests.processes import RQ_WORKER, running, wait_until, web_process, worker_process
from tests.sse_client import StreamClient
from tools.dev import ROOT

pytestmark = pytest.mark.slow

GUIDE = ROOT / "docs" / "guides" / "deploy.md"


def documented_rules() -> list[str]:
    """The rules after the name and the password in the ACL line of the guide."""
    [line] = re.findall(r"^user belfry on >PASSWORD (.+)$", GUIDE.read_text(), re.MULTILINE)
    return line.split()


@pytest.fixture
def restricted(redis: Redis) -> Iterator[str]:
    """The URL of the tests' Redis for a user with these rules; fail if Redis refused a command of this user."""
    name, password = f"belfry-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
    redis.execute_command("ACL", "SETUSER", name, "on", f">{password}", *documented_rules())
    place = parse_url(settings.redis_url)
    address = place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}"
    scheme = settings.redis_url.partition("://")[0]
    try:
        yield f"{scheme}://{name}:{password}@{address}?db={place.get('db', 0)}"
        refused = [(entry["reason"], entry["object"]) for entry in redis.acl_log() if entry["username"] == name]
        assert refused == []
    finally:
        redis.execute_command("ACL", "DELUSER", name)


def test_the_user_cannot_run_other_commands(redis, restricted):
    [name] = re.findall(r"//(.+?):", restricted)
    for words in (
        ["FLUSHALL"], ["FLUSHDB"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["SHUTDOWN"], ["EVAL", "return 1", "0"],
        ["DEBUG", "SLEEP", "0"], ["ACL", "LIST"], ["CLIENT", "LIST"], ["MONITOR"], ["SCAN", "0"],
        ["GET", "elsewhere"], ["PUBLISH", "elsewhere", "x"],
    ):  # fmt: skip
        assert b"no permissions" in redis.execute_command("ACL", "DRYRUN", name, *words), words
    assert redis.execute_command("ACL", "DRYRUN", name, "GET", "rq:queue:bulk") == b"OK"


def test_the_web_process_workers_and_dashboard_work_with_the_documented_rules(cast, redis, restricted):
    add_members(cast.server_id, 30)
    behind = {"REDIS_URL": restricted}
    bulk = Queue(queues.BULK, connection=redis, serializer="json")
    with web_process(**behind) as address, StreamClient(address, cast.vip.token) as stream:

        def send_request(path: str, method: str = "GET", data: bytes | None = None) -> bytes:
            headers = {"Authorization": f"Bearer {cast.admin.token}", "Content-Type": "application/json"}
            with urlopen(Request(address + path, data, headers, method=method), timeout=20) as response:
                return bytes(response.read())

        with worker_process(FANOUT_SLICE_SIZE="9", **behind):
            for _ in range(3):
                send_request("/api/messages", "POST", f'{{"channel_id": {cast.general}, "content": "gold"}}'.encode())
            wait_until(lambda: {run.state for run in Run.select()} == {"succeeded"}, "the runs to succeed")
            with fault_on_insert("RAISE EXCEPTION 'the disk is full';"):
                _, run_id = post(cast.subscriber, cast.general)
                queues.enqueue_run(run_id)
                wait_until(lambda: redis.zcard("rq:scheduled:bulk"), "RQ's retry")
            wait_until(lambda: Run.get_by_id(run_id).state == "succeeded", "the retry to succeed")
            wait_until(stream.messages, "the stream to announce them")
        failing = [post(cast.subscriber, cast.general)[1] for _ in range(3)]
        dependency = bulk.enqueue("jobs.notify", 0)
        for run in failing:
            bulk.enqueue("jobs.notify", run, job_id=f"run-{run}")
        queues.enqueue([WorkItem(failing[0], 5)])
        rq_worker = [*RQ_WORKER, "--burst", "--with-scheduler", "-u", restricted]
        with fault_on_insert("RAISE EXCEPTION 'the disk is full';"):
            with running([*rq_worker, *queues.QUEUES], **behind) as process:
                assert process.wait(60) == 0
            assert bulk.failed_job_registry.count == 3
            with running([*rq_worker, queues.NOTIFICATIONS], **behind) as process:
                assert process.wait(60) == 0
        assert dependency.is_finished
        waiting = bulk.enqueue("jobs.notify", 0)
        for path in ("/rq/", "/rq/0/view/workers", "/rq/0/data/queues.json", "/rq/0/data/workers.json"):
            send_request(path)
        for state in ("queued", "started", "finished", "failed", "scheduled", "deferred", "canceled"):
            send_request(f"/rq/0/data/jobs/bulk/{state}/8/asc/1.json")
        for job_id in (waiting.id, dependency.id, f"run-{failing[0]}"):
            send_request(f"/rq/0/view/job/{job_id}")
            send_request(f"/rq/0/data/job/{job_id}.json")
        send_request(f"/rq/job/run-{failing[0]}/requeue", "POST")
        send_request(f"/rq/job/{dependency.id}/delete", "POST")
        send_request("/rq/requeue/bulk", "POST")
        send_request("/rq/queue/bulk/compact", "POST")
        execute("UPDATE run SET state = 'succeeded', finished_at = now(), sweep_after = NULL")
        send_request("/rq/queue/bulk/queued/empty", "POST")
        send_request("/rq/queue/bulk/finished/empty", "POST")
        assert b'belfry_dependency_up{dependency="redis"} 1.0' in send_request("/metrics")
        send_request("/readyz")
    assert bulk.count == 0
    assert os.environ["REDIS_URL"] != restricted
