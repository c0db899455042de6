"""On which port the web process listens."""

import errno
import os
import socket

from tools.dev import CommandError

FIRST_PORT, LAST_PORT = 5000, 5099


def listen() -> socket.socket:
    """A socket that listens on PORT, on this machine alone, or on the first free port from 5000 on.

    It is made here and handed to the web process, so that nothing can take the port in between. Raises
    CommandError where PORT is taken, or none of those ports is free.
    """
    wanted = os.environ.get("PORT", "").strip()
    if not wanted:
        for port in range(FIRST_PORT, LAST_PORT + 1):
            try:
                return _listen(port)
            except OSError:
                continue
        raise CommandError(f"No port from {FIRST_PORT} to {LAST_PORT} is free. Set PORT to one that is.")
    if not wanted.isdecimal() or not 1 <= int(wanted) <= 65535:
        raise CommandError(f"PORT must be between 1 and 65535, and is {wanted!r}.")
    try:
        return _listen(int(wanted))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CommandError(f"PORT {wanted} is taken by another process. Set another, or none.") from None
        raise CommandError(f"PORT {wanted} cannot be listened on: {error.strerror}.") from None


def address_of(listening: socket.socket) -> str:
    """Its address as a browser takes it."""
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def _listen(port: int) -> socket.socket:
    with socket.socket() as probe:
        # Where a process listens on all addresses, some systems let 127.0.0.1 be taken beside it.
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger
        listening.bind(("127.0.0.1", port))
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening
