"""Settings from the environment: values, defaults, and errors that name the variable."""

import os
import subprocess
import sys

import pytest

from config import ConfigError, Settings


def test_an_empty_environment_means_the_defaults():
    settings = Settings.from_environment({"PORT": "", "SOMETHING_ELSE": "x"})
    assert settings == Settings()
    assert settings.secret_key == ""  # there is no default key


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("DATABASE_URL", "postgres://u:p@h:5433/d?sslmode=require", "postgres://u:p@h:5433/d?sslmode=require"),
        ("DATABASE_URL", "postgresql://postgres@/belfry?host=/tmp/x", "postgresql://postgres@/belfry?host=/tmp/x"),
        ("REDIS_URL", "rediss://:p@h:6380/1", "rediss://:p@h:6380/1"),
        ("REDIS_URL", "unix:///tmp/redis.sock?db=2", "unix:///tmp/redis.sock?db=2"),
        ("PORT", " 5000 ", 5000),
        ("SESSION_COOKIE_SECURE", "0", False),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("LOG_FORMAT", "JSON", "json"),
        ("RATE_LIMIT_MESSAGES", "5 per second; 200 per 15 minutes", "5 per second; 200 per 15 minutes"),
        ("PUBLIC_URL", "https://example.com/", "https://example.com"),
        ("SUBSCRIBE_URL", "https://example.com/join", "https://example.com/join"),
        ("PAST_DUE_GRACE_DAYS", "0", 0),
        ("TRUSTED_PROXIES", "2", 2),
    ],
)
def test_each_variable_is_read(name, value, expected):
    assert getattr(Settings.from_environment({name: value}), name.lower()) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://localhost/belfry"),
        ("DATABASE_URL", "postgresql://localhost"),
        ("DATABASE_URL", "postgresql://localhost/belfry?nonsense=1"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "redis://localhost:port/0"),
        ("SECRET_KEY", "short"),
        ("METRICS_TOKEN", "x" * 31),
        ("PORT", "0"),
        ("PORT", "70000"),
        ("PORT", "http"),
        ("WEB_CONCURRENCY", "0"),
        ("WEB_THREADS", "many"),
        ("SESSION_COOKIE_SECURE", "perhaps"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("PUBLIC_URL", "example.com"),
        ("SUBSCRIBE_URL", "javascript:alert(1)"),
        ("RATE_LIMIT_MESSAGES", "a few"),
        ("RATE_LIMIT_DEFAULT", "10 per fortnight"),
        ("RATE_LIMIT_ANONYMOUS", "many"),
        ("TRUSTED_PROXIES", "-1"),
        ("TRUSTED_PROXIES", "10.0.0.0/8"),
        ("PAST_DUE_GRACE_DAYS", "-1"),
        ("FANOUT_SLICE_SIZE", "0"),
        ("JOB_TIMEOUT_SECONDS", "1"),
        ("SWEEP_INTERVAL_SECONDS", "0"),
        ("RETRY_BASE_DELAY_SECONDS", "1.5"),
    ],
)
def test_an_invalid_value_is_refused_with_the_variables_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        Settings.from_environment({name: value})


def start(**changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import app; app.create_app()"],
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_invalid_value_aborts_startup_with_one_sentence():
    stopped = start(PORT="ninety")
    assert stopped.returncode == 1
    assert stopped.stderr == "belfry: PORT must be a whole number\n"


def test_without_a_secret_key_the_application_does_not_start():
    stopped = start(SECRET_KEY="")
    assert stopped.returncode == 1
    assert stopped.stderr.startswith("belfry: SECRET_KEY is not set.")
