"""The commands of `flask --app app`."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from belfry.core.db import execute
from belfry.identity import tokens
from config import settings
from models import ApiToken, Member, Notification, Run, Subscription, User
from tools.dev import stack


def test_create_user_prints_the_user_and_the_token_once(command, client):
    options = ("--admin", "--display-name", "Gil G", "--token", "--json")
    created = json.loads(command("create-user", "Gil", *options).stdout)
    assert created["username"] == "gil"
    me = client.get("/api/me", headers={"Authorization": f"Bearer {created['token']}"}).get_json()
    assert (me["name"], me["is_admin"]) == ("Gil G", True)
    again = json.loads(command("create-token", "GIL", "--json").stdout)
    assert again["token"] != created["token"]
    assert created["token"] not in command("create-user", "ann", "--subscription", "active").stdout
    assert Subscription.get().status == "active"


def test_a_token_expires_after_the_given_days(command, cast):
    def expires_at(token: str):
        return ApiToken.get(ApiToken.token_hash == tokens.hash_token(token)).expires_at

    created = json.loads(command("create-token", "sam", "--days", "7", "--json").stdout)
    assert datetime.fromisoformat(created["expires_at"]) == expires_at(created["token"])
    assert abs(expires_at(created["token"]) - datetime.now(UTC) - timedelta(days=7)) < timedelta(minutes=5)
    unlimited = json.loads(command("create-token", "sam", "--json").stdout)
    assert unlimited["expires_at"] is expires_at(unlimited["token"]) is None
    env = {**os.environ, "DATABASE_URL": settings.database_url}
    assert expires_at(stack.new_token(env, "sam")), "tokens of `make run` expire"


@pytest.mark.parametrize("name", ["ab", "a" * 33, "everyone", "belfry", "Ünal", "dot.", "_dash", "two words", "nul\0"])
def test_a_username_that_cannot_be_mentioned_is_refused(command, name):
    assert "Error: username: " in command("create-user", name, code=2).output
    assert not User.select().exists()


def test_invalid_options_of_a_user_are_refused_by_name(command):
    assert "Error: email: Must be an e-mail" in command("create-user", "bob", "--email", "here", code=2).output
    assert "Error: name: " in command("create-user", "bob", "--display-name", "x" * 101, code=2).output
    assert not User.select().exists()


def test_taken_and_unknown_usernames_are_reported(command, cast):
    assert command("create-user", "sam", code=1).output == "Error: The username sam is taken.\n"
    assert command("create-token", "nobody", code=1).output == "Error: There is no user nobody.\n"


def test_seed_creates_a_server_with_every_admin_as_a_member(command, cast):
    created = json.loads(command("seed", "--members", "120", "--channels", "4", "--json").stdout)
    assert created["members"] == 120
    assert len(created["channel_ids"]) == 4
    assert created["usernames"][0] == "member-1"
    members = {member.user_id for member in Member.select().where(Member.server == created["server_id"])}
    assert len(members) == 121
    assert cast.admin.id in members
    statuses = {subscription.status for subscription in Subscription.select()}
    assert statuses == {"active", "trialing", "past_due", "canceled"}
    again = json.loads(command("seed", "--members", "10", "--json").stdout)
    assert again["usernames"][0] == "member-121"


def test_seed_refuses_invalid_sizes(command):
    command("seed", code=2)
    command("seed", "--members", "0", code=2)
    command("seed", "--members", "ten", code=2)


def test_send_test_notification_works_on_a_fresh_installation(command, run_jobs):
    assert "There is no admin yet" in command("send-test-notification", code=1).output
    command("create-user", "gil", "--admin")
    sent = json.loads(command("send-test-notification", "--json").stdout)
    assert (sent["kind"], sent["state"]) == ("test", "queued")
    run_jobs()
    shown = json.loads(command("runs", "show", str(sent["id"]), "--json").stdout)
    assert shown["state"] == "succeeded"
    assert shown["stats"]["notified"] == shown["stats"]["audience"] == 1
    notified = Notification.get()
    assert notified.user_id == User.get(User.username == "gil").id
    assert "notified at" in command("explain", str(sent["message_id"]), "gil").stdout


def test_waiting_for_a_failed_run_exits_with_1(command, cast, at_failpoint):
    failure = "UPDATE run SET state = 'failed', finished_at = now(), sweep_after = NULL, error = 'the disk is full'"
    at_failpoint("run.enqueued", lambda: execute(failure))
    output = command("send-test-notification", "--audience", "channel", "--wait", code=1).output
    assert "the disk is full" in output


def test_runs_are_listed_shown_replayed_and_retried(command, api, cast, run_jobs):
    api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    run_jobs()
    assert "succeeded" in command("runs", "list").stdout
    assert command("runs", "list", "--state", "failed").stdout == "no runs\n"
    assert "no_subscription" in command("runs", "show", "1").stdout
    assert command("runs", "show", "99", code=1).output == "Error: There is no run 99.\n"

    dry = json.loads(command("runs", "replay", "1", "--dry-run", "--json").stdout)
    assert (dry["inserted"], dry["unchanged"], dry["run_id"]) == (0, 3, None)
    Subscription.update(status="active").where(Subscription.user == cast.lapsed.id).execute()
    assert "1 notifications to insert, 3 unchanged" in command("runs", "replay", "1", "--dry-run").stdout
    assert Run.select().count() == 1
    assert "1 notifications being inserted, 3 unchanged" in command("runs", "replay", "1").stdout
    run_jobs()
    assert Notification.select().count() == 4

    execute("UPDATE run SET state = 'failed', error = 'the disk is full' WHERE id = 1")
    assert "the disk is full" in command("runs", "list", "--state", "failed").stdout
    command("runs", "retry", code=2)
    assert command("runs", "retry", "--failed").stdout == "1 run(s) retried: 1\n"
    run_jobs()
    assert Run.get_by_id(1).state == "succeeded"
    assert command("runs", "retry", "--failed").stdout == "no failed runs\n"
    assert Notification.select().count() == 4


def test_explain_gives_the_reason(command, api, cast, run_jobs):
    api(cast.subscriber).post("/api/messages", json={"channel_id": cast.general, "content": "gold"})
    run_jobs()
    assert "lars: not notified: no_subscription." in command("explain", "1", "lars").stdout
    found = json.loads(command("explain", "1", "vera", "--json").stdout)
    assert found["decision"] == "message"
    assert "There is no member 6 in" in command("explain", "1", "stan", code=1).output


def test_migrate_can_be_run_again(command):
    assert command("migrate").stdout == "nothing to do\n"
    assert json.loads(command("migrate", "--json").stdout) == {"applied": []}


def test_a_command_without_tables_says_to_migrate(command):
    execute("UPDATE schema_migration SET name = 'another' WHERE name LIKE '0001%%'")
    execute("ALTER TABLE user_account RENAME TO hidden")
    try:
        assert "flask --app app migrate" in command("create-token", "sam", code=1).output
    finally:
        execute("ALTER TABLE hidden RENAME TO user_account")
        execute("UPDATE schema_migration SET name = '0001_initial' WHERE name = 'another'")
