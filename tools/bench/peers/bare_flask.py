"""A minimal Flask route for a message: JSON in, one INSERT, committed, one RPUSH, JSON out.

It has no authentication, no checks, no rate limit and no run. Belfry's POST is compared with it.
"""

import os
from queue import Empty, LifoQueue
from typing import Any

import psycopg
from flask import Flask, request
from redis import Redis

QUEUE = "bare"


def create_app() -> Flask:
    """Create the app. `stack.web` waits for the route `/readyz`."""
    app = Flask(__name__)
    redis = Redis.from_url(os.environ["REDIS_URL"])
    pool: LifoQueue[psycopg.Connection[Any]] = LifoQueue()  # as many as there are threads, once each has had one

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/api/messages")
    def post() -> tuple[dict[str, Any], int]:
        body = request.get_json()
        try:
            connection = pool.get_nowait()
        except Empty:
            connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
        found = connection.execute(
            "INSERT INTO message (channel_id, author_id, content) VALUES (%s, %s, %s) RETURNING id, created_at",
            (body["channel_id"], body["author_id"], body["content"]),
        ).fetchone()
        pool.put(connection)
        assert found is not None
        redis.rpush(QUEUE, found[0])
        return {**body, "id": found[0], "created_at": found[1].isoformat()}, 201

    return app
