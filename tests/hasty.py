"""`python -m tests.hasty MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which leases and the silence that is
allowed in a transaction last a twentieth of the time. So a database that takes 0.3 s to answer is a slow one."""

import sys

from belfry import leases
from belfry.core import db
from chaos.victim import go_on

TWENTIETH = 0.05


def main() -> None:
    db.IDLE_SECONDS *= TWENTIETH
    for name in ("_TAKE_RUN", "_TAKE_SLICE", "_TAKE_TOGETHER"):
        statement = getattr(leases, name)
        assert leases._LEASE in statement
        setattr(leases, name, statement.replace(leases._LEASE, f"{TWENTIETH} * {leases._LEASE}"))
    go_on(sys.argv[1:])


if __name__ == "__main__":
    main()
