"""Whether it runs, whether it is ready, and its figures for Prometheus."""

import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

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
RECOVERY_SECONDS = 30  # within which work that was lost is to go on


@blueprint.get("/healthz")
def healthz() -> Response:
    """The process answers. It asks nothing of the database or of Redis."""
    return json_response('{"status": "ok"}', 200)


@blueprint.record
def _remember_readiness(state: BlueprintSetupState) -> None:
    state.app.extensions[_EXTENSION] = _Readiness()


class _Readiness:
    """The last check: made again by the first request that finds it old, while the others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: tuple[dict[str, str], dict[str, int]] = ({}, {})
        self._checked_at = float("-inf")  # `time.monotonic()`

    def get(self) -> tuple[dict[str, str], dict[str, int]]:
        """What does not work, by part ("ok" where it does), and since when parts of the sweep other than an overdue
        recovery fail. tuning.readiness_cache_seconds old at most."""
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
    """200 when database and Redis answer, migrations are done, no partition is missing and lost work is recovered; else
    503, and what is not.

    `warnings` are parts of the sweep that fail: nobody waits for them, but an operator has to look into it. Recovery is
    among them at first, and an error once lost work waits longer than RECOVERY_SECONDS.
    """
    parts, failing = current_app.extensions[_EXTENSION].get()
    wrong = {part: [why] for part, why in parts.items() if why != "ok"}
    if wrong:
        return problem(503, "Not ready; `errors` says what is not.", errors=wrong)
    warnings = [_failing(part, since) for part, since in sorted(failing.items())]
    return json_response(json.dumps({"status": "ok", **parts, "warnings": warnings}), 200)


def _failing(part: str, since: int) -> str:
    when = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"The worker's {part} has failed each time since {when}; its log says why."


Reading = tuple[str, str, list[str], list[tuple[list[str], float]]]


def _readings() -> list[Reading]:
    """What /metrics shows: (name, what it is, names of labels, [(labels, value), ...]) each.

    What is unavailable has no values, and `belfry_dependency_up` says so.
    """
    waiting: list[tuple[list[str], float]] = []
    workers: list[tuple[list[str], float]] = []
    redis_up = redis.redis_answers()
    if redis_up:
        for name in queues.QUEUES:
            one = queues.queue(name)
            waiting.append(([name, "queued"], one.count))
            for state, registry in (
                ("started", one.started_job_registry),
                ("scheduled", one.scheduled_job_registry),
                ("failed", one.failed_job_registry),
            ):
                waiting.append(([name, state], registry.get_job_count(cleanup=False)))
        workers.append(([], Worker.count(connection=redis.redis_connection())))
    unfinished: dict[str, Any] | None = None
    missing: int | None = None
    with suppress(OperationalError, InterfaceError):
        unfinished = runs.count_unfinished()
        missing = len(partitions.missing_ranges(ahead=False))
    return [
        (
            "belfry_dependency_up",
            "1 if a dependency answers, otherwise 0",
            ["dependency"],
            [(["redis"], float(redis_up)), (["database"], float(unfinished is not None))],
        ),
        ("belfry_queue_jobs", "Jobs of a queue by state", ["queue", "state"], waiting),
        ("belfry_rq_workers", "Workers that are registered", [], workers),
        (
            "belfry_runs",
            "Runs that are not finished, and failed ones, by state",
            ["state"],
            [([state], count) for state, count in unfinished["states"].items()] if unfinished else [],
        ),
        (
            "belfry_oldest_unfinished_run_age_seconds",
            "Age of the oldest unfinished run; 0 when all is done",
            [],
            [([], unfinished["oldest_seconds"])] if unfinished else [],
        ),
        (
            "belfry_partitions_missing",
            "Ranges of message ids of which nobody can be notified, for lack of a partition",
            [],
            [([], missing)] if missing is not None else [],
        ),
        (
            "belfry_sweep_part_failing",
            "1 for a part of the workers' sweep that failed the last time",
            ["part"],
            [([part], 1.0) for part in sweep_status.sweep_times("failing since")] if redis_up else [],
        ),
        (
            "belfry_sweep_part_last_success_timestamp_seconds",
            "When a part of the workers' sweep succeeded last",
            ["part"],
            [([part], when) for part, when in sweep_status.sweep_times("succeeded at").items()] if redis_up else [],
        ),
    ]


class _Readings:
    """Asked anew at each scrape: nothing is kept in a process, so any web process gives the same answer."""

    def collect(self) -> Iterator[Metric]:
        for name, about, labels, values in _readings():
            family = GaugeMetricFamily(name, about, labels=labels)
            for label_values, value in values:
                family.add_metric(label_values, value)
            yield family


def is_scraper() -> bool:
    """Whether this is a request to /metrics with METRICS_TOKEN. Asks nothing of the database, which may be away."""
    if request.endpoint != "health.metrics" or not settings.metrics_token:
        return False
    return hmac.compare_digest((bearer_token() or "").encode(), settings.metrics_token.encode())


@blueprint.get("/metrics")
def metrics() -> Response:
    """Queues, workers and unfinished runs, as Prometheus reads them. For admins, and with METRICS_TOKEN."""
    if not is_scraper():
        if g.user is None:
            raise HttpProblem(401, "Send an admin's token, or METRICS_TOKEN.", {"WWW-Authenticate": "Bearer"})
        if not g.user.is_admin:
            raise HttpProblem(403, "Only admins may read the metrics.")
    registry = CollectorRegistry()
    registry.register(_Readings())
    return Response(generate_latest(registry), mimetype="text/plain; version=0.0.4")
