"""The servers that development commands start: shared, found again, and stopped by the last user.

Without DATABASE_URL and REDIS_URL they are PostgreSQL and Valkey out of a wheel. Each test starts its own.
"""

import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tools.dev import ROOT, CommandError, ports, processes
from tools.dev.__main__ import main
from tools.dev.processes import end, has_ended, process_of
from tools.dev.scratch_databases import private
from tools.dev.servers import servers, stop_unused

pytestmark = pytest.mark.slow

embedded = pytest.mark.skipif(
    os.environ.get("BELFRY_TEST_EXTERNAL") == "1",
    reason="embedded servers are not used when DATABASE_URL is set",
)


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data directory. Servers that a failed test leaves there are stopped."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    directory = tmp_path / "data"
    yield directory
    stop_unused(directory)


@pytest.fixture
def start_user() -> Iterator[Callable[[Path], "subprocess.Popen[str]"]]:
    """Start another process that uses the servers of a directory until its standard input is closed."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from tools.dev.servers import servers
        with servers(Path(sys.argv[1]), durable=False):
            print("ready", flush=True)
            sys.stdin.read()
    """)
    started = []

    def start(directory: Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def stop_using(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


def pids(urls: dict[str, str]) -> tuple[int, int]:
    """The process ids of both servers, as the servers report them."""
    socket_dir = Path(str(conninfo_to_dict(urls["DATABASE_URL"])["host"]))
    postmaster = int((socket_dir / ".s.PGSQL.5432.lock").read_text().split("\n")[0])
    with closing(redis.Redis.from_url(urls["REDIS_URL"])) as client:
        return postmaster, int(client.info("server")["process_id"])


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and not has_ended(psutil.Process(pid))


def servers_respond(urls: dict[str, str]) -> bool:
    client = redis.Redis.from_url(urls["REDIS_URL"])
    with psycopg.connect(urls["DATABASE_URL"]) as connection, closing(client):
        return connection.execute("SELECT 1").fetchone() == (1,) and bool(client.ping())


@embedded
def test_data_is_kept_between_runs(data_dir: Path) -> None:
    with servers(data_dir, durable=False) as urls:
        with psycopg.connect(urls["DATABASE_URL"]) as connection:
            connection.execute("CREATE TABLE kept (id int)")
        with closing(redis.Redis.from_url(urls["REDIS_URL"])) as client:
            client.set("kept", 1)
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("port") == {"port": "0"}
        first = pids(urls)
    assert not any(is_running(pid) for pid in first)
    assert not Path(str(conninfo_to_dict(urls["DATABASE_URL"])["host"])).parent.exists()
    with servers(data_dir, durable=False) as urls:
        with psycopg.connect(urls["DATABASE_URL"]) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
        with closing(redis.Redis.from_url(urls["REDIS_URL"])) as client:
            assert client.get("kept") == b"1"


def without_password(urls: dict[str, str], **changed: str) -> dict[str, str]:
    return {**conninfo_to_dict(urls["DATABASE_URL"]), "password": "", "passfile": "/dev/null", **changed}


@embedded
def test_servers_need_a_password_that_only_the_owner_can_read(data_dir: Path) -> None:
    with servers(data_dir, durable=False) as urls:
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(**without_password(urls))
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(**without_password(urls, password="postgres"))
        with psycopg.connect(urls["DATABASE_URL"]) as connection:
            rules = connection.execute("SELECT DISTINCT auth_method, error FROM pg_hba_file_rules").fetchall()
        assert rules == [("scram-sha-256", None)]
        secret = data_dir / "postgresql-password"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert secret.stat().st_uid == os.geteuid()
        password = conninfo_to_dict(urls["DATABASE_URL"])["password"]
        assert secret.read_text() == password
        with closing(redis.Redis.from_url(urls["REDIS_URL"])) as client:
            redis_socket = Path(str(client.connection_pool.connection_kwargs["path"]))
        assert stat.S_IMODE(redis_socket.stat().st_mode) == 0o700
        for log in data_dir.glob("*.log"):
            assert password not in log.read_text()
            assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert not [process for process in psutil.process_iter(["cmdline"]) if password in str(process.info)]


@embedded
@pytest.mark.skipif(os.geteuid() != 0, reason="only for root do the servers run as another account")
def test_another_process_of_the_servers_account_is_refused(data_dir: Path) -> None:
    program = textwrap.dedent("""
        import os, pwd, sys, psycopg, redis
        attempts = (
            lambda: psycopg.connect(sys.argv[1]),
            lambda: open(sys.argv[2]).read(),
            lambda: redis.Redis.from_url(sys.argv[3]).ping(),
        )
        def result_of(attempt):
            try:
                attempt()
            except Exception as error:
                return type(error).__name__
            return "accepted"
        as_owner = [result_of(attempt) for attempt in attempts]  # all lazy imports are done
        account = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        print(*as_owner, *(result_of(attempt) for attempt in attempts), sep="\\n")
    """)
    with servers(data_dir, durable=False) as urls:
        conninfo = make_conninfo(**without_password(urls))
        arguments = [conninfo, str(data_dir / "postgresql-password"), urls["REDIS_URL"]]
        command = [sys.executable, "-c", program, *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    as_owner, as_nobody = ["OperationalError", "accepted", "accepted"], ["OperationalError", "PermissionError"]
    assert output.splitlines() == [*as_owner, *as_nobody, "ConnectionError"]


@embedded
def test_data_without_a_password_is_kept_and_gets_one(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with servers(data_dir, durable=False) as urls, psycopg.connect(urls["DATABASE_URL"]) as connection:
        connection.execute("CREATE TABLE kept (id int)")
        connection.execute("ALTER ROLE postgres PASSWORD NULL")
    (data_dir / "postgresql-password").unlink()
    (data_dir / "postgresql-18" / "pg_hba.conf").write_text("local all all trust\n")
    assert capsys.readouterr().out == ""
    with servers(data_dir, durable=False) as urls:
        assert "The embedded PostgreSQL gets a password; its data stays." in capsys.readouterr().out
        with psycopg.connect(urls["DATABASE_URL"]) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(**without_password(urls))


def test_logs_are_readable_only_by_the_owner(tmp_path: Path) -> None:
    log = tmp_path / "web.log"
    log.write_text("before\n")
    log.chmod(0o644)
    with processes.running("printer", ["-c", "print('after')"], os.environ, log=log) as child:
        child.process.wait()
    assert log.read_text() == "before\nafter\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_files_of_development_commands_are_readable_only_by_the_owner() -> None:
    before = os.umask(0o022)
    try:
        assert main(["run", "away"]) == 2
        assert os.umask(0o022) == 0o077
    finally:
        os.umask(before)


@embedded
def test_two_processes_share_servers_and_the_last_one_stops_them(
    data_dir: Path, start_user: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    other = start_user(data_dir)
    with servers(data_dir, durable=False) as urls:
        shared = pids(urls)
        stop_using(other)
        assert servers_respond(urls)
        third = start_user(data_dir)
        assert not stop_unused(data_dir)
    assert all(is_running(pid) for pid in shared)
    assert pids(urls) == shared
    stop_using(third)
    assert not any(is_running(pid) for pid in shared)


@embedded
def test_servers_of_a_killed_user_are_used_again_and_stopped(
    data_dir: Path, start_user: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    killed = start_user(data_dir)
    killed.kill()
    killed.wait()
    remaining = process_of([data_dir / "redis.pid"], data_dir / "redis.log")
    assert remaining is not None
    with servers(data_dir, durable=False) as urls:
        found = pids(urls)
        assert found[1] == remaining.pid
        assert servers_respond(urls)
    assert not any(is_running(pid) for pid in found)


@embedded
def test_servers_start_after_a_crash_of_the_machine(data_dir: Path) -> None:
    with servers(data_dir, durable=False) as urls:
        for pid in pids(urls):
            end(psutil.Process(pid), (signal.SIGKILL, 10))
    # The process ids in the files now belong to other processes.
    (data_dir / "redis.pid").write_text(f"{os.getpid()}\n")
    pid_file = data_dir / "postgresql-18" / "postmaster.pid"
    pid_file.write_text(pid_file.read_text().replace(pid_file.read_text().split("\n")[0], str(os.getpid()), 1))
    with servers(data_dir, durable=False) as urls:
        assert servers_respond(urls)
    assert is_running(os.getpid())


@embedded
def test_emptied_directories_leave_no_server_behind(data_dir: Path) -> None:
    with servers(data_dir, durable=False) as urls:
        running = pids(urls)
        Path(data_dir / "redis.pid").unlink()
        Path(data_dir / "sockets").unlink()
        Path(data_dir / "postgresql-18" / "postmaster.pid").unlink()
    assert not any(is_running(pid) for pid in running)


@embedded
def test_long_paths_and_paths_with_spaces_work(data_dir: Path) -> None:
    directory = data_dir / ("a clone, " + "deep " * 20) / ("down " * 20 + "it's") / "data"
    with servers(directory, durable=False) as urls:
        assert servers_respond(urls)


@embedded
def test_a_copied_directory_has_servers_of_its_own(data_dir: Path) -> None:
    copy = data_dir.with_name("copy")
    with servers(data_dir, durable=False) as urls:
        copy.mkdir()
        (copy / "sockets").write_text((data_dir / "sockets").read_text())
        with servers(copy, durable=False) as others:
            assert set(pids(urls)).isdisjoint(pids(others))
        assert servers_respond(urls)


@embedded
def test_only_servers_without_a_url_are_started(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://somebody@elsewhere/belfry")
    with servers(data_dir, durable=False) as urls:
        assert urls["DATABASE_URL"] == "postgresql://somebody@elsewhere/belfry"
        assert not list(data_dir.glob("postgresql*"))
        with closing(redis.Redis.from_url(urls["REDIS_URL"])) as client:
            assert client.ping()


def test_no_server_is_started_where_both_urls_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"DATABASE_URL": "postgresql://somebody@elsewhere/belfry", "REDIS_URL": "redis://elsewhere/3"}
    for name, url in named.items():
        monkeypatch.setenv(name, url)
    with servers(tmp_path / "data") as urls:
        assert urls == named
    assert not (tmp_path / "data").exists()


@embedded
def test_a_failed_start_says_why_and_leaves_no_process(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir.mkdir()
    (data_dir / "redis.log").mkdir()  # the log cannot be written
    with pytest.raises(CommandError, match="Redis"), servers(data_dir, durable=False):
        pass
    assert process_of([data_dir / "postgresql-18" / "postmaster.pid"], data_dir / "postgresql-18") is None
    assert not (data_dir / "sockets").exists()


@pytest.fixture
def named_servers() -> dict[str, str]:
    """URLs of this test run's own databases, used as named servers whose other databases must not change."""
    return {name: os.environ[name] for name in ("DATABASE_URL", "REDIS_URL")}


def test_private_databases_are_empty_and_deleted_afterwards(named_servers: dict[str, str]) -> None:
    names = "SELECT datname FROM pg_database WHERE datname LIKE 'belfry_trial_%'"
    with closing(redis.Redis.from_url(named_servers["REDIS_URL"])) as named:
        named.set("belongs to somebody", 1)
        with psycopg.connect(named_servers["DATABASE_URL"], autocommit=True) as connection:
            with private(named_servers, "trial") as first, private(named_servers, "trial") as second:
                assert len({env["DATABASE_URL"] for env in (named_servers, first, second)}) == 3
                assert len({env["REDIS_URL"] for env in (named_servers, first, second)}) == 3
                assert len(connection.execute(names).fetchall()) == 2
                with closing(redis.Redis.from_url(first["REDIS_URL"])) as client:
                    client.flushdb()  # as a test run does, which deletes the marker; the database is still in use
                    with private(named_servers, "trial") as third:
                        assert third["REDIS_URL"] not in (first["REDIS_URL"], second["REDIS_URL"])
                    client.set("left behind", 1)
                leftover = psycopg.connect(first["DATABASE_URL"])
            leftover.close()
            assert connection.execute(names).fetchall() == []
        with closing(redis.Redis.from_url(first["REDIS_URL"])) as client:
            assert client.dbsize() == 0
        assert named.get("belongs to somebody") == b"1"
        named.delete("belongs to somebody")


def test_private_databases_are_deleted_after_a_failure(named_servers: dict[str, str]) -> None:
    with pytest.raises(RuntimeError), private(named_servers, "trial") as own:
        raise RuntimeError
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(own["DATABASE_URL"])


@embedded
def test_without_an_empty_redis_database_the_error_says_so(data_dir: Path) -> None:
    with servers(data_dir, durable=False) as urls:
        for number in range(16):
            with closing(redis.Redis.from_url(urls["REDIS_URL"].replace("db=0", f"db={number}"))) as client:
                client.set("taken", number)
        with pytest.raises(CommandError, match="none of that server's databases 1 to 15"), private(urls, "trial"):
            pass
        with psycopg.connect(urls["DATABASE_URL"]) as connection:
            databases = connection.execute("SELECT count(*) FROM pg_database WHERE datname LIKE 'belfry_trial%'")
            assert databases.fetchone() == (0,)


def test_a_port_in_use_is_an_error_if_given_and_skipped_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORT", raising=False)
    with ports.listen() as first:
        taken = first.getsockname()[1]
        with ports.listen() as second:
            assert second.getsockname()[1] != taken
        monkeypatch.setenv("PORT", str(taken))
        with pytest.raises(CommandError, match=f"PORT {taken} is taken"):
            ports.listen()
    monkeypatch.setenv("PORT", "many")
    with pytest.raises(CommandError, match="PORT must be"):
        ports.listen()
