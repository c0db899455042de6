"""`make chaos`: Belfry under a steady load of posts, edits, deletions, reads and changes of mind, while its processes
are killed at labelled points of the code and at random moments, stopped and let go later, and its Redis and its
PostgreSQL restarted and crashed. Then an audit, against the same oracle as the tests'.

The last line is JSON; the exit code is 1 where anything in it is off. The same --seed makes the same choices; when
they meet what they meet is the machine's.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from belfry.core.failpoints import FAILPOINTS
from tools.chaos.process_under_test import KILL, KILL_WITH_PARENT, STOP
from tools.chaos.recovery import OWN, Blow, blow_of, recoveries
from tools.chaos.stage import WEB, WORKERS, Stage, staged
from tools.dev import CommandError, say
from tools.dev import signals as asked

RECOVERY_SECONDS = 30.0  # the promise: no part waits longer
LAST_ANSWERS_SECONDS = 300.0  # a few requests of one person after each other, each as patient as they are
SETTLE_SECONDS = 90.0  # after the last blow; far more than recovery may take, so that what is lost is seen as lost
STOP_SECONDS = (1.0, 10.0)  # shorter and longer than a hanging process keeps its locks
FAULT_PERCENT = 1  # of the statements that write notifications fail, so that errors are retried as well


class Director:
    """Strikes at points, which the processes themselves write down, and everywhere else, which `blows` holds."""

    def __init__(self, stage: Stage, rng: random.Random) -> None:
        self._stage, self._rng = stage, rng
        self.blows: list[Blow] = []
        self.random_kills = self.outages = 0
        self._halted: list[tuple[float, int]] = []  # until when, and who
        self._deaths_seen = 0

    def kills(self) -> int:
        """How many processes were killed so far."""
        return self.random_kills + sum(death.action != STOP for death in self._stage.deaths())

    def strike(self) -> None:
        """One blow, by chance; the points where nobody died yet come first."""
        self._stage.keep_running()
        self.resume()
        kind = self._rng.choices(
            ("point", "moment", "stop", "redis", "postgresql"), weights=(64, 26, 3, 4, 3)
        )[0]
        getattr(self, f"_{kind}")()

    def _point(self) -> None:
        struck = {death.point for death in self._stage.deaths() if death.action != STOP}
        left = sorted(FAILPOINTS.keys() - struck)
        point = self._rng.choice(left if left and self._rng.random() < 0.5 else sorted(FAILPOINTS))
        action = self._rng.choices((KILL, KILL_WITH_PARENT, STOP), weights=(75, 20, 5))[0]
        self._stage.strike(point, action)

    def _moment(self) -> None:
        """A process, whatever it is doing: one that answers requests, a work-horse, or the one that began them."""
        name = self._rng.choice((WEB, *WORKERS))
        children = self._stage.children_of(name)
        pid = self._rng.choice(children) if children and self._rng.random() < 0.6 else self._stage.main_pid(name)
        time.sleep(self._rng.uniform(0, 0.3))
        if self._stage.send(pid, signal.SIGKILL):
            self._note(f"kill of {name}" if pid == self._stage.main_pid(name) else f"kill of a child of {name}")
            self.random_kills += 1

    def _stop(self) -> None:
        """A worker with its work-horse, as when its machine hangs."""
        name = self._rng.choice(WORKERS)
        for pid in (*self._stage.children_of(name), self._stage.main_pid(name)):
            self._halt(pid)

    def _halt(self, pid: int) -> None:
        if self._stage.send(pid, signal.SIGSTOP):
            self._note("stop of a worker and its work-horse")
            self._halted.append((time.time() + self._rng.uniform(*STOP_SECONDS), pid))

    def resume(self, *, everybody: bool = False) -> None:
        """Let those go on whose time has come, those who stopped at a point as well."""
        deaths = self._stage.deaths()
        for death in deaths[self._deaths_seen :]:
            if death.action == STOP:
                self._halted.append((death.when + self._rng.uniform(*STOP_SECONDS), death.pid))
        self._deaths_seen = len(deaths)
        now = time.time()
        for until, pid in self._halted:
            if everybody or until <= now:
                self._stage.send(pid, signal.SIGCONT)
        self._halted = [] if everybody else [(until, pid) for until, pid in self._halted if until > now]

    def _redis(self) -> None:
        self.outages += 1
        if self._rng.random() < 0.4:
            self._note("Redis emptied")
            self._stage.empty_redis()
        else:
            empty, pause = self._rng.random() < 0.5, self._rng.uniform(0, 4)
            self._note(f"Redis away for {pause:.1f} s, and back {'empty' if empty else 'with what it had'}")
            self._stage.restart_redis(empty=empty, pause=pause)
            self._note("Redis is back")  # what was posted meanwhile waits from here on

    def _postgresql(self) -> None:
        self.outages += 1
        if self._rng.random() < 0.5:
            self._note("PostgreSQL crashed")
            self._stage.crash_postgresql(self._rng)
        else:
            self._note("PostgreSQL restarted")
            self._stage.restart_postgresql()
            self._note("PostgreSQL is back")

    def _note(self, what: str) -> None:
        self.blows.append(Blow(time.time(), what))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="processes to kill (100)")
    parser.add_argument("--minutes", type=float, default=45, help="the most that the killing may take (45)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is left to chance (1)")
    parser.add_argument("--log", type=Path, help="a directory for the logs of the processes, kept only if it is named")
    arguments = parser.parse_args()
    asked.listen()
    try:
        return _play(arguments)
    except asked.Stopped as stopped:
        return 128 + stopped.signum
    except CommandError as error:
        say(str(error))
        return 1


def _play(arguments: argparse.Namespace) -> int:
    say(f"Starting PostgreSQL and Redis (seed {arguments.seed}) …")
    with staged() as stage:
        from belfry.core.db import fetch_all  # these read the environment that was just made
        from tools.chaos.audit import audit
        from tools.chaos.load import Load
        from tools.chaos.world import make_world

        world = make_world()
        _break_now_and_then(FAULT_PERCENT)
        stage.keep_running()
        stage.wait_until_ready()
        load = Load(world, stage.address, arguments.seed)
        load.start()
        director = Director(stage, random.Random(arguments.seed))
        try:
            _strike(stage, director, arguments)
        finally:
            director.resume(everybody=True)
            load.ask_to_stop()
        _wait_for(load.at_work, stage)
        _reach_database()
        _break_now_and_then(0)
        say("Settling …")
        _settle(stage)
        settled = time.time()
        findings = audit(world, load.diary, stage.address)
        deaths = stage.deaths()
        blows = [*director.blows, *map(blow_of, deaths)]
        runs = fetch_all("SELECT id, created_at, finished_at FROM run")
        recovered = recoveries(blows, runs, stage.signs_of_life(), settled)
        waits = [recovery.seconds for recovery in recovered]
        for finding in findings.all()[:50]:
            say(f"  {finding}")
        _notify_what_happened(stage, director)
        say(
            f"  {findings.predicted:,} decisions could be predicted exactly,"
            f" {findings.allowed_for:,} within what may have counted; the longest recoveries:"
        )
        for recovery in recovered[-5:]:
            part = f"run {recovery.run_id}" + (f" after {recovery.after}" if recovery.after != OWN else "")
            say(f"  {recovery.seconds:.1f} s until {part} went on after: {recovery.blow.what}")
        if arguments.log:
            _keep_logs(stage, arguments.log)
        result = {
            "posts": len(load.diary.posted),
            "kills": director.kills(),
            "points_covered": len({death.point for death in deaths if death.action != STOP}),
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
    return 0 if ends_well(findings.all(), waits) else 1


def ends_well(findings: list[str], waits: list[float]) -> bool:
    """Whether what was promised was kept."""
    return not findings and max(waits, default=0.0) < RECOVERY_SECONDS


def _strike(stage: Stage, director: Director, arguments: argparse.Namespace) -> None:
    end, shown = time.monotonic() + arguments.minutes * 60, 0.0
    while time.monotonic() < end:
        asked.check()
        kills = director.kills()
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            say(f"  {kills} of {arguments.kills} kills")
        if kills >= arguments.kills:
            return
        director.strike()
    say("The time is up.")


def _wait_for(at_work: Callable[[], list[str]], stage: Stage) -> None:
    """Until everybody has the answers that they wait for; Belfry is kept running meanwhile."""
    give_up = time.monotonic() + LAST_ANSWERS_SECONDS
    while waiting := at_work():
        if time.monotonic() > give_up:
            raise CommandError(f"They still wait for answers: {', '.join(waiting)}")
        stage.keep_running()
        asked.sleep(0.2)


def _reach_database() -> None:
    """The harness's own connection, which PostgreSQL's crashes broke as well, is made anew."""
    from belfry.core.db import db

    give_up = time.monotonic() + 60
    while True:
        db.close_all()
        try:
            db.connect()
            db.execute_sql("SELECT 1")
            return
        except Exception:
            if time.monotonic() > give_up:
                raise
            asked.sleep(0.2)


def _break_now_and_then(percent: int) -> None:
    """Have so many of the statements that write notifications fail by themselves."""
    from belfry.core.db import execute

    execute("DROP TRIGGER IF EXISTS chaos_fault ON notification")
    if percent:
        execute(
            "CREATE OR REPLACE FUNCTION chaos_fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF random() < {percent / 100} THEN RAISE EXCEPTION 'a fault that passes'; END IF;"
            " RETURN NULL; END $$"
        )
        execute(
            "CREATE TRIGGER chaos_fault BEFORE INSERT ON notification"
            " FOR EACH STATEMENT EXECUTE FUNCTION chaos_fault()"
        )


def _settle(stage: Stage) -> None:
    """Until every run is finished, or long enough to know that it never will be."""
    from belfry.fanout.runs import count_unfinished

    give_up = time.monotonic() + SETTLE_SECONDS
    stage.keep_running()
    stage.wait_until_ready()
    while time.monotonic() < give_up:
        states = count_unfinished()["states"]
        if not states["pending"] + states["queued"] + states["running"]:
            return
        stage.keep_running()
        asked.sleep(0.2)


def _notify_what_happened(stage: Stage, director: Director) -> None:
    stopped = sum(death.action == STOP for death in stage.deaths())
    killed = Counter(death.point for death in stage.deaths() if death.action != STOP)
    say(f"  {director.random_kills} kills at random moments, {director.outages} blows to the servers,")
    say(f"  {stopped} processes stopped at points, {stage.restarts} started again; kills at points:")
    for point, about in FAILPOINTS.items():
        say(f"  {killed[point]:>5}  {point:18} {about}")


def _keep_logs(stage: Stage, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in stage.directory.iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
