"""A deferred task is the same task: what it sees, what it is part of and what follows it come through."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import StampingVisitor
from celery.result import AsyncResult, GroupResult

from tests.integration.post_office import TIMEOUT, PostOffice

# --- what a task sees of itself -----------------------------------------------------------------------


def _describe(post: PostOffice, protocol: int, expires: datetime) -> AsyncResult:
    return post.producer(task_protocol=protocol).send_task(
        "describe", (1, "two"), {"three": [3]},
        priority=3, headers={"x-trace": "abc"}, reply_to="replies", shadow="a nickname",
        group_id="a-group", root_id="a-root", parent_id="a-parent", expires=expires, time_limit=100, soft_time_limit=90,
        link=post.task("note").set(immutable=True), link_error=post.task("note", "failed"),
    )  # fmt: skip


_SENDERS = re.compile(r"gen\d+@")
_IDS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _comparable(seen: Any) -> Any:
    """Number all ids in the order of their appearance, and leave out what belongs to one sending."""
    numbers: dict[str, str] = {}
    text = _SENDERS.sub("gen@", json.dumps(seen))  # whichever pool process has sent it
    text = _IDS.sub(lambda found: numbers.setdefault(found.group(), f"id {len(numbers)}"), text)
    return json.loads(text, object_hook=lambda fields: {**fields, "expiration": "expiration" in fields})


@pytest.mark.parametrize("protocol", [1, 2])
def test_what_a_task_sees_of_itself(post: PostOffice, protocol: int) -> None:
    expires = datetime.now(timezone.utc) + timedelta(hours=1)
    straight = _describe(post, protocol, expires).get(timeout=TIMEOUT)
    post.open("payments")
    deferred = _describe(post, protocol, expires)
    (seen,) = post.through_an_outage(deferred)
    assert (seen["id"], seen["correlation_id"]) == (deferred.id, deferred.id)
    assert _comparable(seen) == _comparable(straight)


def test_what_a_member_of_a_workflow_sees_of_itself(post: PostOffice) -> None:
    def send() -> AsyncResult:
        members = [post.task("describe", number) for number in range(2)]
        return chain(post.task("collect"), chord(members, post.task("collect")), post.task("collect")).apply_async([1])

    straight = send().get(timeout=TIMEOUT)
    post.open("payments")
    deferred = send()
    post.wait(lambda: post.waiting("payments") == 2, "both members to wait")
    post.close("payments")
    assert _comparable(deferred.get(timeout=TIMEOUT)) == _comparable(straight)


def test_stamps_come_through_a_workflow(post: PostOffice) -> None:
    class Tenant(StampingVisitor):
        def on_signature(self, sig: Any, **_: Any) -> dict[str, str]:
            return {"tenant": "acme"}

    workflow = chain(post.task("charge", 1), post.task("describe"))
    workflow.stamp(Tenant())
    post.open("payments")
    last = workflow.apply_async()
    post.through_an_outage(last.parent)
    seen = last.get(timeout=TIMEOUT)
    assert (seen["stamped_headers"], seen["stamps"]) == (["tenant"], {"tenant": "acme"})


# --- what it is part of -------------------------------------------------------------------------------


def test_each_link_of_a_chain_is_deferred(post: PostOffice) -> None:
    post.open("payments")
    post.open("carrier")
    last = chain(post.task("charge", 7), post.task("ship"), post.task("collect")).apply_async()
    post.wait_state("DEFERRED", [last.parent.parent])
    post.close("payments")
    post.wait_state("DEFERRED", [last.parent])
    post.close("carrier")
    assert last.get(timeout=TIMEOUT) == 7


def test_a_group(post: PostOffice) -> None:
    post.open("payments")
    whole = group(post.task("charge", order) for order in range(4)).apply_async()
    assert post.through_an_outage(*whole.results) == [0, 1, 2, 3]
    assert whole.get(timeout=TIMEOUT) == [0, 1, 2, 3]


@pytest.mark.parametrize("body", ["collect", "charge_all"])
def test_a_chord_across_an_outage(post: PostOffice, body: str) -> None:
    post.side.set("health", "down")
    total = chord([post.task("charge", order) for order in range(4)], post.task(body)).apply_async()
    assert isinstance(total.parent, GroupResult)
    post.wait_state("DEFERRED", total.parent.results)
    post.side.set("health", "up")
    value = total.get(timeout=TIMEOUT)
    assert value == 6 if body == "charge_all" else sorted(value) == [0, 1, 2, 3]


def test_the_body_of_a_chord_is_deferred(post: PostOffice) -> None:
    post.open("payments")
    total = chord([post.task("collect", order) for order in range(3)], post.task("charge_all")).apply_async()
    assert post.through_an_outage(total) == [3]
    assert post.runs("charge_all") == [total.id]


def test_the_error_of_a_deferred_member_fails_the_chord(post: PostOffice) -> None:
    post.open("payments")
    body = post.task("collect").on_error(post.task("note", "chord failed").set(immutable=True))
    total = chord([post.task("charge", 1), post.task("reject", 2)], body).apply_async()
    post.wait_state("DEFERRED", total.parent.results)
    post.close("payments")
    post.wait_state("FAILURE", [total])
    post.wait(post.notes, "the error callback")


# --- what follows it ----------------------------------------------------------------------------------


def test_a_link_fires_once_and_only_at_the_end(post: PostOffice) -> None:
    post.open("payments")
    callbacks = {"link": post.task("note", "linked"), "link_error": post.task("note", "failed")}
    results = [post.task("charge", 5).apply_async(**callbacks), post.task("reject", 6).apply_async(**callbacks)]
    post.wait_state("DEFERRED", results)
    assert post.notes() == []
    post.close("payments")
    post.wait(lambda: len(post.notes()) >= 2, "both callbacks")
    charged, failed = sorted(post.notes())
    assert charged == ["5", "linked"]
    assert failed[1:] == ["failed"] or failed[-1] == "failed"


@pytest.mark.parametrize("protocol", [1, 2])
def test_the_errbacks_of_a_task_that_has_waited_too_long(post: PostOffice, protocol: int) -> None:
    post.open("payments")
    errback = post.task("note", "failed").set(immutable=True)
    result = post.producer(task_protocol=protocol).send_task("charge_soon", (1,), link_error=errback)
    post.wait_state("FAILURE", [result])
    post.wait(lambda: post.notes() == [["failed"]], "the callback")


def test_a_task_is_replaced_by_a_deferred_one(post: PostOffice) -> None:
    post.open("payments")
    result = post.task("delegate", 8).apply_async(link=post.task("note", "linked"))
    assert post.through_an_outage(result) == [8]
    assert post.runs() == [result.id]
    post.wait(lambda: post.notes() == [["8", "linked"]], "the callback")


def test_a_deferred_task_is_replaced(post: PostOffice) -> None:
    post.open("payments")
    result = chain(post.task("charge_and_delegate", 9), post.task("collect")).apply_async()
    post.wait_state("DEFERRED", [result.parent])
    post.close("payments")
    assert result.get(timeout=TIMEOUT) == 9
    assert post.runs("charge_and_delegate") == post.runs() == [result.parent.id]


def test_a_deferral_is_no_retry(post: PostOffice) -> None:
    post.open("payments")
    result = post.task("retried").apply_async()
    assert post.through_an_outage(result) == [[2, 2]]
    assert post.runs("retried") == [result.id] * 3
