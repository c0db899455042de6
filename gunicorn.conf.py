"""The configuration of gunicorn, which reads this file from the current directory. Settings come from config.py."""

from typing import Any

from belfry.core import logging_setup
from config import settings

bind = f"0.0.0.0:{settings.port}"
workers = settings.web_concurrency
worker_class = "belfry.web.gunicorn_worker.WebWorker"  # gthread, but no thread waits for a client
threads = settings.web_threads
preload_app = True  # a startup error is reported once; no connection is opened before the fork
graceful_timeout = 25  # seconds for current requests after SIGTERM; Heroku kills after 30
control_socket_disable = True  # it would be in the home directory, and nothing uses it
sendfile = False  # it would block a thread until the client has read the file
keepalive = 75  # longer than a proxy's idle time-out, so that the proxy closes first and loses no request
forwarder_headers = ""  # clients must not set SCRIPT_NAME and PATH_INFO, which gunicorn accepts from loopback
secure_scheme_headers: dict[str, str] = {}  # the scheme is that of PUBLIC_URL, and not a header's


def on_starting(_: Any) -> None:
    """Send gunicorn's log lines where all others go, in the same format."""
    logging_setup.configure(settings.log_level, settings.log_format)
