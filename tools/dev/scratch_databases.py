"""A database and a Redis database of one's own, on servers that may hold other people's data.

For the demo and the tests: what DATABASE_URL and REDIS_URL name is only connected to, never written to.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import psycopg
import redis
from psycopg import sql

from tools.dev import CommandError, say

LOOKING, HOLDING = "belfry-looking", "belfry-holding"  # what our connections to Redis call themselves
MARKER = "belfry:claimed"
MARKER_SECONDS = 3600


@contextmanager
def private(env: Mapping[str, str], purpose: str) -> Iterator[dict[str, str]]:
    """Yields `env` with DATABASE_URL and REDIS_URL changed to a new, empty database on each of both servers.

    The database is called `belfry_PURPOSE_…`. Both are gone, whatever they hold then, when the block ends.
    Raises CommandError with a sentence for the terminal where they cannot be had.
    """
    with ExitStack() as stack:
        database_url = stack.enter_context(_own_database(env["DATABASE_URL"], purpose))
        redis_url = stack.enter_context(_own_redis(env["REDIS_URL"]))
        yield {**env, "DATABASE_URL": database_url, "REDIS_URL": redis_url}


@contextmanager
def _own_database(url: str, purpose: str) -> Iterator[str]:
    name = f"belfry_{purpose}_{secrets.token_hex(6)}"
    own_url = _with_database(url, name)
    try:
        _execute(url, "CREATE DATABASE {}", name)
    except psycopg.Error as error:
        raise CommandError(f"DATABASE_URL: no database of its own can be made there: {error}") from None
    try:
        yield own_url
    finally:
        try:
            _execute(url, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)  # ends remaining connections
        except psycopg.Error as error:
            say(f"The database {name} could not be dropped, please do: {error}")


def _execute(url: str, statement: str, name: str) -> None:
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        connection.execute(sql.SQL(statement).format(sql.Identifier(name)))


def _with_database(url: str, name: str) -> str:
    """The same PostgreSQL URL for another database.

    By hand, because urllib loses the slashes of `postgresql:///name?host=/a/directory`.
    """
    match = re.fullmatch(r"(postgres(?:ql)?://[^/?]*)(?:/[^?]*)?(?:\?(.*))?", url)
    if match is None:
        raise CommandError("DATABASE_URL must look like postgresql://user:password@host:port/database")
    options = [part for part in (match[2] or "").split("&") if part and not part.startswith("dbname=")]
    return f"{match[1]}/{name}" + (f"?{'&'.join(options)}" if options else "")


@contextmanager
def _own_redis(url: str) -> Iterator[str]:
    """The URL of a Redis database that is empty and unused; it is emptied again at the end."""
    try:
        holder, own_url = _claimed(url)
    except (redis.RedisError, ValueError) as error:
        raise CommandError(f"REDIS_URL: no Redis database of its own can be had there: {error}") from None
    with holder:
        try:
            yield own_url
        finally:
            try:
                with redis.Redis.from_url(own_url, socket_timeout=10) as client:
                    client.flushdb()
            except redis.RedisError as error:
                say(f"The Redis database of {own_url} could not be emptied, please do: {error}")


def _claimed(url: str) -> tuple[redis.Redis, str]:
    """A connection that holds the first free one of the databases 15 to 1, but the named one; and its URL."""
    address, named = _without_number(url), redis.ConnectionPool.from_url(url).connection_kwargs.get("db") or 0
    for number in range(15, 0, -1):
        if number == named:
            continue
        own_url = f"{address}{'&' if '?' in address else '?'}db={number}"
        client = redis.Redis.from_url(
            own_url,
            single_connection_client=True,  # one connection, which others see for as long as it is held
            client_name=LOOKING,
            socket_timeout=10,
            socket_connect_timeout=10,
        )
        try:
            if _claim(client, number):
                return client, own_url
        except redis.ResponseError as error:
            if "out of range" not in str(error):  # a server may have fewer than 16
                raise
        client.close()
    raise CommandError(
        "REDIS_URL: none of that server's databases 1 to 15 is empty and unused. "
        "Empty one with `redis-cli -n NUMBER flushdb`, or name another server."
    )


def _claim(client: redis.Redis, number: int) -> bool:
    """Whether the database that `client` is connected to is ours from now on.

    - It has keys: no.
    - Somebody set the marker first: no. Of two at once, only one can.
    - Somebody is connected to it: no. A test run may empty its database, and the marker with it, at any time.
      Those who are themselves only looking do not count, or two at once would drive each other away.
    """
    value = secrets.token_hex(16)
    if client.dbsize() or not client.set(MARKER, value, nx=True, ex=MARKER_SECONDS):
        return False
    others = [
        other
        for other in client.client_list()
        if other.get("db") == str(number) and other.get("name") != LOOKING
    ]
    if client.dbsize() == 1 and not others:
        client.client_setname(HOLDING)
        return True
    if client.get(MARKER) == value.encode():
        client.delete(MARKER)
    return False


def _without_number(url: str) -> str:
    """The Redis URL without its database number: its path (redis://host/3) or an option (?db=3)."""
    base, _, query = url.partition("?")
    options = [part for part in query.split("&") if part and not part.startswith("db=")]
    if not base.startswith("unix://"):
        base = re.sub(r"^(rediss?://[^/]*).*$", r"\1", base)
    return base + (f"?{'&'.join(options)}" if options else "")
