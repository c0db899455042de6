"""Replacements for views of rq-dashboard, by their names there.

rq-dashboard reads some jobs with pickle, which would run what a writer to Redis stored; here everything is JSON. It
writes texts of jobs into its pages unescaped; here they are escaped in the JSON that its scripts show.
"""

import json
import re
from contextlib import suppress
from html import escape
from math import ceil
from typing import Any

from flask import Response, current_app, jsonify, render_template, url_for
from rq import Queue, Worker
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer
from rq_dashboard import web

from belfry.fanout import recovery, runs
from belfry.queue import queues

LIBRARY = web.blueprint.name
JOB_ID = r"[A-Za-z0-9_-]{1,100}"


class UnfinishedRun(Exception):
    """The job belongs to an unfinished run, given by its id."""


class _LenientJson(JSONSerializer):  # type: ignore[misc]
    """For showing jobs: data that is not JSON is shown as such, and does not fail the page of all jobs."""

    @staticmethod
    def loads(data: bytes) -> Any:
        try:
            return JSONSerializer.loads(data)
        except ValueError:
            return "(not JSON)"


class _SeenWorker(Worker):  # type: ignore[misc]
    """A worker that is only read."""

    def _set_connection(self, connection: Any) -> Any:
        return connection  # RQ's would set the time-out of the web's own connections to minutes


def _redis() -> Any:
    return current_app.redis_conn  # type: ignore[attr-defined]


def _queue(name: str) -> Any:
    return queues.queue(name, _redis())


def _job(job_id: str, serializer: Any = JSONSerializer) -> Any:
    return Job.fetch(job_id, connection=_redis(), serializer=serializer)


def _source(queue_name: str, registry_name: str) -> Any:
    """The queue itself for `queued`, otherwise its registry of that name."""
    queue = _queue(queue_name)
    return queue if registry_name == "queued" else getattr(queue, f"{registry_name}_job_registry")


def _entries(source: Any, first: int = 0, last: int = -1) -> dict[bytes, str]:
    """{entry: job id} of a queue or registry; the started registry adds the execution's id to the job's."""
    read = _redis().lrange if isinstance(source, Queue) else _redis().zrange
    return {entry: entry.decode("utf-8", "replace").split(":")[0] for entry in read(source.key, first, last)}


def _remove_entries_without_job(source: Any) -> None:
    for entry, job_id in _entries(source).items():
        if not Job.exists(job_id, _redis()):
            if isinstance(source, Queue):
                _redis().lrem(source.key, 0, entry)
            else:
                _redis().zrem(source.key, entry)


def _escaped(value: Any) -> Any:
    """The value with every text escaped, because the library's scripts write it into HTML unescaped."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def _show(template: str, **values: Any) -> str:
    return render_template(
        f"rq_dashboard/{template}",
        current_instance=0,
        instance_list=current_app.config["RQ_DASHBOARD_REDIS_URL"],
        rq_url_prefix=url_for(f"{LIBRARY}.queues_overview"),
        rq_dashboard_version=web.rq_dashboard_version,
        rq_version=web.rq_version,
        enable_delete=True,
        **values,
    )


def workers_overview(instance_number: int) -> str:
    return _show("workers.html", active_tab="workers")


def jobs_overview(instance_number: int, queue_name: str | None, **how: Any) -> Any:
    """Without a name, show the first queue, and not the library's `default`."""
    return web.jobs_overview(instance_number, queue_name or queues.NOTIFICATIONS, **how)


def job_view(instance_number: int, job_id: str) -> str:
    return _show("job.html", id=_job(job_id).id)


def list_queues(instance_number: int) -> Response:
    queues = web.serialize_queues(0, sorted(Queue.all(connection=_redis(), serializer=JSONSerializer)))
    return jsonify(queues=_escaped(queues))


def list_workers(instance_number: int) -> Response:
    """Name a job by its description: its arguments may have any length, and may not be JSON."""
    workers = []
    for worker in _SeenWorker.all(connection=_redis(), serializer=JSONSerializer):
        shown = {name: getattr(worker, name) for name in WORKER_SHOWS}
        shown |= {"queues": worker.queue_names(), "state": worker.get_state(), "current_job": "idle"}
        shown = _escaped(shown)
        if job_id := worker.get_current_job_id():
            with suppress(NoSuchJobError):  # deleted while it runs, or finished
                job = _job(job_id)
                shown["current_job"] = {
                    "job_id": job.id,
                    "description": job.description,  # the page escapes this text itself
                    "created_at": web.serialize_date(job.created_at),
                    "call_string": escape(job.description or job.id),
                }
        workers.append(shown)
    return jsonify(workers=sorted(workers, key=lambda one: (one["state"], one["queues"], one["name"])))


def list_jobs(
    instance_number: int, queue_name: str, registry_name: str, per_page: str, order: str, page: str
) -> Response:
    """The library's view shows the same jobs on several pages. The page escapes these texts itself."""
    source, size, number = _source(queue_name, registry_name), int(per_page), int(page)
    total = source.count if registry_name == "queued" else source.get_job_count(cleanup=False)
    start = (number - 1) * size
    end = min(start + size, total)
    if order == "dsc":
        start, end = max(0, total - start - size), total - start
    entries = _entries(source, start, end - 1) if start < end else {}
    ids = [job_id for job_id in entries.values() if re.fullmatch(JOB_ID, job_id)]
    found = Job.fetch_many(ids, connection=_redis(), serializer=_LenientJson)
    shown = [web.serialize_job(job) for job in found if job]

    def link(to: int) -> dict[str, Any]:
        path = f"/0/view/jobs/{queue_name}/{registry_name}/{size}/{order}/{to}"
        return {"number": to, "url": url_for(f"{LIBRARY}.queues_overview").rstrip("/") + path}

    pages = ceil(total / size)
    pagination: dict[str, Any] = {
        "current_page": number,
        "num_pages": pages,
        "pages_in_window": [link(to) for to in web.pagination_window(total, number, size)],
        "first_page": link(1),
        "last_page": link(max(pages, 1)),
    }
    if number > 1:
        pagination["prev_page"] = link(number - 1)
    if number < pages:
        pagination["next_page"] = link(number + 1)
    jobs_shown = shown[::-1] if order == "dsc" else shown
    return jsonify(name=queue_name, registry_name=registry_name, jobs=jobs_shown, pagination=pagination)


def job_info(instance_number: int, job_id: str) -> Response:
    job = _job(job_id, _LenientJson)
    shown = web.serialize_job(job) | {
        "enqueued_at": web.serialize_date(job.enqueued_at),
        "origin": job.origin,
        "status": job.get_status(),
        "result": job.return_value(),
        "metadata": json.dumps(job.meta),
    }
    if needed := job.dependency_ids:
        shown["depends_on"] = needed
        shown["depends_on_status"] = ["active" if Job.exists(one, _redis()) else "expired" for one in needed]
    return jsonify(_escaped(shown))


def delete_job_view(job_id: str) -> Response:
    """Delete the record of a job. Raises UnfinishedRun where its run would be enqueued again."""
    _delete([_job(job_id)])
    return jsonify(status="OK")


def _delete(jobs: list[Job]) -> None:
    """Delete jobs, except those of unfinished runs, for which it raises UnfinishedRun in the end."""
    run_ids = {job.id: run_id for job in jobs if (run_id := queues.run_of_job_id(job.id)) is not None}
    unfinished = runs.unfinished(list(run_ids.values()))
    for job in jobs:
        if run_ids.get(job.id) not in unfinished:
            job.delete()
    if unfinished:
        raise UnfinishedRun(min(unfinished))


def requeue_job_view(job_id: str) -> Response:
    _requeue(_job(job_id))
    return jsonify(status="OK")


def _requeue(job: Job) -> None:
    """Enqueue a failed job again; a failed run gets all its attempts again.

    Raises InvalidJobOperation where the job has not failed.
    """
    run_id = queues.run_of_job_id(job.id)
    items = recovery.retry_failed([run_id]) if run_id is not None and job.is_failed else []
    if items:
        queues.enqueue(items, lost=True)  # which removes the job from the failed registry
    else:
        job.requeue()


def requeue_all(queue_name: str) -> Response:
    """Requeue all failed jobs; `count` is their number."""
    count = 0
    for job_id in _source(queue_name, "failed").get_job_ids(cleanup=False):
        with suppress(NoSuchJobError, InvalidJobOperation):  # expired, or requeued by another request
            _requeue(_job(job_id))
            count += 1
    return jsonify(status="OK", count=count)


def empty_queue(queue_name: str, registry_name: str) -> Response:
    """Delete the jobs of a queue or of one of its registries, and entries without a job, as `_delete` does."""
    source = _source(queue_name, registry_name)
    try:
        _delete([job for job in Job.fetch_many(_entries(source).values(), _redis(), JSONSerializer) if job])
    finally:
        _remove_entries_without_job(source)
    return jsonify(status="OK")


def compact_queue(queue_name: str) -> Response:
    """Remove entries without a job. The library's view empties the queue meanwhile."""
    _remove_entries_without_job(_queue(queue_name))
    return jsonify(status="OK")


WORKER_SHOWS = (
    "name", "pid", "last_heartbeat", "birth_date", "successful_job_count", "failed_job_count",
    "total_working_time", "version", "python_version",
)  # fmt: skip
REPLACED = (
    workers_overview, jobs_overview, job_view, list_queues, list_workers, list_jobs, job_info,
    delete_job_view, requeue_job_view, requeue_all, empty_queue, compact_queue,
)  # fmt: skip
