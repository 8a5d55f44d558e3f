"""What a producer does while a breaker refuses, on a broker in this process's memory and without a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from celery import Celery, chain, group
from celery.result import EagerResult
from celery.signals import before_task_publish
from kombu import Exchange, Producer, Queue
from kombu.exceptions import OperationalError
from kombu.transport import memory

from resilient_tasks import Breaker, BreakerOpenError, ConfigurationError, Resilience, cached, constant
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker.envelope import Envelope

pytestmark = pytest.mark.usefixtures("clock")  # breakers are in memory
DEFERRED = "resilient.deferred.payments"


@pytest.fixture
def app() -> Iterator[Celery]:
    for kept in (memory.Channel.queues, memory.Channel.events):  # also what other tests have left
        kept.clear()
    yield Celery("producers", broker="memory://", backend="cache+memory://", set_as_current=False)
    for kept in (memory.Channel.queues, memory.Channel.events):
        kept.clear()


@pytest.fixture
def resilience(app: Celery) -> Resilience:
    return Resilience(app, gate_producers=True)


@pytest.fixture
def task(app: Celery, payments: Breaker) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        @app.task(name="charge", shared=False, **{"breaker": "payments", **options})
        def charge(order: int) -> int:
            raise AssertionError("no worker runs here")

        return charge

    return make


def messages(app: Celery, queue: str) -> list[Any]:
    """Take all messages of a queue."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        taken = iter(lambda: channel.basic_get(queue, no_ack=True) if channel._has_queue(queue) else None, None)
        return list(taken)


def orders(app: Celery, queue: str) -> list[int]:
    return [message.payload[0][0] for message in messages(app, queue)]


# --- accepting ----------------------------------------------------------------------------------------


def test_a_breaker_accepts_until_it_refuses_and_again_as_soon_as_a_trial_may_be_made(
    payments: Breaker, clock: Clock
) -> None:
    assert payments.accepting
    force(payments, "OPEN")
    assert not payments.accepting
    clock.advance(10)
    assert payments.state == "HALF_OPEN"
    assert payments.accepting, "or no producer would ever find out that the dependency is back"
    for state, accepting in (("FORCED_OPEN", False), ("DISABLED", True), ("SHADOW", True)):
        force(payments, state)
        assert payments.accepting is accepting


def test_trials_of_a_breaker_with_a_probe_are_not_the_producers(payments: Breaker, clock: Clock) -> None:
    payments.probe(lambda: None)
    force(payments, "OPEN")
    clock.advance(10)
    assert not payments.accepting


# --- on_open ------------------------------------------------------------------------------------------


def test_fail_raises_and_publishes_nothing(app: Celery, task: Any, payments: Breaker) -> None:
    charge = task()
    charge.apply_async((1,), on_open="fail")
    force(payments, "OPEN")
    for send in (charge.apply_async, lambda args, **options: charge.s(*args).set(**options).apply_async()):
        with pytest.raises(BreakerOpenError) as refused:
            send((2,), on_open="fail")
        assert (refused.value.breaker, refused.value.state, refused.value.retry_after) == (
            "payments", "OPEN", pytest.approx(10, abs=5),
        )  # fmt: skip
    assert (orders(app, "celery"), orders(app, DEFERRED)) == ([1], [])


def test_a_fallback_answers_at_once(app: Celery, task: Any, resilience: Resilience, payments: Breaker) -> None:
    charge = task(fallback=lambda order: order * 100)
    assert not isinstance(charge.apply_async((1,), on_open="fallback"), EagerResult)
    force(payments, "OPEN")
    result = charge.apply_async((2,), on_open="fallback")
    assert (result.get(), result.state, result.name) == (200, "SUCCESS", "charge")
    provenance = resilience.provenance(result.id)
    assert provenance is not None
    assert (provenance.source, provenance.breaker) == ("<lambda>", "payments")
    assert orders(app, "celery") == [1]


@pytest.mark.parametrize(
    ("stores_eager_results", "options", "state"),
    [(False, {}, "PENDING"), (False, {"task_id": "mine"}, "SUCCESS"), (True, {}, "SUCCESS")],
)
def test_the_answer_is_in_the_backend_if_the_id_was_known_or_eager_results_are_stored(
    app: Celery, task: Any, payments: Breaker, options: dict[str, str], state: str, *, stores_eager_results: bool
) -> None:
    app.conf.task_store_eager_result = stores_eager_results
    charge = task(fallback=constant("n/a"))
    force(payments, "OPEN")
    result = app.AsyncResult(charge.apply_async((1,), on_open="fallback", **options).id)
    assert (result.state, result.result) == (state, None if state == "PENDING" else "n/a")


@pytest.mark.parametrize("on_open", ["defer", "fail"])
def test_without_an_answer_the_tasks_own_option_counts(app: Celery, task: Any, payments: Breaker, on_open: str) -> None:
    charge = task(fallback=cached(max_age=60), on_open=on_open)
    force(payments, "OPEN")
    if on_open == "fail":
        with pytest.raises(BreakerOpenError):
            charge.apply_async((1,), on_open="fallback")
    else:
        charge.apply_async((1,), on_open="fallback")
    assert orders(app, "celery") == ([] if on_open == "fail" else [1])


def test_a_task_that_something_waits_for_is_published(app: Celery, task: Any, payments: Breaker) -> None:
    charge = task(fallback=constant("n/a"))
    force(payments, "OPEN")
    charge.apply_async((1,), on_open="fallback", link=charge.s())
    member = charge.si(2).set(on_open="fallback")
    chain(member, member).apply_async()
    group(member, charge.si(3).set(on_open="fail")).apply_async()
    assert orders(app, "celery") == [1, 2, 2, 3]
    with pytest.raises(BreakerOpenError):
        chain(charge.si(4).set(on_open="fail"), charge.si(5)).apply_async()
    assert orders(app, "celery") == [], "nothing of it has begun"


@pytest.mark.parametrize("on_open", ["defer", "", 1, "Fail", "fallback"])
def test_another_word_is_refused_and_a_fallback_that_is_not_there(task: Any, on_open: Any) -> None:
    complaint = "it has no fallback" if on_open == "fallback" else "a sender may say 'fail' or 'fallback'"
    with pytest.raises(ConfigurationError, match=f"^task 'charge': on_open={on_open!r}: {complaint}"):
        task().apply_async((1,), on_open=on_open)


def test_a_task_without_a_breaker_takes_no_such_option(app: Celery) -> None:
    @app.task(name="plain", shared=False)
    def plain() -> None: ...

    with pytest.raises(ConfigurationError, match=r"task 'plain': on_open='fail': it names no breaker"):
        plain.apply_async(on_open="fail")
    plain.apply_async((), {}, "an id")
    assert messages(app, "celery")[0].headers["id"] == "an id"


def test_one_of_several_breakers_is_enough_to_refuse(
    app: Celery, task: Any, resilience: Resilience, payments: Breaker
) -> None:
    carrier = resilience.breaker("carrier")
    charge = task(breaker=[payments, carrier])
    force(carrier, "OPEN")
    with pytest.raises(BreakerOpenError) as refused:
        charge.apply_async((1,), on_open="fail")
    assert refused.value.breaker == "carrier"
    charge.delay(2)
    assert orders(app, "resilient.deferred.carrier") == [2]


# --- the setting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["direct", "topic"])
def test_a_refused_task_is_published_into_the_deferred_queue(
    app: Celery, task: Any, payments: Breaker, clock: Clock, exchange: str
) -> None:
    app.conf.task_queues = [Queue("tills", Exchange(f"to-tills-{exchange}", exchange), routing_key="till.1")]
    app.conf.task_default_queue = "tills"
    charge = task(defer_for=60)
    force(payments, "OPEN")
    result = charge.apply_async((1,), expires=30, priority=3, headers={"x-trace": "abc"}, reply_to="replies")
    assert (result.state, result.info["breaker"]) == ("DEFERRED", "payments")
    [waiting] = messages(app, DEFERRED)
    assert waiting.payload[:2] == [[1], {}]
    assert (waiting.headers["id"], waiting.headers["x-trace"]) == (result.id, "abc")
    assert (waiting.properties["priority"], waiting.properties["reply_to"]) == (3, "replies")
    assert waiting.properties["correlation_id"] == result.id
    envelope = Envelope.read(waiting.headers)
    assert (envelope.breaker, envelope.origin, envelope.attempts) == ("payments", "tills", 0)
    assert envelope.since == result.info["since"] == pytest.approx(clock(), abs=5)
    assert envelope.deadline == envelope.since + 60
    assert envelope.expires == pytest.approx(clock() + 30, abs=5)
    assert "payments" in envelope.reason
    assert messages(app, "tills") == []


def test_what_is_admitted_is_published_as_ever(app: Celery, task: Any, payments: Breaker) -> None:
    charge = task()
    charge.delay(1)
    force(payments, "OPEN")
    charge.delay(2)
    force(payments, "SHADOW")
    charge.delay(3)
    assert (orders(app, "celery"), orders(app, DEFERRED)) == ([1, 3], [2])


@pytest.mark.parametrize("options", [{"fallback": constant("n/a")}, {"on_open": "fail"}])
def test_a_refusal_that_a_worker_has_to_answer_is_left_to_it(
    app: Celery, task: Any, payments: Breaker, options: dict[str, Any]
) -> None:
    charge = task(**options)
    force(payments, "OPEN")
    charge.delay(1)
    assert orders(app, "celery") == [1]


@pytest.mark.parametrize(
    "options",
    [{"countdown": 10}, {"retries": 1}, {"exchange": "elsewhere", "routing_key": "some.key"}],
    ids=["not due yet", "a retry", "routed by its exchange"],
)
def test_what_a_producer_cannot_put_into_its_place_is_published_as_usual(
    app: Celery, task: Any, payments: Breaker, options: dict[str, Any]
) -> None:
    charge = task()
    with app.connection_for_write() as connection:
        Queue("celery", Exchange("elsewhere"), routing_key="some.key")(connection.default_channel).declare()
    force(payments, "OPEN")
    charge.apply_async((1,), **options)
    assert (orders(app, "celery"), orders(app, DEFERRED)) == ([1], [])


def test_a_message_of_the_first_protocol_is_published_as_usual(app: Celery, task: Any, payments: Breaker) -> None:
    app.conf.task_protocol = 1
    charge = task()
    force(payments, "OPEN")
    charge.delay(1)
    assert len(messages(app, "celery")) == 1


def test_a_full_queue_is_the_workers_business(app: Celery, resilience: Resilience) -> None:
    narrow = resilience.breaker("narrow", max_deferred=1)

    @app.task(name="squeeze", shared=False, breaker=narrow)
    def squeeze(number: int) -> None: ...

    force(narrow, "OPEN")
    for number in range(3):
        squeeze.delay(number)
    assert (orders(app, "resilient.deferred.narrow"), orders(app, "celery")) == ([0], [1, 2])


def test_a_broker_that_takes_no_deferral_gets_the_task_as_usual(
    app: Celery, task: Any, payments: Breaker, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    charge = task()
    force(payments, "OPEN")
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr("resilient_tasks.worker.deferral.Deferral.defer", Mock(side_effect=OperationalError))
        charge.delay(1)
    assert "is published as usual: OperationalError(" in caplog.text
    charge.delay(2)
    assert (orders(app, "celery"), orders(app, DEFERRED)) == ([1], [2])


def test_what_others_add_while_it_is_published_comes_along(app: Celery, task: Any, payments: Breaker) -> None:
    def trace(headers: dict[str, Any], **_: Any) -> None:
        headers["traceparent"] = "00-1"

    charge = task()
    force(payments, "OPEN")
    before_task_publish.connect(trace)
    try:
        charge.delay(1)
    finally:
        before_task_publish.disconnect(trace)
    assert messages(app, DEFERRED)[0].headers["traceparent"] == "00-1"


def test_the_event_of_a_sending_is_sent(
    app: Celery, task: Any, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Any] = []
    monkeypatch.setattr(Producer, "publish", lambda _, body, **sent: published.append((body["type"], body["queue"])))
    monkeypatch.setattr("resilient_tasks.worker.task.ProducersGate._try_to_defer", lambda *_: True)
    app.conf.task_send_sent_event = True
    charge = task()
    force(payments, "OPEN")
    charge.delay(1)
    assert published == [("task-sent", "celery")]


def test_members_of_workflows_wait_as_what_they_are(app: Celery, task: Any, payments: Breaker) -> None:
    charge = task()
    force(payments, "OPEN")
    chain(charge.si(1), charge.si(2)).apply_async()
    whole = group(charge.si(3), charge.si(4)).apply_async()
    waiting = messages(app, DEFERRED)
    assert [message.payload[0][0] for message in waiting] == [1, 3, 4]
    assert waiting[0].payload[2]["chain"][0]["args"] == [2]
    assert [message.headers["group"] for message in waiting[1:]] == [whole.id] * 2
    assert {result.state for result in whole} == {"DEFERRED"}


def test_eager_tasks_are_sent_nowhere(app: Celery, task: Any, payments: Breaker) -> None:
    app.conf.task_always_eager = True
    charge = task()
    force(payments, "OPEN")
    with pytest.raises(BreakerOpenError):
        charge.apply_async((1,), throw=True)


def test_compressed_and_pickled_arguments_come_through(app: Celery, task: Any, payments: Breaker) -> None:
    app.conf.accept_content = ["pickle"]
    charge = task()
    force(payments, "OPEN")
    charge.apply_async(({1, 2},), serializer="pickle", compression="zlib")
    [waiting] = messages(app, DEFERRED)
    waiting.accept = {"application/x-python-serialize"}
    assert waiting.payload[0] == ({1, 2},)
