"""What Celery promises about when, where and how often a task runs holds for deferred ones."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from tests.integration.post_office import ABROAD, QUEUE, TIMEOUT, PostOffice

# --- when ---------------------------------------------------------------------------------------------


def test_a_task_with_an_eta_is_deferred_when_it_is_due(post: PostOffice) -> None:
    post.open("payments")
    due = datetime.now(timezone.utc) + timedelta(seconds=3.0)
    result = post.task("charge", 1).apply_async(eta=due)
    post.wait(lambda: f"Task charge[{result.id}] received" in post.worker.output(), "it to arrive")
    post.wait_state("DEFERRED", [result])
    assert datetime.now(timezone.utc) > due
    assert post.through_an_outage(result) == [1]


def test_a_countdown_that_ends_after_the_outage_is_kept(post: PostOffice) -> None:
    post.open("payments")
    due = time.time() + 1.0
    result = post.task("paced").apply_async(countdown=1.0)
    post.close("payments")
    assert result.get(timeout=TIMEOUT) >= due


def test_a_rate_limit_holds_for_resumed_tasks(post: PostOffice) -> None:
    post.open("payments")
    times = sorted(post.through_an_outage(*(post.task("paced").apply_async() for _ in range(6))))
    assert times[-1] - times[0] > 1.0  # two a second


def test_a_task_that_waits_for_its_rate_limit_is_deferred_when_its_turn_comes(post: PostOffice) -> None:
    sent: list[Any] = []

    def last_of_ten() -> Any:
        """Return a task whose turn has not come when the breaker opens."""
        post.close("payments")
        sent.extend(post.task("paced").apply_async() for _ in range(10))  # two a second
        sent[-10].get(timeout=TIMEOUT)
        post.open("payments")
        post.wait(lambda: sent[-1].state in ("DEFERRED", "SUCCESS"), "its turn")
        return sent[-1] if sent[-1].state == "DEFERRED" else None

    post.through_an_outage(post.wait(last_of_ten, "it to open in time"))
    post.wait_state("SUCCESS", sent)


# --- how often ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["charge", "charge_early"])
def test_late_and_early_acknowledgement(post: PostOffice, task: str) -> None:
    post.side.set("health", "down")
    failing = [post.task(task, order).apply_async() for order in range(3)]
    post.wait_state("DEFERRED", failing)
    post.open("payments")
    refused = [post.task(task, order).apply_async() for order in range(3, 6)]
    post.wait_until_deferred(6)
    post.side.set("health", "up")
    post.side.delete(f"runs:{task}")
    assert post.through_an_outage(*failing, *refused) == [0, 1, 2, 3, 4, 5]
    assert sorted(post.runs(task)) == sorted(result.id for result in [*failing, *refused])


def test_reject_on_worker_lost(post: PostOffice) -> None:
    post.open("carrier")
    result = post.task("fragile").apply_async()
    post.wait_state("DEFERRED", [result])
    post.close("carrier")
    assert result.get(timeout=TIMEOUT) is True
    assert post.runs("fragile") == [result.id] * 2


@pytest.mark.parametrize(
    ("limit", "error"), [("time_limit", TimeLimitExceeded), ("soft_time_limit", SoftTimeLimitExceeded)]
)
def test_a_time_limit(post: PostOffice, limit: str, error: type[Exception]) -> None:
    post.open("carrier")
    result = post.task("slow").apply_async(**{limit: 2})
    post.wait_state("DEFERRED", [result])
    post.close("carrier")
    with pytest.raises(error):
        result.get(timeout=TIMEOUT)


def test_a_compressed_message(post: PostOffice) -> None:
    post.open("payments")
    result = post.task("charge", "x" * 1000).apply_async(compression="gzip")
    assert post.through_an_outage(result) == ["x" * 1000]


# --- where --------------------------------------------------------------------------------------------


def _let_go(post: PostOffice, queue: str, count: int) -> list[Any]:
    """Have ``count`` waiting tasks resumed to a queue that no worker consumes meanwhile, and look at their messages."""
    control, options = post.client.control, {"reply": True, "timeout": TIMEOUT, "limit": 1}
    with post.client.connection_for_write() as connection:  # those of the pool may be of an earlier server's time
        control.cancel_consumer(queue, connection=connection, **options)
    post.close("payments")
    with post.client.connection_for_read() as connection:
        bound = post.client.amqp.queues[queue](connection.default_channel)
        bound.declare()
        # a message counts as resumed a moment before it lies on its queue
        post.wait(lambda: bound.queue_declare().message_count == count, "all to be resumed")
        messages = [bound.get() for _ in range(count)]
        for message in messages:
            message.requeue()
    with post.client.connection_for_write() as connection:
        control.add_consumer(queue, connection=connection, **options)
    return messages


def test_a_task_returns_to_the_queue_that_it_came_from(post: PostOffice) -> None:
    post.open("payments")
    results = [post.task("describe").apply_async(routing_key=key) for key in ("abroad.france", "post.inland")]
    post.wait_state("DEFERRED", results)
    (message,) = _let_go(post, ABROAD, 1)
    assert message.headers["id"] == results[0].id
    seen = [result.get(timeout=TIMEOUT)["delivery_info"] for result in results]
    assert [(info["exchange"], info["routing_key"]) for info in seen] == [
        ("to-post", "abroad.france"),
        ("to-post", "post.inland"),
    ]


def test_priorities(post: PostOffice) -> None:
    post.open("payments")
    results = [post.task("charge", level).apply_async(priority=level) for level in (3, 9, 0, 6)]
    post.wait_state("DEFERRED", results)
    messages = _let_go(post, QUEUE, 4)
    highest_first = [9, 6, 3, 0] if post.env["POST_BROKER_URL"].startswith("amqp") else [0, 3, 6, 9]
    assert [message.properties["priority"] for message in messages] == highest_first
    assert [message.payload[0] for message in messages] == [[level] for level in highest_first]
    assert [result.get(timeout=TIMEOUT) for result in results] == [3, 9, 0, 6]


# --- to whom ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"), [("forgotten", {}), ("errors_only", {}), ("charge", {"ignore_result": True})]
)
def test_a_result_that_is_ignored_leaves_no_trace(post: PostOffice, task: str, options: dict[str, Any]) -> None:
    post.open("payments")
    result = post.task(task, 1).apply_async(**options)
    post.wait(lambda: post.waiting("payments") == 1, "it to wait")
    assert result.state == "PENDING"
    post.close("payments")
    post.wait(lambda: post.runs(task), "it to run")
    assert post.task("collect", 1).apply_async().get(timeout=TIMEOUT) == 1
    assert result.state == "PENDING"


def test_without_any_result_backend(post: PostOffice) -> None:
    post.open("payments")
    result = post.task("charge_on_nothing", 1).apply_async()
    post.wait(lambda: post.waiting("payments") == 1, "it to wait")
    post.close("payments")
    post.wait(lambda: post.runs("charge_on_nothing") == [result.id], "it to run")


@pytest.mark.parametrize("backend", ["files", "rpc", "sqlite"])
def test_result_backends(post: PostOffice, backend: str) -> None:
    producer = post.producer(post.backends[backend])
    post.open("payments")
    result = producer.send_task(f"charge_on_{backend}", (1,))
    post.wait_state("DEFERRED", [result])
    assert result.info["breaker"] == "payments"
    post.close("payments")
    assert result.get(timeout=TIMEOUT) == 1
    producer.close()
