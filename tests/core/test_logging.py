"""Logs as text or as JSON, with the ids of the request, the run and the job on every line."""

import json
import logging
import re
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from belfry.core import logging_setup
from tests.processes import wait_until, web_process_with_log


@pytest.fixture
def _restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("_restored")
def test_json_lines_contain_the_ids_of_the_context(capsys):
    logging_setup.configure("INFO", "json")
    with logging_setup.context(run_id=7, job_id="abc"), logging_setup.context(request_id=None):
        logging.getLogger("somewhere").info("done in %s ms — ✓", 3)
    logging.getLogger("somewhere").info("later")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["message"], first["run_id"], first["job_id"]) == ("done in 3 ms — ✓", 7, "abc")
    assert first["level"] == "INFO"
    assert first["time"].endswith("Z")
    assert "request_id" not in first
    assert "run_id" not in second


@pytest.mark.usefixtures("_restored")
def test_an_exception_is_logged_as_one_line_of_json(capsys):
    logging_setup.configure("INFO", "json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("somewhere").exception("it broke")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ValueError: two\nlines" in json.loads(lines[0])["exception"]


@pytest.mark.usefixtures("_restored")
def test_text_lines_contain_the_ids_of_the_context(capsys):
    logging_setup.configure("INFO", "text")
    with logging_setup.context(run_id=7):
        logging.getLogger("somewhere").info("done")
    assert capsys.readouterr().err.rstrip().endswith("INFO somewhere: done run_id=7")


def request_id(client, header):
    return client.get("/healthz", headers={"X-Request-Id": header}).headers["X-Request-Id"]


def test_a_response_has_the_request_id_of_the_proxy_or_a_new_one(client, caplog):
    with caplog.at_level(logging.INFO):
        own = client.get("/healthz").headers["X-Request-Id"]
        assert client.get("/healthz").headers["X-Request-Id"] != own
        assert request_id(client, "proxy-12345678") == "proxy-12345678"
        assert len(request_id(client, "x y\tz" * 3)) == 32
    assert any(record.getMessage().startswith("GET /healthz 200 in ") for record in caplog.records)


HOSTILE = (
    "\n2026-11-26 09:00:00,000 CRITICAL root: all is lost\r\x1b[31m\x00\t\x7f\x85\x9b2J"
    "\u2028\u2029\u202e\u2066\ud800"
)
ESCAPED = (
    r"\n2026-11-26 09:00:00,000 CRITICAL root: all is lost\r\x1b[31m\x00\t\x7f\x85\x9b2J"
    r"\u2028\u2029\u202e\u2066\ud800"
)


@pytest.mark.usefixtures("_restored")
def test_text_lines_escape_line_breaks_and_terminal_controls(capsys):
    logging_setup.configure("INFO", "text")
    with logging_setup.context(job_id=f"id{HOSTILE}"):
        logging.getLogger("somewhere").info("GET %s is Größe ✓", HOSTILE)
    [line] = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert line.endswith(f"INFO somewhere: GET {ESCAPED} is Größe ✓ job_id=id{ESCAPED}")


@pytest.mark.usefixtures("_restored")
def test_the_lines_of_a_traceback_are_indented_and_escaped(capsys):
    logging_setup.configure("INFO", "text")
    somewhere = logging.getLogger("somewhere")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        somewhere.exception("it broke", stack_info=True)
    somewhere.error("job %s raised\n%s", HOSTILE, f"Traceback:\n  ValueError: {HOSTILE}")  # as RQ does
    lines = capsys.readouterr().err.removesuffix("\n").split("\n")
    [first, second] = [line for line in lines if not line.startswith("    ")]
    assert first.endswith("ERROR somewhere: it broke")
    assert second.endswith(f"ERROR somewhere: job {ESCAPED} raised")
    assert "    Traceback (most recent call last):" in lines
    assert "    Stack (most recent call last):" in lines
    assert lines[-3:-1] == ["    Traceback:", "      ValueError: "]
    assert lines[-1] == "    " + ESCAPED.removeprefix(r"\n")


@pytest.mark.usefixtures("_restored")
def test_json_lines_are_printable_and_keep_the_original_text(capsys):
    logging_setup.configure("INFO", "json")
    logging.getLogger("somewhere").info("GET %s", HOSTILE)
    printed = capsys.readouterr().err.removesuffix("\n")
    assert printed.isprintable()
    assert json.loads(printed)["message"] == f"GET {HOSTILE}"


@pytest.mark.parametrize("access_log", [False, True])
def test_a_request_cannot_inject_a_line_into_the_log_of_the_web_process(access_log):
    hostile = "/x%0a2026-11-26%2009:00:00,000%20CRITICAL%20root:%20all%20is%20lost%1b%5b31m%c2%9b2J%e2%80%a8%e2%80%ae"
    options = {"GUNICORN_CMD_ARGS": "--access-logfile -"} if access_log else {}
    with web_process_with_log(LOG_FORMAT="text", **options) as (address, process):
        request = urllib.request.Request(address + hostile, headers={"User-Agent": "a\x9b31m\x85b"})
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=20)
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as invalid:
            invalid.sendall(b"GET /\x1b[31m\n2026-11-26 CRITICAL\n HTTP/1.1\r\n\r\n")
            invalid.recv(1000)
        wait_until(lambda: "all is lost" in process.log(), "the request to be logged")
        lines = process.log().removesuffix("\n").split("\n")
    assert "".join(lines).isprintable()
    assert not [line for line in lines if "CRITICAL" in line[:40]]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z.]+: |    ", line) for line in lines), lines
    assert bool([line for line in lines if "gunicorn.access" in line]) == access_log
