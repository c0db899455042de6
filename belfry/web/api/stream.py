"""The stream: who may use it, from which cursor, and how a connection leaves gunicorn's threads for the hub."""

import errno
import random
from collections.abc import Iterator
from typing import Any

from flask import Response, g, request

import schemas
from belfry.core.errors import Forbidden, Invalid, SubscriptionRequired
from belfry.identity import tokens
from belfry.servers import servers
from belfry.stream import updates
from belfry.stream.client import StreamClient
from belfry.stream.cursor import StreamCursor
from belfry.stream.hub import hub
from belfry.web import auth
from belfry.web.connection import ClientSocket
from belfry.web.endpoint import api, authenticated_by, bearer_token, current_user, endpoint
from belfry.web.problems import HttpProblem
from belfry.web.rate_limit import limit_streams
from models import User

RETRY_MILLISECONDS = (1_000, 3_000)  # before a disconnected client reconnects, so that not all come at once
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",  # a proxy's buffer would delay events until it is full
}


def _find_authorized_user(token_hash: bytes) -> User | None:
    """Find the token's user, in one query for users who may use the stream; `g.can_stream` says whether they may."""
    authorized = updates.authorized_clients([token_hash]).get(token_hash)
    g.can_stream = authorized is not None
    return authorized[0] if authorized else tokens.authenticate_hash(token_hash)


@api.get("/notifications/stream")
@authenticated_by(_find_authorized_user)
@limit_streams
@endpoint(query=schemas.StreamQuery)
def stream(query: dict[str, Any]) -> Response:
    """Open a stream of server-sent events: `notification` and `unread` as they happen, `ping` every 5 s.

    `messages` names the messages of `channel_id` that were posted, edited or deleted. `Last-Event-ID` resumes. `reset`
    replaces what is too much to send: read the inbox then. 403 for a user who cannot be notified, without a
    subscription or server; 429 for too many new streams of one user; 503 where the process has no room for another.
    """
    user = current_user()
    token = bearer_token()
    current = None if token else auth.current_session()
    token_hash = current.session_hash if current else tokens.hash_token(token or "")
    if not g.get("can_stream") and token_hash not in updates.authorized_clients([token_hash]):
        if not servers.servers_of(user.id):
            raise Forbidden("You are not a member of any server, so there are no notifications for you.")
        raise SubscriptionRequired("Live updates need an active subscription.")
    since = _since()
    answer = Response(headers=HEADERS)
    if request.method == "HEAD":
        return answer
    connection = request.environ.get("gunicorn.socket")
    if not isinstance(connection, ClientSocket):
        raise HttpProblem(501, "The stream needs gunicorn, with TLS terminated in front of it (see the Procfile).")
    if hub().is_full():
        raise HttpProblem(503, "Stream limit reached. Try again soon.")
    client = StreamClient(
        connection,
        user,
        token_hash,
        current.session_hash.hex() if current else None,
        since,
        chunked=request.environ["SERVER_PROTOCOL"] != "HTTP/1.0",
        channel_id=query["channel_id"],
    )
    answer.response = _detached_stream(client, connection)
    return answer


def _since() -> StreamCursor | None:
    """The cursor of `Last-Event-ID`; None without one. Raises Invalid for a text that is not a cursor.

    The hub checks the signature: a browser does not reconnect after a 4xx, and open pages may have cursors from before
    a change of SECRET_KEY.
    """
    text = request.headers.get("Last-Event-ID", "")
    try:
        return StreamCursor.parse(text) if text else None
    except ValueError:
        raise Invalid({"Last-Event-ID": ["Unknown event id."]}) from None


def _detached_stream(client: StreamClient, connection: ClientSocket) -> Iterator[bytes]:
    """The beginning of the stream, which gunicorn sends with the head; then the connection belongs to the hub.

    gunicorn keeps a socket without a descriptor, and gets an error that it takes for a disconnected client, so that it
    neither ends the response nor closes the connection. A test checks this for the pinned version.
    """
    yield f"retry: {random.randint(*RETRY_MILLISECONDS)}\n\n".encode()  # noqa: S311
    client.unsent += connection.unsent
    client.detach()
    hub().add(client)
    raise ConnectionResetError(errno.ECONNRESET, "handed over")
