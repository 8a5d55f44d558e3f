"""Dead letters where deferring is one atomic step, and where it is publish, confirm, acknowledge."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery.result import AsyncResult
from kombu import Producer

from resilient_tasks import DeadLetterError, Resilience
from resilient_tasks.operations.waiting import DeadLetters
from tests.integration.post_office import TIMEOUT, PostOffice

SEEN = ("args", "kwargs", "headers", "expires", "reply_to", "correlation_id", "timelimit", "retries", "stamps", "id")


@pytest.fixture
def dead_letters(post: PostOffice) -> Iterator[DeadLetters]:
    """The API as a process has it that is no worker; all that former tests have left is dropped."""
    app = post.producer()
    resilience = Resilience(app, store_url=post.env["RESILIENT_TASKS_STORE_URL"], store_timeout=20, namespace="post")
    for name, breaker in post.operator.breakers.items():
        resilience.breaker(name, breaker.policy)
    dead_letters = resilience.dead_letters
    dead_letters.drop(*(dead.task_id for dead in dead_letters.list()))
    yield dead_letters
    post.side.delete("health:describe_once")
    app.close()


def fresh(post: PostOffice, result: AsyncResult) -> AsyncResult:
    """Return a result as a process sees it that has not seen the task fail."""
    return post.producer().AsyncResult(result.id)


def wait_for_the_last_attempt(post: PostOffice, result: AsyncResult) -> None:
    """Let the dependency serve others, so that failures count, until a task has failed for good."""

    def served_another_task_and_failed() -> bool:
        return post.task("ship", 1).delay().get(timeout=TIMEOUT) == 1 and result.state == "FAILURE"

    post.wait(served_another_task_and_failed, "the attempts to be used up")


def test_out_of_attempts_and_back(post: PostOffice, dead_letters: DeadLetters) -> None:
    options: dict[str, Any] = {
        "priority": 3, "headers": {"x-trace": "abc"}, "expires": datetime.now(timezone.utc) + timedelta(hours=1),
        "time_limit": 100, "soft_time_limit": 90, "stamped_headers": ["tenant"], "tenant": "acme",
        "link_error": post.task("note", "failed").set(immutable=True),
    }  # fmt: skip
    sent = post.task("describe_once", 1, two="2")
    straight = sent.apply_async(**options).get(timeout=TIMEOUT)
    post.side.set("health:describe_once", "down")
    result = sent.apply_async(**options)
    wait_for_the_last_attempt(post, result)
    post.wait(lambda: dead_letters.count("carrier") == {"carrier": 1}, "the dead letter")
    post.wait(lambda: post.notes() == [["failed"]], "the error callback")
    dead = dead_letters.show(result.id)
    assert (dead.task, dead.origin, dead.attempts, dead.args) == ("describe_once", "post", 1, "(1,)")
    assert dead.reason == "out of attempts (max_attempts=1): ConnectionError"
    post.side.delete("health:describe_once")
    dead_letters.replay(result.id)
    again = fresh(post, result)
    post.wait_state("SUCCESS", [again])
    own = {"id": result.id, "correlation_id": result.id}
    assert {name: again.result[name] for name in SEEN} == {**{name: straight[name] for name in SEEN}, **own}
    assert again.result["delivery_info"]["priority"] == 3
    assert dead_letters.count("carrier") == {"carrier": 0}


def test_what_waits_too_long(post: PostOffice, dead_letters: DeadLetters) -> None:
    post.open("payments")
    late = post.task("charge_soon", 1).apply_async()
    # RabbitMQ itself drops a message that expires, even one that waits
    expired = post.task("charge", 2).apply_async(expires=15)
    unhurried = post.task("charge", 3).apply_async(expires=3600)
    post.wait_state("FAILURE", [late])
    post.wait_state("REVOKED", [expired])
    post.wait(lambda: dead_letters.count("payments") == {"payments": 2}, "the dead letters")
    reasons = {dead.task_id: dead.reason for dead in dead_letters.list("payments", limit=10)}
    assert reasons.keys() == {late.id, expired.id}
    assert reasons[expired.id] == "expired"
    assert [step.what for step in dead_letters.show(late.id).history] == ["deferred", "dead"]
    post.close("payments")
    assert unhurried.get(timeout=TIMEOUT) == 3
    dead_letters.replay(late.id)
    post.wait_state("SUCCESS", [fresh(post, late)])
    with pytest.raises(DeadLetterError, match="its expires is over"):
        dead_letters.replay(expired.id)
    dead_letters.drop(expired.id)
    with pytest.raises(DeadLetterError, match=expired.id):
        dead_letters.show(expired.id)


def test_what_cannot_be_decoded(post: PostOffice, dead_letters: DeadLetters) -> None:
    post.open("payments")
    waiting = post.task("charge", 1).apply_async()
    post.wait_until_deferred(1)
    with post.client.connection_for_write() as connection:
        for headers in ({"id": "broken", "task": "charge"}, {}, {"id": 5}):
            Producer(connection).publish(
                b"{", exchange="", routing_key="post.deferred.payments", headers=headers,
                content_type="application/json", content_encoding="utf-8",
            )  # fmt: skip
    post.close("payments")
    assert waiting.get(timeout=TIMEOUT) == 1
    post.wait(lambda: dead_letters.count("payments") == {"payments": 3}, "the dead letters")
    post.wait_state("FAILURE", [post.client.AsyncResult("broken")])
    assert dead_letters.show("broken").body == b"{"
    for dead in dead_letters.list("payments"):
        with pytest.raises(DeadLetterError, match="it is undecodable"):
            dead_letters.replay(dead.task_id)


def test_a_listing_leaves_everything_in_its_place(post: PostOffice, dead_letters: DeadLetters) -> None:
    post.open("payments")
    late = [post.task("charge_soon", order).apply_async() for order in range(4)]
    post.wait_state("FAILURE", late)
    post.wait(lambda: dead_letters.count("payments") == {"payments": 4}, "the dead letters")
    everything = dead_letters.list("payments")
    assert {dead.task_id for dead in everything} == {result.id for result in late}
    assert dead_letters.list("payments", limit=2) == everything[:2]
    assert dead_letters.list("payments") == everything
    dead_letters.drop(everything[1].task_id)
    assert dead_letters.list("payments") == (everything[0], *everything[2:])
