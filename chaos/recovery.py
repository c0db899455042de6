"""How long after each blow the work went on."""

import bisect
import math
from collections import defaultdict

from belfry.sql import rows
from chaos.victim import FAILED

Blow = tuple[float, int | None]
"""When, and which run was in hand; None where nobody knows."""


def recoveries(blows: list[Blow], signs_of_life: list[tuple[float, int, str]]) -> list[float]:
    """Seconds for each blow until the run that was in hand had gone on; where that is not known, until every run had
    that was unfinished then, the slowest counts.

    A run goes on when somebody takes up a part of it, or is done with one. So the time covers noticing the death,
    waiting for a worker, and that worker's own start where it was killed too. A run that has failed with an error,
    and waits for its retry, waits for that and not for recovery. infinity: some run never went on.
    """
    signs: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for when, run_id, point in signs_of_life:
        signs[run_id].append((when, point))
    runs = {}
    for run in rows("SELECT id, created_at, finished_at FROM run"):
        finished = run["finished_at"].timestamp() if run["finished_at"] else math.inf
        runs[run["id"]] = (run["created_at"].timestamp(), finished, sorted(signs[run["id"]]))
    found = []
    for blow, run_id in blows:
        concerned = [runs[run_id]] if run_id in runs else runs.values()
        waits = [_wait(blow, signs, finished) for created, finished, signs in concerned if created <= blow < finished]
        found += [max(wait for wait in waits if wait is not None)] if any(wait is not None for wait in waits) else []
    return found


def _wait(blow: float, signs: list[tuple[float, str]], finished: float) -> float | None:
    """From a blow to a run's next sign of life; None for one that waits for its retry."""
    following = bisect.bisect_right(signs, (blow, "~"))
    if following and signs[following - 1][1] == FAILED:
        return None
    return (signs[following][0] if following < len(signs) else finished) - blow
