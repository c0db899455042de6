"""How long after each blow the work went on."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tools.chaos.process_under_test import FAILED, KILL_WITH_PARENT
from tools.chaos.stage import Death, Sign

OWN = "None"
"""The part of a run that is not a slice; as `Sign.after` has it."""


class Blow(NamedTuple):
    """When, what happened, and the current work item: its run, and `after` as in a Sign. None where nobody knows,
    or where it may have been several."""

    when: float
    what: str
    run_id: int | None = None
    after: str = OWN


class Recovery(NamedTuple):
    """How many seconds after a blow the part that waited longest went on."""

    seconds: float
    run_id: int
    after: str
    blow: Blow


class Open(NamedTuple):
    """A part, from when to when there was something to do, and its signs of life in order."""

    run_id: int
    after: str
    since: float
    until: float
    signs: list[Sign]

    def wait(self, blow: float) -> float | None:
        """Seconds to its next sign of life, or its end; None where there was nothing to do, or it waited for its
        retry."""
        if not self.since <= blow < self.until:
            return None
        before = [sign for sign in self.signs if sign.when <= blow]
        if before and before[-1].point == FAILED:
            return None
        return min((sign.when for sign in self.signs[len(before) :]), default=self.until) - blow


def blow_of(death: Death) -> Blow:
    """A work-horse has one current work item; a web process, or a worker with its sweeper, may have had more."""
    what = f"{death.action} at {death.point}"
    in_a_job = death.point.split(".")[0] in ("job", "run", "slice", "attempt") and death.point != "run.enqueued"
    if in_a_job and death.action != KILL_WITH_PARENT:
        return Blow(death.when, what, death.run_id, death.after)
    return Blow(death.when, what)


def recoveries(
    blows: Iterable[Blow], runs: Iterable[Mapping[str, Any]], signs: list[Sign], now: float
) -> list[Recovery]:
    """For each blow: until its work item continued; where that is not known, until every part had that
    was unfinished then, the slowest counts. Sorted by seconds; a blow that nothing waited for has none.

    A part goes on when somebody takes it up, or is done with it. So the time covers noticing the death, waiting for
    a worker, and that worker's own start where it was killed too. What has failed with an error and waits for its
    retry waits for that, and not for recovery. What never went on has waited until `now`. `runs` are rows with id,
    created_at and finished_at.
    """
    of_run: dict[int, list[Sign]] = defaultdict(list)
    for sign in sorted(signs):
        of_run[sign.run_id].append(sign)
    parts = {
        run["id"]: parts_of(
            run["id"],
            run["created_at"].timestamp(),
            run["finished_at"].timestamp() if run["finished_at"] else now,
            of_run[run["id"]],
        )
        for run in runs
    }
    everything = [part for of_one in parts.values() for part in of_one]
    found = []
    for blow in blows:
        concerned = everything
        if blow.run_id in parts:
            concerned = [part for part in parts[blow.run_id] if blow.after in (OWN, part.after)]
        waits = [
            Recovery(wait, part.run_id, part.after, blow)
            for part in concerned
            if (wait := part.wait(blow.when)) is not None
        ]
        if waits:
            found.append(max(waits))
    return sorted(found)


def parts_of(run_id: int, created: float, finished: float, signs: list[Sign]) -> list[Open]:
    """The parts of a run. Its own is open until it is committed, which is also when its slices begin to be; each of
    them until it is committed itself. Where the process died before it could write that down: until the first of the
    slices is taken up, or the run is finished."""
    of_part: dict[str, list[Sign]] = defaultdict(list)
    for sign in signs:
        of_part[sign.after].append(sign)
    own = of_part.pop(OWN, [])
    ends = [sign.when for sign in own if sign.point == "run.committed"]
    ends += [slice_signs[0].when for slice_signs in of_part.values()]
    planned = min([*ends, finished])
    return [
        Open(run_id, OWN, created, planned, own),
        *(
            Open(run_id, after, planned, _committed(slice_signs, finished), slice_signs)
            for after, slice_signs in of_part.items()
        ),
    ]


def _committed(signs: list[Sign], finished: float) -> float:
    return min((sign.when for sign in signs if sign.point == "slice.committed"), default=finished)
