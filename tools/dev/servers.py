"""Which PostgreSQL and which Redis a development command works with, and who starts and stops them.

- DATABASE_URL or REDIS_URL set: that server is used, and none of its kind is started.
- Otherwise an embedded one, shared by everyone who names the same data directory: `make web` in one
  terminal and `make worker` in another meet in one database, and the last to leave turns off the light.

Two locks in the data directory see to that. Everyone who uses the servers shares `in-use`; starting and
stopping happens under `start.lock`. Who leaves tries to get `in-use` alone: only the last one can. A killed
process loses its locks, so the next one finds the servers running, uses them, and stops them when it leaves.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.dev import CommandError, postgres, valkey
from tools.dev.locks import exclusive, let_go, open_lock, share, try_exclusive
from tools.dev.scratch_databases import private

__all__ = ["named", "private", "servers", "stop_unused"]

LONGEST_SOCKET = 100  # bytes of a socket's path: 104 are there on macOS, 108 on Linux


def named() -> dict[str, str]:
    """Those of DATABASE_URL and REDIS_URL that the caller's environment has; empty counts as absent."""
    found = {name: os.environ.get(name, "").strip() for name in ("DATABASE_URL", "REDIS_URL")}
    return {name: value for name, value in found.items() if value}


@contextmanager
def servers(data_dir: Path, *, durable: bool = True) -> Iterator[dict[str, str]]:
    """While the block runs, PostgreSQL and Redis do: yields their DATABASE_URL and REDIS_URL.

    The data stays in `data_dir` for the next time. Without `durable` a power cut may cost it, and writing is
    faster. Raises CommandError with a sentence for the terminal where a server cannot be started.
    """
    urls = named()
    if len(urls) == 2:
        yield urls
        return
    data_dir = data_dir.resolve()
    in_use = open_lock(data_dir / "in-use")
    try:
        with exclusive(data_dir / "start.lock"):
            share(in_use)
            sockets = None
            try:
                sockets = _socket_dir(data_dir)
                if "DATABASE_URL" not in urls:
                    urls["DATABASE_URL"] = postgres.start(data_dir, sockets, durable)
                if "REDIS_URL" not in urls:
                    urls["REDIS_URL"] = valkey.start(data_dir, sockets, durable)
            except BaseException:
                _leave(data_dir, in_use, sockets)
                raise
        try:
            yield urls
        finally:
            with exclusive(data_dir / "start.lock"):
                _leave(data_dir, in_use, sockets)
    finally:
        os.close(in_use)


def stop_unused(data_dir: Path) -> bool:
    """Stop servers that nobody uses, which only a killed process leaves behind; False where somebody does."""
    data_dir = data_dir.resolve()
    in_use = open_lock(data_dir / "in-use")
    try:
        with exclusive(data_dir / "start.lock"):
            return _leave(data_dir, in_use, None)
    finally:
        os.close(in_use)


def _leave(data_dir: Path, in_use: int, sockets: Path | None) -> bool:
    """Give up one's share and stop the servers; False where another is left. To be called under `start.lock`.

    `sockets` is known to the process that started them, so that it finds them after `data_dir` is removed.
    """
    let_go(in_use)
    if not try_exclusive(in_use):
        return False
    try:
        sockets = sockets or _recorded_socket_dir(data_dir)
        try:
            valkey.stop(data_dir, sockets)
        finally:
            postgres.stop(data_dir, sockets)
        if sockets is not None:
            shutil.rmtree(sockets, ignore_errors=True)
        (data_dir / "sockets").unlink(missing_ok=True)
    finally:
        let_go(in_use)
    return True


def _recorded_socket_dir(data_dir: Path) -> Path | None:
    """The directory that `_socket_dir` made, or None.

    A temporary directory's name can come back as somebody else's after a restart, and a copied data directory
    names that of the original: so it counts only if it is ours and says that it belongs to this one.
    """
    try:
        path = Path((data_dir / "sockets").read_text())
        ours = path.lstat().st_uid == os.geteuid() and not path.is_symlink()
        return path if ours and (path / "owner").read_text() == str(data_dir) else None
    except OSError:
        return None


def _socket_dir(data_dir: Path) -> Path:
    """A private directory for the sockets, the same for everyone who uses `data_dir`.

    Not inside the clone, whose path may be longer than a socket's may be.
    """
    recorded = _recorded_socket_dir(data_dir)
    if recorded is not None:
        return recorded
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        longest = os.path.join(parent, "belfry-12345678", "pg", postgres.SOCKET)
        if len(os.fsencode(longest)) <= LONGEST_SOCKET and os.access(parent, os.W_OK):
            path = Path(tempfile.mkdtemp(prefix="belfry-", dir=os.path.realpath(parent)))
            (path / "owner").write_text(str(data_dir))
            (data_dir / "sockets").write_text(str(path))
            return path
    raise CommandError("No temporary directory has a path short enough for a socket. Set TMPDIR to one.")
