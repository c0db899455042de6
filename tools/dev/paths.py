"""Where development data lies: `.belfry/`, which stays; in it, directories that end with their command."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.dev import DATA_DIR
from tools.dev.locks import exclusive, let_go, open_lock, try_exclusive
from tools.dev.servers import stop_unused


def data_dir() -> Path:
    """`.belfry/`, made where it is missing. It ignores itself, so that no commit can ever take it along."""
    DATA_DIR.mkdir(mode=0o700, exist_ok=True)
    ignore = DATA_DIR / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    return DATA_DIR


@contextmanager
def temporary_data_dir() -> Iterator[Path]:
    """A data directory for one command: gone at its end, or, if it is killed, at the next command's."""
    lock = data_dir() / "temporary.lock"
    with exclusive(lock):
        _sweep()
        path = Path(tempfile.mkdtemp(prefix="tmp-", dir=DATA_DIR))
        owner = open_lock(path / "owner.lock")
        try_exclusive(owner)  # nobody else has it yet; from here on `_sweep` sees that we are alive
    try:
        yield path
    finally:
        stop_unused(path)
        shutil.rmtree(path, ignore_errors=True)
        let_go(owner)
        os.close(owner)


def sweep() -> None:
    """Stop and remove what killed commands left behind in their temporary data directories."""
    with exclusive(data_dir() / "temporary.lock"):
        _sweep()


def _sweep() -> None:
    for path in DATA_DIR.glob("tmp-*"):
        owner = open_lock(path / "owner.lock")
        try:
            if try_exclusive(owner) and stop_unused(path):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(owner)


def secret_key() -> str:
    """The key of this clone's development sessions, made once; readable by its owner alone."""
    path = data_dir() / "secret-key"
    with exclusive(DATA_DIR / "secret-key.lock"):
        if not path.exists():
            unfinished = DATA_DIR / "secret-key.unfinished"  # never a key that is only half written
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            unfinished.replace(path)
        return path.read_text()
