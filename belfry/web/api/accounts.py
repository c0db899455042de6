"""Oneself, one's tokens and sessions; and, for admins, people, their tokens and subscriptions."""

from typing import Any

import schemas
from belfry.identity import sessions, subscriptions, tokens, users
from belfry.messages.suggestions import suggest_mentions
from belfry.servers import servers
from belfry.servers.visibility import get_visible_channel, visible_channels
from belfry.web import auth
from belfry.web.endpoint import ApiResponse, api, bearer_token, current_user, endpoint, paginate


@api.get("/me")
@endpoint(gives=schemas.Me)
def me() -> Any:
    """Who one is, whether one's subscription counts, and which servers one is in."""
    user = current_user()
    return {
        **user.__data__,
        "subscription": subscriptions.subscription_of(user.id),
        "servers": servers.servers_of(user.id),
    }


@api.get("/me/tokens")
@endpoint(query=schemas.Page, gives=schemas.OwnToken)
def list_own_tokens(query: dict[str, Any]) -> Any:
    """List one's own tokens, without the tokens themselves."""
    user, token, session = current_user(), bearer_token(), auth.current_session()
    current = tokens.hash_token(token) if token else session.token_hash if session else b""
    return paginate(
        query,
        lambda after, limit: tokens.list_tokens(user.id, after=after or 0, limit=limit, current=current),
        lambda token: token["id"],
    )


@api.delete("/me/tokens/<id:token_id>")
@endpoint(status=204)
def revoke_own_token(token_id: int) -> None:
    """Revoke one of one's own tokens, now, with the sessions and streams that it opened."""
    tokens.revoke_token(current_user().id, token_id)


@api.delete("/me/sessions")
@endpoint(status=204)
def end_own_sessions() -> None:
    """Sign out everywhere: end all of one's sessions in browsers. Tokens stay valid."""
    sessions.end_all_sessions(current_user().id)


@api.get("/channels")
@endpoint(query=schemas.Page, gives=schemas.Channel)
def list_own_channels(query: dict[str, Any]) -> Any:
    """The channels that one may see."""
    return paginate(
        query,
        lambda after, limit: visible_channels(current_user(), after=after or 0, limit=limit),
        lambda channel: channel["id"],
    )


@api.get("/channels/<id:channel_id>/mention-suggestions")
@endpoint(query=schemas.MentionSuggestionQuery, gives=schemas.MentionSuggestionList)
def list_mention_suggestions(channel_id: int, query: dict[str, Any]) -> Any:
    """Whom one may mention in a channel, by the beginning of a username; for moderators, groups as well."""
    channel = get_visible_channel(current_user(), channel_id)
    return {"items": suggest_mentions(channel, query["q"], query["limit"]), "next": None}


@api.get("/users")
@endpoint(query=schemas.UserPage, gives=schemas.User, admin=True)
def list_users(query: dict[str, Any]) -> Any:
    """Everybody, or the one with a username."""
    return paginate(
        query,
        lambda after, limit: users.list_users(after=after or 0, limit=limit, username=query["username"]),
        lambda user: user.id,
    )


@api.post("/users")
@endpoint(body=schemas.UserIn, gives=schemas.User, status=201, admin=True)
def create_user(body: dict[str, Any]) -> ApiResponse:
    """A new person."""
    user = users.create_user(**body)
    return ApiResponse(users.find_user(user.id), headers={"Location": f"/api/users/{user.id}"})


@api.get("/users/<id:user_id>")
@endpoint(gives=schemas.User, admin=True)
def get_user(user_id: int) -> Any:
    """One person."""
    return users.find_user(user_id)


@api.patch("/users/<id:user_id>")
@endpoint(body=schemas.UserChange, gives=schemas.User, admin=True)
def update_user(user_id: int, body: dict[str, Any]) -> Any:
    """Change a person's name or e-mail address, or make them an admin."""
    return users.update_user(user_id, body)


@api.get("/users/<id:user_id>/subscription")
@endpoint(gives=schemas.Subscription, admin=True)
def get_subscription(user_id: int) -> Any:
    """A person's subscription; null where there never was one."""
    return subscriptions.subscription_of(user_id)


@api.put("/users/<id:user_id>/subscription")
@endpoint(body=schemas.SubscriptionIn, gives=schemas.Subscription, admin=True)
def put_subscription(user_id: int, body: dict[str, Any]) -> Any:
    """Say what the payment provider says. The same again changes nothing."""
    return subscriptions.set_subscription(user_id, body["status"], body["current_period_end"])


@api.get("/users/<id:user_id>/tokens")
@endpoint(query=schemas.Page, gives=schemas.Token, admin=True)
def list_tokens(user_id: int, query: dict[str, Any]) -> Any:
    """A person's tokens, without the tokens themselves."""
    return paginate(
        query,
        lambda after, limit: tokens.list_tokens(user_id, after=after or 0, limit=limit),
        lambda token: token["id"],
    )


@api.post("/users/<id:user_id>/tokens")
@endpoint(body=schemas.TokenIn, gives=schemas.Token, status=201, admin=True, optional_body=True)
def create_token(user_id: int, body: dict[str, Any]) -> Any:
    """A new token. It is shown this once."""
    stored, token = tokens.create_token(users.find_user(user_id), body["expires_at"])
    return {**stored, "token": token}


@api.delete("/users/<id:user_id>/tokens/<id:token_id>")
@endpoint(status=204, admin=True)
def revoke_token(user_id: int, token_id: int) -> None:
    """End a token, now."""
    tokens.revoke_token(user_id, token_id)
