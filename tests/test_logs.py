"""Logs: for people or machines, with the request's, run's and job's ids on every line."""

import json
import logging

import pytest

from belfry import logs


@pytest.fixture
def _restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("_restored")
def test_json_lines_carry_the_ids_of_what_they_are_about(capsys):
    logs.configure("INFO", "json")
    with logs.context(run_id=7, job_id="abc"), logs.context(request_id=None):
        logging.getLogger("somewhere").info("done in %s ms — ✓", 3)
    logging.getLogger("somewhere").info("later")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["message"], first["run_id"], first["job_id"]) == ("done in 3 ms — ✓", 7, "abc")
    assert first["level"] == "INFO"
    assert first["time"].endswith("Z")
    assert "request_id" not in first
    assert "run_id" not in second


@pytest.mark.usefixtures("_restored")
def test_an_exception_stays_one_line_of_json(capsys):
    logs.configure("INFO", "json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("somewhere").exception("it broke")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ValueError: two\nlines" in json.loads(lines[0])["exception"]


@pytest.mark.usefixtures("_restored")
def test_text_lines_carry_them_too(capsys):
    logs.configure("INFO", "text")
    with logs.context(run_id=7):
        logging.getLogger("somewhere").info("done")
    assert capsys.readouterr().err.rstrip().endswith("INFO somewhere: done run_id=7")


def named(client, by_proxy):
    return client.get("/healthz", headers={"X-Request-Id": by_proxy}).headers["X-Request-Id"]


def test_an_answer_names_its_request_and_takes_a_proxys_name_for_it(client, caplog):
    with caplog.at_level(logging.INFO):
        own = client.get("/healthz").headers["X-Request-Id"]
        assert client.get("/healthz").headers["X-Request-Id"] != own
        assert named(client, "proxy-12345678") == "proxy-12345678"
        assert len(named(client, "x y\tz" * 3)) == 32
    assert any(record.getMessage().startswith("GET /healthz 200 in ") for record in caplog.records)
