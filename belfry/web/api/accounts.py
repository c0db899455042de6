"""The caller's account, tokens and sessions; for admins, users with their tokens and subscriptions."""

from typing import Any

import schemas
from belfry.identity import sessions, subscriptions, tokens, users
from belfry.messages.suggestions import suggest_mentions
from belfry.servers import servers
from belfry.servers.visibility import get_visible_channel, visible_channels
from belfry.web import auth
from belfry.web.endpoint import ApiResponse, access, api, bearer_token, current_user, endpoint, own_access, paginate


@api.get("/me")
@endpoint(response=schemas.Me)
def me() -> Any:
    """Get the caller's account. It includes the state of their subscription, and their servers."""
    user = current_user()
    return {
        **user.__data__,
        "subscription": subscriptions.subscription_of(user.id),
        "servers": servers.servers_of(user.id),
    }


@api.get("/me/tokens")
@endpoint(query=schemas.Page, response=schemas.OwnToken)
def list_own_tokens(query: dict[str, Any]) -> Any:
    """List the caller's tokens. The tokens themselves are not stored, and not shown."""
    user, token, session = current_user(), bearer_token(), auth.current_session()
    current = tokens.hash_token(token) if token else session.token_hash if session else b""
    return paginate(
        query,
        lambda after, limit: tokens.list_tokens(user.id, after=after or 0, limit=limit, current=current),
        lambda token: token["id"],
    )


@api.delete("/me/tokens/<id:token_id>")
@endpoint(status=204, publishes=own_access)
def revoke_own_token(token_id: int) -> None:
    """Revoke one of the caller's tokens. It ends at once, with the sessions and streams that it opened."""
    tokens.revoke_token(current_user().id, token_id)


@api.delete("/me/sessions")
@endpoint(status=204, publishes=own_access)
def end_own_sessions() -> None:
    """End all browser sessions of the caller. Tokens stay valid."""
    sessions.end_all_sessions(current_user().id)


@api.get("/channels")
@endpoint(query=schemas.Page, response=schemas.Channel)
def list_own_channels(query: dict[str, Any]) -> Any:
    """List the caller's channels. These are all that they can see, by id."""
    return paginate(
        query,
        lambda after, limit: visible_channels(current_user(), after=after or 0, limit=limit),
        lambda channel: channel["id"],
    )


@api.get("/channels/<id:channel_id>/mention-suggestions")
@endpoint(query=schemas.MentionSuggestionQuery, response=schemas.MentionSuggestionList)
def list_mention_suggestions(channel_id: int, query: dict[str, Any]) -> Any:
    """Suggest mentions in a channel. Moderators and admins may also mention roles and everyone."""
    channel = get_visible_channel(current_user(), channel_id)
    return {"items": suggest_mentions(channel, query["q"], query["limit"]), "next": None}


@api.get("/users")
@endpoint(query=schemas.UserPage, response=schemas.User, admin=True)
def list_users(query: dict[str, Any]) -> Any:
    """List all users. With `username` the list has that user only."""
    return paginate(
        query,
        lambda after, limit: users.list_users(after=after or 0, limit=limit, username=query["username"]),
        lambda user: user.id,
    )


@api.post("/users")
@endpoint(body=schemas.UserIn, response=schemas.User, status=201, admin=True, publishes=access)
def create_user(body: dict[str, Any]) -> ApiResponse:
    """Create a user. 409 where the username is taken."""
    user = users.create_user(**body)
    return ApiResponse(users.find_user(user.id), headers={"Location": f"/api/users/{user.id}"})


@api.get("/users/<id:user_id>")
@endpoint(response=schemas.User, admin=True)
def get_user(user_id: int) -> Any:
    """Get a user. Users themselves read their account at `/api/me`."""
    return users.find_user(user_id)


@api.patch("/users/<id:user_id>")
@endpoint(body=schemas.UserChange, response=schemas.User, admin=True, publishes=access)
def update_user(user_id: int, body: dict[str, Any]) -> Any:
    """Change a user's name, e-mail address or admin right. Fields that are not given stay as they are."""
    return users.update_user(user_id, body)


@api.get("/users/<id:user_id>/subscription")
@endpoint(response=schemas.Subscription, admin=True)
def get_subscription(user_id: int) -> Any:
    """Get a user's subscription. null where there never was one."""
    return subscriptions.subscription_of(user_id)


@api.put("/users/<id:user_id>/subscription")
@endpoint(body=schemas.SubscriptionIn, response=schemas.Subscription, admin=True, publishes=access)
def put_subscription(user_id: int, body: dict[str, Any]) -> Any:
    """Set a user's subscription to what the payment provider says. Repeating it changes nothing."""
    return subscriptions.set_subscription(user_id, body["status"], body["current_period_end"])


@api.get("/users/<id:user_id>/tokens")
@endpoint(query=schemas.Page, response=schemas.Token, admin=True)
def list_tokens(user_id: int, query: dict[str, Any]) -> Any:
    """List a user's tokens. The tokens themselves are not stored, and not shown."""
    return paginate(
        query,
        lambda after, limit: tokens.list_tokens(user_id, after=after or 0, limit=limit),
        lambda token: token["id"],
    )


@api.post("/users/<id:user_id>/tokens")
@endpoint(body=schemas.TokenIn, response=schemas.Token, status=201, admin=True, optional_body=True, publishes=access)
def create_token(user_id: int, body: dict[str, Any]) -> Any:
    """Create a token. It is returned only this once."""
    stored, token = tokens.create_token(users.find_user(user_id), body["expires_at"])
    return {**stored, "token": token}


@api.delete("/users/<id:user_id>/tokens/<id:token_id>")
@endpoint(status=204, admin=True, publishes=access)
def revoke_token(user_id: int, token_id: int) -> None:
    """Revoke a user's token. It ends at once, with the sessions and streams that it opened."""
    tokens.revoke_token(user_id, token_id)
