"""The live stream: who may listen, from where on, and how a connection leaves gunicorn's threads for the hub."""

import errno
import random
from collections.abc import Iterator

from flask import Flask, Response, g, request

from belfry.core.errors import Forbidden, Invalid, SubscriptionRequired
from belfry.identity import tokens
from belfry.servers import servers
from belfry.stream import updates
from belfry.stream.client import StreamClient
from belfry.stream.cursor import StreamCursor
from belfry.stream.hub import hub
from belfry.stream.publish import publish
from belfry.web import auth
from belfry.web.connection import ClientSocket
from belfry.web.endpoint import READS, api, authenticated_by, bearer_token, current_user, endpoint
from belfry.web.problems import HttpProblem
from belfry.web.rate_limit import limit_streams
from models import User

RETRY_MILLISECONDS = (1_000, 3_000)  # before a client that was cut off comes back: not all of them at once
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",  # a proxy's buffer would hold an event back until it is full
}
OF_MESSAGES = ("api.post_message", "api.edit_message", "api.test_notification", "api.replay")
"""What these change is told by a job, which announces it."""
OF_ONESELF = ("api.mark_read", "api.dismiss", "pages.mark_read")

OF_OWN_ACCESS = ("api.revoke_own_token", "api.end_own_sessions")


def register(app: Flask) -> None:
    """Announce what requests change, when they are through."""
    app.after_request(_publish_change)


def _find_authorized_user(token_hash: bytes) -> User | None:
    """Find the token's user; in `g.can_stream` is whether they may listen. One query for those who may."""
    listener = updates.authorized_clients([token_hash]).get(token_hash)
    g.can_stream = listener is not None
    return listener[0] if listener else tokens.authenticate_hash(token_hash)


@api.get("/notifications/stream")
@authenticated_by(_find_authorized_user)
@limit_streams
@endpoint()
def stream() -> Response:
    """Server-sent events: `notification` and `unread` as they happen, `ping` every 15 s. `Last-Event-ID` resumes.

    `reset` stands in for what is too much to be sent one by one: read the inbox. Raises 403 for who cannot be told of
    anything: who has no subscription, or is in no server; 429 where one person opens too many streams; 503 where there
    are too many in all.
    """
    user = current_user()
    token = bearer_token()
    current = None if token else auth.current_session()
    token_hash = current.session_hash if current else tokens.hash_token(token or "")
    if not g.get("can_stream") and token_hash not in updates.authorized_clients([token_hash]):
        if not servers.servers_of(user.id):
            raise Forbidden("Who is in no server is told of nothing.")
        raise SubscriptionRequired("Live updates need an active subscription.")
    since = _since()
    answer = Response(headers=HEADERS)
    if request.method == "HEAD":
        return answer
    connection = request.environ.get("gunicorn.socket")
    if not isinstance(connection, ClientSocket):
        raise HttpProblem(501, "The stream needs gunicorn, with TLS ended in front of it: the Procfile's `web`.")
    if hub().is_full():
        raise HttpProblem(503, "This process has as many streams as it can. Try again soon.")
    client = StreamClient(
        connection,
        user,
        token_hash,
        current.session_hash.hex() if current else None,
        since,
        chunked=request.environ["SERVER_PROTOCOL"] != "HTTP/1.0",
    )
    answer.response = _detached_stream(client, connection)
    return answer


def _since() -> StreamCursor | None:
    """Where the client was. An empty header is none. Raises Invalid for what is no position.

    Who signed it is looked at later: a browser does not come back after a 4xx, and open pages have positions of before
    SECRET_KEY was changed.
    """
    text = request.headers.get("Last-Event-ID", "")
    try:
        return StreamCursor.parse(text) if text else None
    except ValueError:
        raise Invalid({"Last-Event-ID": ["Is not one that was given out."]}) from None


def _detached_stream(client: StreamClient, connection: ClientSocket) -> Iterator[bytes]:
    """The beginning of the stream, which gunicorn sends with its head; then the connection is the hub's.

    gunicorn is left a socket without a connection, and an error that it takes for a client who went away: it lets go,
    and neither ends the answer nor closes what it does not have. A test holds the pinned version to that.
    """
    yield f"retry: {random.randint(*RETRY_MILLISECONDS)}\n\n".encode()  # noqa: S311
    client.unsent += connection.unsent
    client.detach()
    hub().add(client)
    raise ConnectionResetError(errno.ECONNRESET, "handed over")


def _publish_change(answer: Response) -> Response:
    if request.method in READS or answer.status_code >= 400:
        return answer
    if request.endpoint in OF_ONESELF:
        publish(user_id=g.user.id)
    elif request.endpoint in OF_OWN_ACCESS:
        publish(access=g.user.id)
    elif request.endpoint == "api.delete_message":
        publish(message_id=(request.view_args or {})["message_id"])
    elif request.blueprint == "api" and request.endpoint not in (*OF_MESSAGES, "api.put_preference"):
        publish(access=(request.view_args or {}).get("user_id", True))  # of one person, or of who knows whom
    return answer
