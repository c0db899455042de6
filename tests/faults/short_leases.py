"""Run a module with short leases: `python -m tests.faults.short_leases MODULE ARGUMENT...`.

Sweep intervals and the idle time-out of transactions are a twentieth of the real ones. A database that takes 0.3 s
to respond is slow in comparison.
"""

import sys

from belfry.core import db
from belfry.fanout import claims
from tools.chaos.process_under_test import run_module

TWENTIETH = 0.05


def main() -> None:
    db.IDLE_IN_TRANSACTION_SECONDS *= TWENTIETH
    for name in ("_CLAIM_RUN_SQL", "_CLAIM_SLICE_SQL", "_CLAIM_BATCH_SQL"):
        statement = getattr(claims, name)
        assert claims._SWEEP_BACKOFF_SQL in statement
        faster = f"{TWENTIETH} * {claims._SWEEP_BACKOFF_SQL}"
        setattr(claims, name, statement.replace(claims._SWEEP_BACKOFF_SQL, faster))
    run_module(sys.argv[1:])


if __name__ == "__main__":
    main()
