"""A drill: a sweep while there are many idempotency keys that are older than a day."""

import time
from typing import Any

from tools.dev import say
from tools.dev.harness import Harness

KEYS = 10_000_000  # inserting them takes longer than the rest of the drill
BATCH = 1_000_000  # keys that one statement inserts
MEASURED_SECONDS = 120.0  # of the deletion, for its rate


def cleanup(harness: Harness, _: int, __: int) -> dict[str, Any]:
    """A lost run and 10,000,000 old idempotency keys: seconds until the run is queued, and deleted keys a second."""
    import jobs
    from belfry.core.db import execute, fetch_one
    from belfry.queue import queues
    from belfry.worker.supervisor import sweep_once

    run_id = harness.post(harness.create_server(20)["channel_ids"][0])["run"]["id"]
    for first in range(0, KEYS, BATCH):
        say(f"  {first:,} of {KEYS:,} keys")
        execute(
            "INSERT INTO idempotency_key (user_id, key, request_hash, response, created_at)"
            " SELECT %(user_id)s, gen_random_uuid()::text, sha256(n::text::bytea), repeat('x', 100),"
            " now() - interval '3 days' + n * interval '1 millisecond'"
            " FROM generate_series(%(first)s + 1, %(first)s + %(number)s) AS n",
            {"user_id": harness.admin.id, "first": first, "number": BATCH},
        )
    execute("VACUUM (ANALYZE) idempotency_key")
    queues.queue().empty()
    execute("UPDATE run SET sweep_after = now() - interval '1 minute' WHERE id = %(id)s", {"id": run_id})
    began = time.perf_counter()
    swept = sweep_once()
    first_sweep = time.perf_counter() - began
    sweeps = 1
    while time.perf_counter() - began < MEASURED_SECONDS:
        time.sleep(jobs.settings.sweep_interval_seconds)
        sweep_once()
        sweeps += 1
    took = time.perf_counter() - began
    found = fetch_one("SELECT count(*) AS keys FROM idempotency_key")
    deleted = KEYS - (found["keys"] if found else 0)
    execute("TRUNCATE idempotency_key")
    with harness.workers(1):
        harness.wait_for_run(run_id)
    return {
        "keys": KEYS,
        "first_sweep_s": round(first_sweep, 2),
        "lost_runs_enqueued_by_it": swept,
        "sweeps": sweeps,
        "keys_deleted_s": round(deleted / took),
    }
