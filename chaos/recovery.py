"""How long after each blow the work went on."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from belfry.sql import rows
from chaos.stage import Sign
from chaos.victim import FAILED


class Blow(NamedTuple):
    """When, what happened, and which run was in hand; None where nobody knows."""

    when: float
    what: str
    run_id: int | None


class Recovery(NamedTuple):
    """How many seconds after a blow the run that waited longest went on."""

    seconds: float
    run_id: int
    blow: Blow


@dataclass
class _Run:
    id: int
    created: float
    finished: float
    signs: list[Sign]

    def wait(self, blow: float) -> float | None:
        """Seconds to its next sign of life; None where it was finished, not there yet, or waited for its retry."""
        if not self.created <= blow < self.finished:
            return None
        for number, sign in enumerate(self.signs):
            if sign.when > blow:
                before = [one.point for one in self.signs[:number] if one.after == sign.after]
                return None if before and before[-1] == FAILED else sign.when - blow
        return self.finished - blow


def recoveries(blows: Iterable[Blow], signs: list[Sign]) -> list[Recovery]:
    """For each blow: until the run that was in hand had gone on; where that is not known, until every run had that
    was unfinished then, the slowest counts. Sorted by seconds.

    A run goes on when somebody takes up a part of it, or is done with one. So the time covers noticing the death,
    waiting for a worker, and that worker's own start where it was killed too. What has failed with an error and
    waits for its retry waits for that, and not for recovery. infinity: some run never went on.
    """
    of_run: dict[int, list[Sign]] = defaultdict(list)
    for sign in sorted(signs):
        of_run[sign.run_id].append(sign)
    runs = {
        run["id"]: _Run(
            run["id"],
            run["created_at"].timestamp(),
            run["finished_at"].timestamp() if run["finished_at"] else math.inf,
            of_run[run["id"]],
        )
        for run in rows("SELECT id, created_at, finished_at FROM run")
    }
    found = []
    for blow in blows:
        concerned = [runs[blow.run_id]] if blow.run_id in runs else runs.values()
        waits = [(wait, run.id) for run in concerned if (wait := run.wait(blow.when)) is not None]
        if waits:
            found.append(Recovery(*max(waits), blow))
    return sorted(found)
