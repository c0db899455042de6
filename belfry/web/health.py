"""Health, readiness and metrics: /healthz, /readyz and /metrics."""

import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

from flask import Blueprint, Response, current_app, g, request
from flask.blueprints import BlueprintSetupState
from peewee import InterfaceError, OperationalError
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from rq import Worker

from belfry.core import partitions, redis
from belfry.core.health import check_dependencies
from belfry.fanout import runs
from belfry.queue import queues, sweep_status
from belfry.web.endpoint import bearer_token, json_response
from belfry.web.problems import HttpProblem, problem
from config import settings, tuning

blueprint = Blueprint("health", __name__)
_EXTENSION = "belfry.readiness"
RECOVERY_SECONDS = 30  # within which lost work must continue


@blueprint.get("/healthz")
def healthz() -> Response:
    """Respond with 200 while the process runs. Uses neither PostgreSQL nor Redis."""
    return json_response('{"status": "ok"}', 200)


@blueprint.record
def _remember_readiness(state: BlueprintSetupState) -> None:
    state.app.extensions[_EXTENSION] = _Readiness()


class _Readiness:
    """The last check, which is repeated by the first request that finds it too old, while the others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: tuple[dict[str, str], dict[str, int]] = ({}, {})
        self._checked_at = float("-inf")  # `time.monotonic()`

    def get(self) -> tuple[dict[str, str], dict[str, int]]:
        """({dependency: "ok" or the error}, {step of the sweep: time since which it fails}).

        At most `tuning.readiness_cache_seconds` old. An overdue recovery is an error and no failing step.
        """
        with self._lock:
            if time.monotonic() - self._checked_at >= tuning.readiness_cache_seconds:
                self._found = self._check()
                self._checked_at = time.monotonic()
            return self._found

    def _check(self) -> tuple[dict[str, str], dict[str, int]]:
        parts = check_dependencies(redis.redis_answers)
        failing = sweep_status.sweep_times("failing since") if parts["redis"] == "ok" else {}
        parts["recovery"] = "ok"
        if sweep_status.RECOVERY in failing and time.time() - failing[sweep_status.RECOVERY] > RECOVERY_SECONDS:
            parts["recovery"] = _failing(sweep_status.RECOVERY, failing.pop(sweep_status.RECOVERY))
        return parts, failing


@blueprint.get("/readyz")
def readyz() -> Response:
    """200 where PostgreSQL and Redis respond, migrations and partitions are complete and lost work is recovered.

    Otherwise 503, with the reasons in `errors`. `warnings` names steps of the sweep that fail, which delay nobody but
    need an operator. Recovery is one of them at first, and an error once lost work waits longer than RECOVERY_SECONDS.
    """
    parts, failing = current_app.extensions[_EXTENSION].get()
    errors = {part: [reason] for part, reason in parts.items() if reason != "ok"}
    if errors:
        return problem(503, "Not ready; `errors` says why.", errors=errors)
    warnings = [_failing(step, since) for step, since in sorted(failing.items())]
    return json_response(json.dumps({"status": "ok", **parts, "warnings": warnings}), 200)


def _failing(step: str, since: int) -> str:
    when = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"The worker's {step} has failed each time since {when}; its log says why."


METRICS = {
    "belfry_dependency_up": ("1 if a dependency responds, otherwise 0", ["dependency"]),
    "belfry_queue_jobs": ("Jobs of a queue by state", ["queue", "state"]),
    "belfry_rq_workers": ("Registered workers", []),
    "belfry_runs": ("Unfinished and failed runs by state", ["state"]),
    "belfry_oldest_unfinished_run_age_seconds": ("Age of the oldest unfinished run; 0 without one", []),
    "belfry_partitions_missing": ("Ranges of message ids that have no partition, so that nobody is notified", []),
    "belfry_sweep_part_failing": ("1 for a step of the sweep that failed the last time", ["part"]),
    "belfry_sweep_part_last_success_timestamp_seconds": ("Time of the last success of a step of the sweep", ["part"]),
}
"""{metric: (description, names of its labels)}."""
Sample = tuple[str, list[str], float]


def _samples() -> Iterator[Sample]:
    """(metric, values of its labels, value) of each sample. An unavailable dependency has none but its own."""
    redis_up, database_up = redis.redis_answers(), False
    if redis_up:
        for name in queues.QUEUES:
            queue = queues.queue(name)
            yield "belfry_queue_jobs", [name, "queued"], queue.count
            for state in ("started", "scheduled", "failed"):
                registry = getattr(queue, f"{state}_job_registry")
                yield "belfry_queue_jobs", [name, state], registry.get_job_count(cleanup=False)
        yield "belfry_rq_workers", [], Worker.count(connection=redis.redis_connection())
        yield from (("belfry_sweep_part_failing", [step], 1) for step in sweep_status.sweep_times("failing since"))
        for step, when in sweep_status.sweep_times("succeeded at").items():
            yield "belfry_sweep_part_last_success_timestamp_seconds", [step], when
    with suppress(OperationalError, InterfaceError):
        unfinished, missing = runs.count_unfinished(), partitions.missing_ranges(ahead=False)
        database_up = True
        yield from (("belfry_runs", [state], count) for state, count in unfinished["states"].items())
        yield "belfry_oldest_unfinished_run_age_seconds", [], unfinished["oldest_seconds"]
        yield "belfry_partitions_missing", [], len(missing)
    yield "belfry_dependency_up", ["redis"], redis_up
    yield "belfry_dependency_up", ["database"], database_up


class _Collector:
    """Reads all samples at each scrape: no process keeps any, so every web process gives the same response."""

    def collect(self) -> Iterator[Metric]:
        families = {name: GaugeMetricFamily(name, about, labels=labels) for name, (about, labels) in METRICS.items()}
        for name, labels, value in _samples():
            families[name].add_metric(labels, value)
        yield from families.values()


def is_scraper() -> bool:
    """Whether this is a request to /metrics with METRICS_TOKEN. Does not use PostgreSQL, which may be unavailable."""
    if request.endpoint != "health.metrics" or not settings.metrics_token:
        return False
    return hmac.compare_digest((bearer_token() or "").encode(), settings.metrics_token.encode())


@blueprint.get("/metrics")
def metrics() -> Response:
    """Queues, workers and unfinished runs in Prometheus' format, for admins and for METRICS_TOKEN."""
    if not is_scraper():
        if g.user is None:
            raise HttpProblem(401, "Send an admin's token, or METRICS_TOKEN.", {"WWW-Authenticate": "Bearer"})
        if not g.user.is_admin:
            raise HttpProblem(403, "Only admins may read the metrics.")
    registry = CollectorRegistry()
    registry.register(_Collector())
    return Response(generate_latest(registry), mimetype="text/plain; version=0.0.4")
