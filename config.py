"""Every environment variable that Belfry reads. Nothing else reads the environment.

`settings` is created once, when this module is imported. An invalid value ends the process with one sentence that names
the variable. docs/reference/environment.md lists the same variables; a test compares them.
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
    """Limits and intervals that operators do not set. Their values were measured; tests override them."""

    readiness_cache_seconds: float = 1.0
    """How long a process reuses the result of a check for /readyz."""
    token_cache_size: int = 5_000
    """Tokens whose user a process caches: 7 MB."""
    suggestion_small_audience: int = 2_000
    """Members of a channel up to which each is compared with the prefix; above it the index is searched."""
    stream_openings: str = "120 per minute"
    """Rate limit of one user: each of 20 streams may reconnect six times."""
    enqueue_batch_size: int = 500
    """Jobs in one round trip to Redis."""
    max_queue_length: int = 10_000
    """Jobs in a queue. More runs wait in PostgreSQL, so that Redis stays small."""
    queue_full_recheck_seconds: float = 1.0
    """How long a full queue counts as full before its length is read again."""
    retry_jitter: float = 0.5
    """The largest random part that is added to a retry interval, as a fraction of it."""
    max_batch_runs: int = 400
    """Small runs that are processed in one transaction together with the first one."""
    max_jobs_per_process: int = 10_000
    """Jobs after which a work-horse is replaced, so that its memory is bounded."""
    max_ended_jobs: int = 10_000
    """Finished jobs that RQ keeps of each queue; the oldest are deleted."""
    stop_retry_seconds: float = 2.0
    """Time in which a work-horse that stops may unregister from Redis before it is interrupted again."""

    partition_check_seconds: float = 60.0
    """Time between two checks of the partitions by a worker."""
    partition_min_rows: int = 1_000_000
    """Rows below which a partition is not full."""
    partition_messages_per_account: float = 8
    """Rows for each account above which a partition is full, because inserts become slower."""
    partition_soft_max: float = 50
    """Partitions above which new ones become larger, because a count over all partitions reads each of them."""
    partition_index_lock_timeout: str = "5s"
    """Lock time-out for the creation of a partition's index."""

    cleanup_batch_rows: int = 5_000
    """Rows deleted by one statement and one commit: about 30 ms."""
    cleanup_seconds: float = 1.0
    """Time for all clean-ups of one sweep together; each deletes at least one batch."""

    stream_max_lookups: int = 100_000
    """Messages times members that one poll of the streams looks up: about 20 µs for each notification."""
    stream_max_log_rows: int = 20_000
    """Rows of the log that one poll of the streams reads before it looks up notifications."""
    resume_max_lookups: int = 5_000
    """Notifications that are looked up at once for clients that resume: about 20 µs each."""
    resume_max_log_rows: int = 5_000
    """Messages of the log that are read for clients that resume: about 15 ms."""


tuning = Tuning()


class ConfigError(ValueError):
    """An environment variable has an invalid value. The message names it."""


def _postgresql_url(value: str) -> str:
    if not value.startswith(("postgres://", "postgresql://")):
        raise ValueError("must begin with postgres:// or postgresql://")
    try:
        parts = conninfo_to_dict(value)
    except ProgrammingError as error:
        raise ValueError(f"is not a PostgreSQL URL: {str(error).strip()}") from None
    if not parts.get("dbname"):
        raise ValueError("names no database")
    return value


def _redis_url(value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    try:
        parse_url(value)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(f"is not a Redis URL: {error}") from None
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


def _optional_web_address(value: str) -> str:
    return _web_address(value) if value else ""


def _variable(read: Callable[[str], T], default: T, about: str) -> Any:
    return field(default=default, metadata={"read": read, "about": about})


@dataclass(frozen=True)
class Settings:
    """One field for each variable, by its name in lower case. `metadata["about"]` describes it."""

    database_url: str = _variable(_postgresql_url, "postgresql://localhost/belfry", "PostgreSQL 15 or newer")
    redis_url: str = _variable(_redis_url, "redis://localhost:6379/0", "Redis 6.2 or newer, or Valkey, for the queues")
    secret_key: str = _variable(_secret, "", "signs session cookies; for the web process; 32 characters or more")
    port: int = _variable(_number(1, 65535), 8000, "port of the web process")
    web_concurrency: int = _variable(_number(1, 256), 2, "web processes")
    web_threads: int = _variable(_number(1, 256), 8, "threads in each web process, and its database connections")
    max_streams_per_process: int = _variable(_number(1, 100_000), 10_000, "largest number of streams of a web process")
    public_url: str = _variable(_web_address, "http://localhost:8000", "the address that users see")
    subscribe_url: str = _variable(_optional_web_address, "", "where members without an active subscription get one")
    session_cookie_secure: bool = _variable(_flag, True, "session cookies over HTTPS only; 0 for development on http://")
    log_level: str = _variable(_one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "lowest level that is logged")
    log_format: str = _variable(_one_of("text", "json"), "text", "format of log lines")
    rate_limit_messages: str = _variable(_rate, "200 per 15 minutes", "posts and edits of one user")
    rate_limit_default: str = _variable(_rate, "1200 per minute", "all other requests of one user")
    rate_limit_anonymous: str = _variable(_rate, "1200 per minute", "requests without a user from one client address")
    trusted_proxies: int = _variable(_number(0, 32), 0, "proxies in front that append to X-Forwarded-For")
    past_due_grace_days: int = _variable(_number(0, 366), 7, "days for which a past_due subscription still counts")
    metrics_token: str = _variable(_secret, "", "token for /metrics, 32 characters or more")
    fanout_slice_size: int = _variable(_number(1, 1_000_000), 20_000, "members in one slice of a fan-out")
    job_timeout_seconds: int = _variable(_number(5, 86_400), 300, "seconds that one job may run")
    sweep_interval_seconds: int = _variable(_number(1, 3_600), 2, "seconds between two searches for lost work")
    retention_days: int = _variable(_number(0, 36_500), 0, "days for which notifications are kept; 0 for ever")
    retry_base_delay_seconds: int = _variable(_number(1, 3_600), 5, "seconds before the first retry")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read all variables; an absent or empty one has its default.

        Raises ConfigError for an invalid value.
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
    """The key that signs cookies. Exits the process where none is set: a default would be known to everybody."""
    if not settings.secret_key:
        raise SystemExit(
            "belfry: SECRET_KEY is not set. Create one: python3 -c 'import secrets; print(secrets.token_hex())'"
        )
    return settings.secret_key
