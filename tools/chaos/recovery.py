"""Measure the seconds from each fault until the work continued."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tools.chaos.harness import FailpointHit, ProgressEvent
from tools.chaos.process_under_test import ATTEMPT_FAILED, KILL_WITH_PARENT

RUN_ITSELF = "None"
"""`ProgressEvent.after` of the work item that is the run itself, not a slice."""


class Fault(NamedTuple):
    """When, what happened, and the current work item: its run, and `after` as in a ProgressEvent. `run_id` is None
    where the work item is unknown, or there may have been several."""

    when: float
    description: str
    run_id: int | None = None
    after: str = RUN_ITSELF


class Recovery(NamedTuple):
    """Seconds from a fault until the work item that waited longest continued."""

    seconds: float
    run_id: int
    after: str
    fault: Fault


class WorkItemHistory(NamedTuple):
    """A work item, the period in which there was something to do, and its progress events in order."""

    run_id: int
    after: str
    since: float
    until: float
    events: list[ProgressEvent]

    def wait(self, fault: float) -> float | None:
        """Return the seconds from a time to its next event or its end. None where there was nothing to do, or the last
        attempt had failed, so that it waited for its retry."""
        if not self.since <= fault < self.until:
            return None
        before = [event for event in self.events if event.when <= fault]
        if before and before[-1].point == ATTEMPT_FAILED:
            return None
        return min((event.when for event in self.events[len(before) :]), default=self.until) - fault


def fault_of(hit: FailpointHit) -> Fault:
    """Return the fault. Only a work-horse has a single current work item; a web process, or a worker with its sweeper,
    may have had more."""
    description = f"{hit.action} at {hit.point}"
    in_a_job = hit.point.split(".")[0] in ("job", "run", "slice", "attempt") and hit.point != "run.enqueued"
    if in_a_job and hit.action != KILL_WITH_PARENT:
        return Fault(hit.when, description, hit.run_id, hit.after)
    return Fault(hit.when, description)


def recoveries(
    faults: Iterable[Fault], runs: Iterable[Mapping[str, Any]], events: list[ProgressEvent], now: float
) -> list[Recovery]:
    """Return for each fault the seconds until its work item continued, sorted; none where nothing waited.

    Where the work item is unknown, all that were unfinished count, and the slowest is returned. A work item continues
    when it is claimed again or committed. So the time covers noticing the fault, waiting for a worker, and that
    worker's start where it was killed too, but not the delay of a retry after an error. What never continued has waited
    until `now`. `runs` are rows with id, created_at and finished_at.
    """
    events_of: dict[int, list[ProgressEvent]] = defaultdict(list)
    for event in sorted(events):
        events_of[event.run_id].append(event)
    items = {
        run["id"]: work_items_of(
            run["id"],
            run["created_at"].timestamp(),
            run["finished_at"].timestamp() if run["finished_at"] else now,
            events_of[run["id"]],
        )
        for run in runs
    }
    all_items = [item for of_run in items.values() for item in of_run]
    found = []
    for fault in faults:
        affected = all_items
        if fault.run_id in items:
            affected = [item for item in items[fault.run_id] if fault.after in (RUN_ITSELF, item.after)]
        waits = [
            Recovery(seconds, item.run_id, item.after, fault)
            for item in affected
            if (seconds := item.wait(fault.when)) is not None
        ]
        if waits:
            found.append(max(waits))
    return sorted(found)


def work_items_of(run_id: int, created: float, finished: float, events: list[ProgressEvent]) -> list[WorkItemHistory]:
    """Return the run itself and its slices. The run is open until it is committed, and its slices from then until each
    is committed. A process may die before it records that: then until the first slice is claimed, or the run is
    finished."""
    by_item: dict[str, list[ProgressEvent]] = defaultdict(list)
    for event in events:
        by_item[event.after].append(event)
    own = by_item.pop(RUN_ITSELF, [])
    ends = [event.when for event in own if event.point == "run.committed"]
    ends += [slice_events[0].when for slice_events in by_item.values()]
    planned = min([*ends, finished])
    return [
        WorkItemHistory(run_id, RUN_ITSELF, created, planned, own),
        *(
            WorkItemHistory(run_id, after, planned, _committed(slice_events, finished), slice_events)
            for after, slice_events in by_item.items()
        ),
    ]


def _committed(events: list[ProgressEvent], finished: float) -> float:
    return min((event.when for event in events if event.point == "slice.committed"), default=finished)
