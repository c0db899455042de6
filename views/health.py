"""Whether it runs, whether it is ready, and its figures for Prometheus."""

import hmac
from collections.abc import Iterator

from flask import Blueprint, Response, g
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from belfry import accounts
from belfry.health import check
from config import settings
from jobs import readings, redis_answers
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
    parts = check(redis_answers)
    wrong = {part: [why] for part, why in parts.items() if why != "ok"}
    if wrong:
        return problem(503, "Not ready; `errors` says what is not.", errors=wrong)
    return json_response('{"status": "ok", "database": "ok", "redis": "ok", "migrations": "ok"}', 200)


class _Readings:
    """Asked anew at each scrape: nothing is kept in a process, so any web process gives the same answer."""

    def collect(self) -> Iterator[Metric]:
        for name, about, labels, values in readings():
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

