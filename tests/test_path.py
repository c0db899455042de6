"""The whole path in one process: a message is posted, its job runs, and the right members are notified."""
from models import Notification


def test_posting_notifies_the_right_members(api, cast, run_jobs):
    response = api(cast.subscriber).post(
        "/api/messages", json={"channel_id": cast.general, "content": "gold breaks out, @moira and @bobby"}
    )
    assert response.status_code == 201
    message = response.get_json()
    assert response.headers["Location"] == f"/api/messages/{message['id']}"
    assert message["run"]["state"] == "queued"
    assert message["mentions"]["users"] == [{"id": cast.moderator.id, "username": "moira"}]
    assert message["warnings"] == [{"code": "unknown_mention", "detail": "@bobby is not a member of this server"}]

    assert run_jobs() == 0

    run = api(cast.subscriber).get(message["run"]["url"]).get_json()
    assert run["state"] == "succeeded"
    assert run["progress"] == {"done": 5, "total": 5}
    decisions = {decision: members for decision, members in run["stats"]["decisions"].items() if members}
    assert decisions == {"author": 1, "mention": 1, "message": 2, "no_subscription": 1}
    notified = {(row.user_id, row.reason) for row in Notification.select()}
    assert notified == {(cast.admin.id, "message"), (cast.moderator.id, "mention"), (cast.vip.id, "message")}

    inbox = api(cast.moderator).get("/api/notifications").get_json()
    assert [item["title"] for item in inbox["items"]] == ["You were mentioned in Golden Signals #general"]
    assert inbox["items"][0]["body"] == "Sam: gold breaks out, @moira and @bobby"
