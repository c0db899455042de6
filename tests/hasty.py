"""`python -m tests.hasty MODULE ARGUMENT...`: `python -m MODULE ARGUMENT...`, in which leases and the silence that is
allowed in a transaction last a twentieth of the time. So a database that takes 0.3 s to answer is a slow one."""

import sys

from belfry.core import db
from belfry.fanout import claims
from chaos.victim import go_on

TWENTIETH = 0.05


def main() -> None:
    db.IDLE_SECONDS *= TWENTIETH
    for name in ("_TAKE_RUN", "_TAKE_SLICE", "_TAKE_TOGETHER"):
        statement = getattr(claims, name)
        assert claims._LEASE in statement
        setattr(claims, name, statement.replace(claims._LEASE, f"{TWENTIETH} * {claims._LEASE}"))
    go_on(sys.argv[1:])


if __name__ == "__main__":
    main()
