"""How the web process runs: what config.py says. gunicorn reads this file by itself."""

from typing import Any

from belfry import logs
from config import settings

bind = f"0.0.0.0:{settings.port}"
workers = settings.web_concurrency
worker_class = "gthread"
threads = settings.web_threads
preload_app = True  # what cannot start says so once; no connection is opened before the fork
graceful_timeout = 25  # seconds for the requests in hand at SIGTERM; Heroku kills after 30
control_socket_disable = True  # it would lie in the home directory; nothing here speaks to it
keepalive = 75  # longer than a proxy's idle time in front, so that it is never this side that hangs up


def on_starting(_: Any) -> None:
    """gunicorn's own lines go where all the others go, in the same form."""
    logs.configure(settings.log_level, settings.log_format)
