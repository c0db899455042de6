"""Whether it runs, whether it is ready, and its figures for Prometheus."""

import hmac
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from flask import Blueprint, Response, g
from peewee import InterfaceError, OperationalError
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from rq import Worker

import queues
from belfry import accounts, runs
from belfry.health import check
from config import settings
from views.endpoint import bearer_token, json_response
from views.problems import HttpProblem, problem

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """The process answers. It asks nothing of the database or of Redis."""
    return json_response('{"status": "ok"}', 200)


@blueprint.get("/readyz")
def readyz() -> Response:
    """200 when database and Redis answer and the migrations are done; else 503, and which is not."""
    parts = check(queues.redis_answers)
    wrong = {part: [why] for part, why in parts.items() if why != "ok"}
    if wrong:
        return problem(503, "Not ready; `errors` says what is not.", errors=wrong)
    return json_response('{"status": "ok", "database": "ok", "redis": "ok", "migrations": "ok"}', 200)


Reading = tuple[str, str, list[str], list[tuple[list[str], float]]]


def _readings() -> list[Reading]:
    """What /metrics shows: (name, what it is, names of labels, [(labels, value), ...]) each.

    What is out of reach has no values, and `belfry_up` says so.
    """
    waiting: list[tuple[list[str], float]] = []
    workers: list[tuple[list[str], float]] = []
    redis_up = queues.redis_answers()
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
        workers.append(([], Worker.count(connection=queues.redis_connection())))
    unfinished: dict[str, Any] | None = None
    with suppress(OperationalError, InterfaceError):
        unfinished = runs.count_unfinished()
    return [
        (
            "belfry_up",
            "Whether a part answers",
            ["part"],
            [(["redis"], float(redis_up)), (["database"], float(unfinished is not None))],
        ),
        ("belfry_queue_jobs", "Jobs of a queue by state", ["queue", "state"], waiting),
        ("belfry_workers", "Workers that are registered", [], workers),
        (
            "belfry_runs",
            "Runs that are not finished, and failed ones, by state",
            ["state"],
            [([state], count) for state, count in unfinished["states"].items()] if unfinished else [],
        ),
        (
            "belfry_oldest_unfinished_run_seconds",
            "Age of the oldest unfinished run; 0 when all is done",
            [],
            [([], unfinished["oldest_seconds"])] if unfinished else [],
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


@blueprint.get("/metrics")
def metrics() -> Response:
    """Queues, workers and unfinished runs, as Prometheus reads them. An admin's token, or METRICS_TOKEN."""
    token = bearer_token() or ""
    if not (settings.metrics_token and hmac.compare_digest(token.encode(), settings.metrics_token.encode())):
        g.user = accounts.authenticate(token) if token else None
        if g.user is None:
            raise HttpProblem(401, "Send an admin's token, or METRICS_TOKEN.", {"WWW-Authenticate": "Bearer"})
        if not g.user.is_admin:
            raise HttpProblem(403, "Only admins may read the metrics.")
    registry = CollectorRegistry()
    registry.register(_Readings())
    return Response(generate_latest(registry), mimetype="text/plain; version=0.0.4")

