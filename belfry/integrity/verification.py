"""`verify`: check that the stored data is consistent and follows the rules.

The checks need no lock, and each statement sees one snapshot, so they can run at any time. docs/reliability.md lists
what each of them finds, and what none of them can find.
"""

from collections.abc import Callable

from belfry.core.partitions import oldest_retained_message_id
from belfry.integrity import decision_check
from belfry.integrity.decision_check import check_decisions
from belfry.integrity.findings import Report
from belfry.integrity.notification_checks import FAULTS, check_notifications, check_partitions
from belfry.integrity.run_checks import MEMBERS_SQL, MESSAGES_SQL, RUN_CHECKS, RUNS_SQL, SEQUENCES_SQL, WORK_ITEMS_SQL

CHECKS = (
    *RUN_CHECKS,
    "somebody works on what was begun",
    "a run has the slices that it counts",
    "no two slices share a member",
    "the sweeper can find a slice",
    "the slices cover the members who are not processed",
    "a run that succeeded processed every member",
    "every message has its run",
    "the times of a message are in order",
    "a message mentions users who exist",
    "the stream is sent messages that exist",
    "the next id is free",
    "there are partitions ahead",
    "the partitions have no gap",
    "every partition was made by Belfry",
    "no partition is detached",
    "there are the notifications that the runs inserted",
    "there are the notifications that the run decided, by reason",
    "a notification is for a member of the server",
    *FAULTS,
)
"""The names of all checks except that of `--decisions`."""
DECISIONS_CHECK = decision_check.CHECK


def check(*, since: int = 0, decisions: int = 0, on_partition: Callable[[int, int], None] = lambda *_: None) -> Report:
    """Run all checks; the findings and notes.

    Notifications of messages with an id below `since` are not read. `decisions` is the number of the newest runs whose
    decisions are repeated and compared. `on_partition` is called with the progress: (checked partitions, all).
    """
    report, first = Report(), oldest_retained_message_id()
    for statement in (RUNS_SQL, WORK_ITEMS_SQL, MESSAGES_SQL, SEQUENCES_SQL):
        report.run(statement)
    report.run(MEMBERS_SQL, {"kept_from": first})
    check_partitions(report)
    check_notifications(report, since, on_partition)
    if max(first, since) > 1:
        why = "--since" if since > first else "RETENTION_DAYS"
        report.notes.append(f"not checked: the notifications of messages below {max(first, since)} ({why})")
    if decisions:
        check_decisions(report, decisions)
    else:
        report.notes.append("not checked: who should have been notified by the rules (--decisions)")
    return report.finish()


def verify() -> list[str]:
    """The findings of `check`, one sentence each; [] where nothing is wrong."""
    return [finding.text for finding in check().findings]
