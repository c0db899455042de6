"""The limits of connections and streams, which follow from how many files the process may open."""

import resource

from config import settings

CONNECTIONS = 4_000  # that are not streams
OTHER_FILES = 200  # listeners, the database, Redis, logs, static files


def connections_limit() -> int:
    """How many connections that are not streams the process may have: half of the limit, at most CONNECTIONS."""
    return min(CONNECTIONS, (_limit() - OTHER_FILES) // 2)


def streams_limit() -> int:
    """How many streams this process may have: MAX_STREAMS_PER_PROCESS, or fewer where the file limit is lower."""
    return min(settings.max_streams_per_process, _limit() - OTHER_FILES - connections_limit())


def _limit() -> int:
    """Raise the soft limit of open files to what is needed, as far as the hard limit allows; the new limit.

    Most systems begin with a soft limit of 1,024.
    """
    wanted = settings.max_streams_per_process + CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return max(soft, possible)
