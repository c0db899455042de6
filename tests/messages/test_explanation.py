"""`explain` says what was recorded, and what is decided by the rules and settings of now."""

import pytest

from belfry.core.db import execute, fetch_one
from belfry.core.errors import NotFound
from belfry.fanout import recovery
from belfry.fanout.decision import DECISIONS
from belfry.messages import messages
from belfry.messages.explanation import explain
from belfry.messages.send_test import send_test
from belfry.servers import preferences
from tests.fanout_helpers import post, post_and_notify, run_to_end

BY_NOW = "They have no notification, so this is the decision by the rules and settings of now."


def detail(message_id: int, person) -> str:
    return str(explain(None, message_id, person.user.id)["detail"])


def test_a_decision_without_a_notification_is_said_to_be_of_now(cast):
    preferences.set_preference(cast.vip.user, cast.general, "none", None)
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    assert detail(message_id, cast.vip) == f"{DECISIONS['channel_off']} {BY_NOW}"
    preferences.set_preference(cast.vip.user, cast.general, "all", None)
    found = explain(None, message_id, cast.vip.id)
    assert (found["decision"], found["notified_at"]) == ("message", None)
    assert found["detail"].endswith(BY_NOW)


def test_a_recorded_decision_and_that_of_the_author_do_not_depend_on_now(cast):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    preferences.set_preference(cast.vip.user, cast.general, "none", None)
    found = explain(None, message_id, cast.vip.id)
    assert (found["decision"], "of now" in found["detail"]) == ("message", False)
    assert "of now" not in detail(message_id, cast.subscriber)


def test_a_removed_notification_is_said_to_be_removed(cast, api):
    message_id = post_and_notify(cast.subscriber, cast.general, "gold")
    assert api(cast.vip).delete(f"/api/notifications/{cast.vip.id}-{message_id}").status_code == 204
    assert detail(message_id, cast.vip).endswith("They have removed the notification from their inbox.")


def test_an_unfinished_and_a_failed_run_are_named(cast):
    message_id, run_id = post(cast.subscriber, cast.general)
    assert detail(message_id, cast.vip).endswith("They are not notified yet: the fan-out is not finished.")
    execute("UPDATE run SET state = 'failed', error = 'the disk is full', finished_at = now(), sweep_after = NULL")
    assert detail(message_id, cast.vip).endswith("They are not notified yet: the fan-out failed.")
    recovery.retry_failed([run_id])
    assert run_to_end(run_id) == "succeeded"
    assert "not notified" not in detail(message_id, cast.vip)


def test_a_deleted_message_waits_for_no_run(cast):
    message_id, _ = post(cast.subscriber, cast.general)
    messages.delete_message(cast.subscriber.user, message_id)
    assert "They are not notified yet" not in detail(message_id, cast.vip)


def test_a_test_message_for_another_user_is_named_as_such(cast):
    run_id = send_test(cast.admin.user, cast.general, None, "me")
    message_id = fetch_one("SELECT message_id FROM run WHERE id = %(id)s", {"id": run_id})["message_id"]
    with pytest.raises(NotFound, match="is a test message for another user"):
        explain(cast.admin.user, message_id, cast.vip.id)
    with pytest.raises(NotFound, match="There is no message"):
        explain(cast.vip.user, message_id, cast.vip.id)
