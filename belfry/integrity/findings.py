"""What the checks of `verify` share: the findings, and how a check is executed.

A check is one SQL statement that returns (check, finding), and no row where everything is right. One statement sees one
snapshot, so changes of a running system cannot look inconsistent, and nothing is locked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from belfry.core.db import db, fetch_all, set_config_sql

SHOWN = 100
"""How many findings of one check are shown; the others are counted."""
TOLERANCE_SECONDS = 60
"""How far two times may contradict each other without a finding: PostgreSQL's now() is the begin of a transaction and
not its commit, and a clock may be set back a little."""
_RESOURCES = {
    "jit": "off",  # compiling takes longer than most of the checks
    "work_mem": "64MB",  # a hash of the members, and of the messages of a partition
    "max_parallel_workers_per_gather": "4",
}


class Finding(NamedTuple):
    """One thing that is wrong, in a sentence, and the name of the check that found it."""

    check: str
    text: str


@dataclass
class Report:
    """The findings of `verify`, and its notes: what it compared, skipped and did not show."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _hidden: dict[str, int] = field(default_factory=dict)

    def add(self, found: list[Finding]) -> None:
        """Add findings; at most SHOWN of one check are kept."""
        for one in found:
            if sum(other.check == one.check for other in self.findings) < SHOWN:
                self.findings.append(one)
            else:
                self._hidden[one.check] = self._hidden.get(one.check, 0) + 1

    def run(self, statement: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Execute the statement of one or more checks, and add its findings."""
        with db.atomic():
            fetch_all(f"SELECT {set_config_sql(_RESOURCES)}")
            found = fetch_all(
                f"""
                SELECT check_name, finding, total
                FROM (
                    SELECT check_name, finding,
                        count(*) OVER (PARTITION BY check_name) AS total,
                        row_number() OVER (PARTITION BY check_name) AS number
                    FROM ({statement}) AS found (check_name, finding)
                ) numbered
                WHERE number <= {SHOWN}
                ORDER BY check_name, number
                """,
                {"tolerance": TOLERANCE_SECONDS, **(parameters or {})},
            )
        self.add([Finding(one["check_name"], one["finding"]) for one in found])
        for name, total in {one["check_name"]: one["total"] for one in found}.items():
            if total > SHOWN:
                self._hidden[name] = self._hidden.get(name, 0) + total - SHOWN

    def finish(self) -> "Report":
        """Note how many findings are not shown."""
        self.notes += [
            f"not shown: {number} more findings of the check '{name}'" for name, number in self._hidden.items()
        ]
        self._hidden.clear()
        return self
