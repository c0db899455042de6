"""How the web process runs: what config.py says. gunicorn reads this file by itself."""

from typing import Any

from belfry.core import logging_setup
from config import settings

bind = f"0.0.0.0:{settings.port}"
workers = settings.web_concurrency
worker_class = "belfry.web.gunicorn_worker.WebWorker"  # gthread, in which no thread waits for a client
threads = settings.web_threads
preload_app = True  # what cannot start says so once; no connection is opened before the fork
graceful_timeout = 25  # seconds for current requests after SIGTERM; Heroku kills after 30
control_socket_disable = True  # it would lie in the home directory; nothing here speaks to it
sendfile = False  # it would wait in a thread until the client has taken the file
keepalive = 75  # longer than a proxy's idle time in front, so that it is never this side that hangs up
forwarder_headers = ""  # SCRIPT_NAME and PATH_INFO are not for clients to set; gunicorn believes them of loopback
secure_scheme_headers: dict[str, str] = {}  # PUBLIC_URL says how people reach this; no header does


def on_starting(_: Any) -> None:
    """gunicorn's own lines go where all the others go, in the same form."""
    logging_setup.configure(settings.log_level, settings.log_format)
