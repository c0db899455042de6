"""Every environment variable that Belfry reads. Nothing else reads the environment.

`settings` is made once, when this module is imported. A value that cannot be meant ends the process
with one sentence that names the variable. The table in the README lists the same names; a test compares them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from limits import parse_many
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from redis.connection import parse_url

T = TypeVar("T")


@dataclass(frozen=True)
class Tuning:
    """Limits and intervals that no operator sets: they were measured, and tests override them."""

    readiness_cache_seconds: float = 1.0
    """One check answers everybody who asks /readyz of a process for so long."""
    token_cache_size: int = 5_000
    """Tokens of which a process remembers the user: 7 MB."""
    suggestion_small_audience: int = 2_000
    """Up to so many members of a channel are each compared with the prefix; beyond that the index is searched."""
    stream_openings: str = "120 per minute"
    """Of one user: each of 20 streams may come back six times."""
    enqueue_batch_size: int = 500
    """Jobs in one round trip to Redis."""
    max_queue_length: int = 10_000
    """Jobs in a queue. More runs wait in PostgreSQL, so that Redis stays small."""
    queue_full_recheck_seconds: float = 1.0
    """How long a queue that was full is taken to be full, before Redis is asked again."""
    retry_jitter: float = 0.5
    """Each retry interval is longer by a random part of itself, up to this one."""
    max_batch_runs: int = 400
    """Small runs that are processed in one transaction beside the one whose job it is."""
    max_jobs_per_process: int = 10_000
    """Jobs after which a process that runs jobs ends, and another follows, so that its memory is bounded."""
    stop_retry_seconds: float = 2.0
    """Seconds for a process that runs jobs to unregister from Redis, before it is asked to stop once more."""

    partition_check_seconds: float = 60.0
    """Seconds between two checks of the partitions by a worker."""
    partition_min_rows: int = 1_000_000
    """Rows before a partition counts as full."""
    partition_messages_per_account: float = 8
    """Messages to every account before a partition counts as full: then its key has grown enough to be slower."""
    partition_soft_max: float = 50
    """Partitions. Beyond that each holds so much of all rows: a count over all partitions pays for each."""
    partition_index_lock_timeout: str = "5s"
    """For the lock that an index of a partition needs."""

    cleanup_batch_rows: int = 5_000
    """Rows deleted by one statement and one commit: some 30 ms."""
    cleanup_seconds: float = 1.0
    """Seconds that all clean-ups of one sweep may take together; each deletes one batch at least."""

    stream_max_lookups: int = 100_000
    """Messages times members that one poll of the streams looks up: some 20 µs for each notification."""
    stream_max_log_rows: int = 20_000
    """Rows of the log that one poll of the streams reads, before any notification is looked up."""
    resume_max_lookups: int = 5_000
    """Notifications that are looked up at once for clients that resume: some 20 µs each."""
    resume_max_log_rows: int = 5_000
    """Messages of the log that are read for clients that resume: some 15 ms."""


tuning = Tuning()


class ConfigError(ValueError):
    """A variable's value cannot be meant. The message names the variable."""


def _postgresql_url(value: str) -> str:
    if not value.startswith(("postgres://", "postgresql://")):
        raise ValueError("must begin with postgres:// or postgresql://")
    try:
        parts = conninfo_to_dict(value)
    except ProgrammingError as error:
        raise ValueError(f"is no PostgreSQL URL: {str(error).strip()}") from None
    if not parts.get("dbname"):
        raise ValueError("names no database")
    return value


def _redis_url(value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    try:
        parse_url(value)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(f"is no Redis URL: {error}") from None
    return value


def _secret(value: str) -> str:
    if len(value) < 32:
        raise ValueError("must have at least 32 characters (python3 -c 'import secrets; print(secrets.token_hex())')")
    return value


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    return read


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        for choice in choices:
            if value.lower() == choice.lower():
                return choice
        raise ValueError(f"must be one of {', '.join(choices)}")

    return read


def _flag(value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be 1 or 0")


def _rate(value: str) -> str:
    try:
        parse_many(value)
    except ValueError:
        raise ValueError("must look like '200 per 15 minutes'") from None
    return value


def _web_address(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value.rstrip("/")


def _variable(read: Callable[[str], T], default: T, about: str) -> Any:
    return field(default=default, metadata={"read": read, "about": about})


@dataclass(frozen=True)
class Settings:
    """One field a variable, by the same name in lower case. `metadata["about"]` says what it is for."""

    database_url: str = _variable(
        _postgresql_url, "postgresql://localhost/belfry", "PostgreSQL 15 or newer: the truth"
    )
    redis_url: str = _variable(_redis_url, "redis://localhost:6379/0", "Redis 6.2 or newer, or Valkey: the queue")
    secret_key: str = _variable(_secret, "", "signs the session cookie; needed to serve, at least 32 characters")
    port: int = _variable(_number(1, 65535), 8000, "where the web process listens")
    web_concurrency: int = _variable(_number(1, 256), 2, "web processes")
    web_threads: int = _variable(_number(1, 256), 8, "threads in each web process, and its database connections")
    max_streams_per_process: int = _variable(_number(1, 100_000), 10_000, "live streams at most, in each web process")
    public_url: str = _variable(_web_address, "http://localhost:8000", "the address that people see")
    session_cookie_secure: bool = _variable(_flag, True, "session cookies over HTTPS only; 0 for development on http://")
    log_level: str = _variable(_one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "what is logged")
    log_format: str = _variable(_one_of("text", "json"), "text", "text for people, json for machines")
    rate_limit_messages: str = _variable(_rate, "200 per 15 minutes", "messages of one author")
    rate_limit_default: str = _variable(_rate, "1200 per minute", "every other request of one person")
    rate_limit_anonymous: str = _variable(_rate, "1200 per minute", "requests without a user, of one client address")
    trusted_proxies: int = _variable(_number(0, 32), 0, "proxies in front that append to X-Forwarded-For")
    past_due_grace_days: int = _variable(_number(0, 366), 7, "days that a past_due subscription still counts")
    metrics_token: str = _variable(_secret, "", "opens /metrics to a scraper; at least 32 characters")
    fanout_slice_size: int = _variable(_number(1, 1_000_000), 20_000, "members in one slice of a fan-out")
    job_timeout_seconds: int = _variable(_number(5, 86_400), 300, "seconds that one job may run")
    sweep_interval_seconds: int = _variable(_number(1, 3_600), 2, "seconds between two looks for work that was lost")
    retention_days: int = _variable(_number(0, 36_500), 0, "days that notifications are kept; 0: for ever")
    retry_base_delay_seconds: int = _variable(_number(1, 3_600), 5, "seconds before the first retry; then times 3")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read all variables; one that is absent or empty has its default.

        Raises ConfigError, naming the variable, for a value that cannot be meant.
        """
        values = {}
        for variable in fields(cls):
            name = variable.name.upper()
            text = environment.get(name, "").strip()
            if not text:
                continue
            try:
                values[variable.name] = variable.metadata["read"](text)
            except ValueError as error:
                raise ConfigError(f"{name} {error}") from None
        return cls(**values)


def _load() -> Settings:
    try:
        return Settings.from_environment(os.environ)
    except ConfigError as error:
        raise SystemExit(f"belfry: {error}") from None


settings = _load()


def secret_key() -> str:
    """The key that signs cookies. Ends the process where none is set: a default would be everybody's key."""
    if not settings.secret_key:
        raise SystemExit(
            "belfry: SECRET_KEY is not set. Make one with: python3 -c 'import secrets; print(secrets.token_hex())'"
        )
    return settings.secret_key
