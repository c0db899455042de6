"""`make chaos`: Belfry under a steady load of posts, edits, deletions, reads and new preferences, while its processes
are killed at failpoints and at random moments, or stopped for some seconds, and Redis and PostgreSQL are restarted and
crashed. Then an audit with the tests' oracle.

The last line is JSON; the exit code is 1 where the audit found an error or a recovery took too long. The same --seed
makes the same choices; their timing depends on the machine.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from belfry.core.failpoints import FAILPOINTS
from tools.chaos.harness import WEB, WORKERS, ChaosHarness
from tools.chaos.process_under_test import KILL, KILL_WITH_PARENT, STOP
from tools.chaos.recovery import RUN_ITSELF, Fault, Recovery, fault_of, recoveries
from tools.dev import say, signals

if TYPE_CHECKING:
    from tools.chaos.load import Load  # imports what reads the environment

RECOVERY_SECONDS = 30.0  # the guarantee: no work item waits longer
LAST_REQUESTS_SECONDS = 300.0  # a thread may have several requests left, each with its retries
SETTLE_SECONDS = 90.0  # after the last fault; far more than a recovery may take, so that lost work is seen as lost
STOP_SECONDS = (1.0, 10.0)  # shorter and longer than the idle time-out after which locks are released
FAULT_PERCENT = 1  # of the statements that write notifications fail, so that errors are retried as well


class FaultInjector:
    """Injects faults by chance. `faults` has those that the processes did not record at a failpoint themselves."""

    def __init__(self, harness: ChaosHarness, rng: random.Random) -> None:
        self._harness, self._rng = harness, rng
        self.faults: list[Fault] = []
        self.random_kills = self.server_faults = 0
        self._stopped: list[tuple[float, int]] = []  # (time to continue, pid)
        self._hits_seen = 0

    def kills(self) -> int:
        """Return how many processes were killed so far."""
        return self.random_kills + sum(hit.action != STOP for hit in self._harness.failpoint_hits())

    def inject(self) -> None:
        """Inject one fault."""
        self._harness.keep_running()
        self.resume_stopped()
        kinds = (self._at_failpoint, self._at_random_moment, self._stop_worker, self._redis, self._postgresql)
        self._rng.choices(kinds, weights=(64, 26, 3, 4, 3))[0]()

    def _at_failpoint(self) -> None:
        """Half of the time at a failpoint where no process was killed yet."""
        covered = {hit.point for hit in self._harness.failpoint_hits() if hit.action != STOP}
        left = sorted(FAILPOINTS.keys() - covered)
        point = self._rng.choice(left if left and self._rng.random() < 0.5 else sorted(FAILPOINTS))
        action = self._rng.choices((KILL, KILL_WITH_PARENT, STOP), weights=(75, 20, 5))[0]
        self._harness.arm(point, action)

    def _at_random_moment(self) -> None:
        """Kill a main process, or a child of it."""
        name = self._rng.choice((WEB, *WORKERS))
        children, main_pid = self._harness.children_of(name), self._harness.main_pid(name)
        pid = self._rng.choice(children) if children and self._rng.random() < 0.6 else main_pid
        time.sleep(self._rng.uniform(0, 0.3))
        if self._harness.send_signal(pid, signal.SIGKILL):
            self._record(f"kill of {name}" if pid == main_pid else f"kill of a child of {name}")
            self.random_kills += 1

    def _stop_worker(self) -> None:
        """Stop a worker and its work-horse, as when its machine hangs."""
        name = self._rng.choice(WORKERS)
        for pid in (*self._harness.children_of(name), self._harness.main_pid(name)):
            if self._harness.send_signal(pid, signal.SIGSTOP):
                self._record("stop of a worker and its work-horse")
                self._stopped.append((time.time() + self._rng.uniform(*STOP_SECONDS), pid))

    def resume_stopped(self, *, at_once: bool = False) -> None:
        """Continue the processes that were stopped long enough, or all of them."""
        hits = self._harness.failpoint_hits()
        for hit in hits[self._hits_seen :]:
            if hit.action == STOP:
                self._stopped.append((hit.when + self._rng.uniform(*STOP_SECONDS), hit.pid))
        self._hits_seen = len(hits)
        now = time.time()
        for until, pid in self._stopped:
            if at_once or until <= now:
                self._harness.send_signal(pid, signal.SIGCONT)
        self._stopped = [] if at_once else [(until, pid) for until, pid in self._stopped if until > now]

    def _redis(self) -> None:
        self.server_faults += 1
        if self._rng.random() < 0.4:
            self._record("Redis emptied")
            self._harness.empty_redis()
        else:
            empty, pause = self._rng.random() < 0.5, self._rng.uniform(0, 4)
            self._record(f"Redis stopped for {pause:.1f} s, restarted {'empty' if empty else 'with its data'}")
            self._harness.stop_redis()
            time.sleep(pause)
            self._harness.start_redis(empty=empty)
            self._record("Redis is back")  # for what was posted meanwhile, the time counts from here

    def _postgresql(self) -> None:
        self.server_faults += 1
        if self._rng.random() < 0.5:
            self._record("PostgreSQL crashed")
            self._harness.crash_postgresql(self._rng)
        else:
            self._record("PostgreSQL restarted")
            self._harness.restart_postgresql()
            self._record("PostgreSQL is back")

    def _record(self, description: str) -> None:
        self.faults.append(Fault(time.time(), description))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="processes to kill (%(default)s)")
    parser.add_argument("--minutes", type=float, default=45, help="longest time for the kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (%(default)s)")
    parser.add_argument("--log", type=Path, help="directory for the logs of the processes; without it they are deleted")
    arguments = parser.parse_args()
    return signals.exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    say(f"Starting PostgreSQL and Redis (seed {arguments.seed}) …")
    with ChaosHarness.create() as harness:
        from belfry.core.db import fetch_all
        from tools.chaos.audit import audit
        from tools.chaos.load import Load
        from tools.chaos.world import make_world

        world = make_world()
        _fail_statements(FAULT_PERCENT)
        harness.keep_running()
        harness.wait_until_ready()
        load = Load(world, harness.address, arguments.seed)
        load.start()
        injector = FaultInjector(harness, random.Random(arguments.seed))
        try:
            _inject_faults(harness, injector, arguments)
        finally:
            injector.resume_stopped(at_once=True)
            load.stop()
        _wait_for_load(load, harness)
        _reconnect()
        _fail_statements(0)
        say("Waiting for the runs to finish …")
        _settle(harness)
        settled = time.time()
        findings = audit(world, load.history, harness.address)
        hits = harness.failpoint_hits()
        runs = fetch_all("SELECT id, created_at, finished_at FROM run")
        faults = [*injector.faults, *map(fault_of, hits)]
        recovered = recoveries(faults, runs, harness.progress_events(), settled)
        waits = [recovery.seconds for recovery in recovered]
        for finding in findings.all()[:50]:
            say(f"  {finding}")
        _report_faults(harness, injector)
        say(
            f"  {findings.predicted:,} decisions were predicted exactly, {findings.ambiguous:,} may be one of several,"
            " because a setting changed meanwhile."
        )
        _report_recoveries(recovered[-5:])
        if arguments.log:
            _keep_logs(harness, arguments.log)
        result = {
            "posts": len(load.history.posted),
            "kills": injector.kills(),
            "points_covered": len({hit.point for hit in hits if hit.action != STOP}),
            "missing": len(findings.missing),
            "duplicates": len(findings.duplicates),
            "wrong_decision": len(findings.wrong_decision),
            "unresolved_runs": len(findings.unresolved_runs),
            "recovery_s": {
                "p50": round(statistics.median(waits), 2) if waits else None,
                "max": round(max(waits), 2) if waits else None,
            },
        }
    say(json.dumps(result))
    return 0 if has_passed(findings.all(), waits) else 1


def has_passed(findings: list[str], waits: list[float]) -> bool:
    """Whether the audit found nothing and every recovery took less than RECOVERY_SECONDS."""
    return not findings and max(waits, default=0.0) < RECOVERY_SECONDS


def _inject_faults(harness: ChaosHarness, injector: FaultInjector, arguments: argparse.Namespace) -> None:
    end, shown = time.monotonic() + arguments.minutes * 60, 0.0
    while time.monotonic() < end:
        signals.check()
        kills = injector.kills()
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            say(f"  {kills} of {arguments.kills} kills")
        if kills >= arguments.kills:
            return
        injector.inject()
    say(f"Stopped after {arguments.minutes:g} minutes.")


def _wait_for_load(load: "Load", harness: ChaosHarness) -> None:
    """Wait until every thread of the load has ended; meanwhile Belfry's processes are kept running."""

    def has_ended() -> bool:
        harness.keep_running()
        return not load.running_threads()

    signals.wait_until(has_ended, "the last requests of the load", LAST_REQUESTS_SECONDS, 0.2)


def _reconnect() -> None:
    """Replace the database connection of this process, which crashes of PostgreSQL have broken."""
    from peewee import PeeweeException
    from psycopg import Error

    from belfry.core.db import db

    def can_connect() -> bool:
        db.close_all()
        try:
            db.connect()
            db.execute_sql("SELECT 1")
        except (PeeweeException, Error):
            return False
        return True

    signals.wait_until(can_connect, "PostgreSQL", 60, 0.2)


def _fail_statements(percent: int) -> None:
    """Make so many percent of the statements that insert notifications fail."""
    from belfry.core.db import execute

    execute("DROP TRIGGER IF EXISTS chaos_fault ON notification")
    if percent:
        execute(
            "CREATE OR REPLACE FUNCTION chaos_fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF random() < {percent / 100} THEN RAISE EXCEPTION 'a temporary fault'; END IF;"
            " RETURN NULL; END $$"
        )
        execute(
            "CREATE TRIGGER chaos_fault BEFORE INSERT ON notification"
            " FOR EACH STATEMENT EXECUTE FUNCTION chaos_fault()"
        )


def _settle(harness: ChaosHarness) -> None:
    """Wait until every run is finished, or long enough to know that it never will be."""
    from belfry.fanout.runs import count_unfinished

    deadline = time.monotonic() + SETTLE_SECONDS
    harness.keep_running()
    harness.wait_until_ready()
    while time.monotonic() < deadline:
        states = count_unfinished()["states"]
        if not states["pending"] + states["queued"] + states["running"]:
            return
        harness.keep_running()
        signals.sleep(0.2)


def _report_faults(harness: ChaosHarness, injector: FaultInjector) -> None:
    hits = harness.failpoint_hits()
    stopped = sum(hit.action == STOP for hit in hits)
    killed = Counter(hit.point for hit in hits if hit.action != STOP)
    say(f"  {injector.random_kills} kills at random moments, {injector.server_faults} faults of Redis and PostgreSQL,")
    say(f"  {stopped} stops at failpoints, {harness.restarts} restarts of processes; kills at failpoints:")
    for point, description in FAILPOINTS.items():
        say(f"  {killed[point]:>5}  {point:18} {description}")


def _report_recoveries(slowest: list[Recovery]) -> None:
    say("  The longest recoveries:")
    for recovery in slowest:
        item = f"run {recovery.run_id}" + (f" after {recovery.after}" if recovery.after != RUN_ITSELF else "")
        say(f"  {recovery.seconds:.1f} s until {item} continued after: {recovery.fault.description}")


def _keep_logs(harness: ChaosHarness, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in harness.logs.iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
