"""What is done to waiting tasks, on a broker in memory: a bug of the library's own in any step moves no message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.signals import task_revoked
from kombu import Producer, Queue

from resilient_tasks import Breaker, Resilience
from resilient_tasks.worker import deferred_tasks
from resilient_tasks.worker.broker_queues import PublishedQueues
from resilient_tasks.worker.celery_internals import Events
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.deferred_tasks import DeferredTasks, Resumer
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Entry, Queues
from workers.processes import Server, wait_until

DEFERRED, DEAD, ORIGIN = "resilient.deferred.payments", "resilient.dead.payments", "shop"
TASKS = 5
READING: list[tuple[Any, str]] = [
    (Envelope, "read"),
    (Queues, "_entry"),
    (Entry, "_field"),
    (PublishedQueues, "_entries"),
]
ENDING: list[tuple[Any, str]] = [
    (DeferredTasks, "_settle"), (DeferredTasks, "_request"), (PublishedQueues, "move"), (PublishedQueues, "_publish"),
    (Envelope, "write"), (deferred_tasks, "revoked_among"), (deferred_tasks, "superseded_among"),
]  # fmt: skip


@pytest.fixture
def resilience(app: Celery, server: Server) -> Iterator[Resilience]:
    resilience = Resilience(app, store_url=server.url())
    yield resilience
    resilience.fleet.close()


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("bugs", broker="memory://", backend="cache+memory://", set_as_current=False)

    @app.task(name="bugs-charge", shared=False, breaker="payments")
    def charge() -> None: ...

    queues = [Queue(name) for name in (DEFERRED, DEAD, ORIGIN)]
    with app.connection_for_write() as connection:
        for queue in queues:
            queue(connection.default_channel).declare()
        for _ in range(TASKS):
            headers = Envelope("payments", ORIGIN, since=1.0).write({"id": str(uuid4()), "task": "bugs-charge"})
            Producer(connection).publish([[], {}, {}], routing_key=DEFERRED, headers=headers)
        yield app
        for queue in queues:
            queue(connection.default_channel).purge()


def defer(app: Celery, envelope: Envelope, task_id: str) -> None:
    with app.connection_for_write() as connection:
        headers = envelope.write({"id": task_id, "task": "bugs-charge"})
        Producer(connection).publish([[], {}, {}], routing_key=DEFERRED, headers=headers)


@contextmanager
def receiving(signal: Any, receiver: Callable[..., object]) -> Iterator[None]:
    signal.connect(receiver)
    yield
    signal.disconnect(receiver)


def sizes(resilience: Resilience) -> tuple[int, int]:
    return resilience.deferred.count("payments"), resilience.dead_letters.count()["payments"]


def strike(
    monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], error: type[Exception], act: Callable[[], Any]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(*step, fail)
        with pytest.raises(error, match="a bug"):
            act()


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, RuntimeError])
def test_a_bug_in_looking_moves_nothing(
    resilience: Resilience, payments: Breaker, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    for step in READING:
        strike(monkeypatch, step, error, lambda: resilience.deferred.list("payments"))
        strike(monkeypatch, step, error, lambda: resilience.deferred.drop("payments"))
        assert sizes(resilience) == (TASKS, 0)
    assert len(resilience.deferred.list("payments")) == TASKS


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, RuntimeError])
def test_a_bug_in_resuming_or_ending_moves_nothing(
    resilience: Resilience, payments: Breaker, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    for step in (*READING, *ENDING):
        act: Any = resilience.deferred.drop if step in ENDING[:2] else resilience.deferred.resume
        strike(monkeypatch, step, error, partial(act, "payments"))
        assert sizes(resilience) == (TASKS, 0), step
    assert resilience.deferred.resume("payments") == TASKS
    assert sizes(resilience) == (0, 0)


@pytest.mark.parametrize("step", READING)
def test_a_bug_in_looking_at_dead_letters_moves_nothing(
    resilience: Resilience, payments: Breaker, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str],
    app: Celery,
) -> None:  # fmt: skip
    envelope = Envelope("payments", ORIGIN).dead_letter(1.0, "made up")
    with app.connection_for_write() as connection:
        headers = envelope.write({"id": "an-id", "task": "bugs-charge"})
        Producer(connection).publish([[], {}, {}], routing_key=DEAD, headers=headers)
    for act in (resilience.dead_letters.list, lambda: resilience.dead_letters.replay("an-id")):
        strike(monkeypatch, step, KeyError, act)
    assert sizes(resilience) == (TASKS, 1)
    assert resilience.dead_letters.replay("an-id") == {"payments": 1}


def test_what_is_no_task_is_dead_lettered_and_looking_leaves_it(
    app: Celery, resilience: Resilience, payments: Breaker
) -> None:
    with app.connection_for_write() as connection:
        for headers in (
            {},
            {"id": 5, "task": "bugs-charge"},
            Envelope(origin=DEFERRED).write({"id": "a", "task": "b"}),
        ):
            Producer(connection).publish(b"{", routing_key=DEFERRED, headers=headers, content_type="application/json")
    assert len(resilience.deferred.list("payments")) == TASKS
    assert sizes(resilience) == (TASKS + 3, 0)
    assert resilience.deferred.resume("payments") == TASKS
    assert sizes(resilience) == (0, 3)


def test_tasks_may_come_from_any_queue_below_the_namespace(
    app: Celery, resilience: Resilience, payments: Breaker
) -> None:
    with app.connection_for_write() as connection:
        Queue("resilient.emails")(connection.default_channel).declare()
        headers = Envelope("payments", "resilient.emails").write({"id": "an-id", "task": "bugs-charge"})
        Producer(connection).publish([[], {}, {}], routing_key=DEFERRED, headers=headers)
    assert resilience.deferred.resume("payments") == TASKS + 1
    assert sizes(resilience) == (0, 0)


def test_a_task_whose_message_cannot_be_moved_comes_to_its_end_once(
    resilience: Resilience, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    revoked: list[str] = []
    deferred = resilience.deferred
    with receiving(task_revoked, lambda request, **_: revoked.append(request.id)):
        for _ in range(3):
            strike(monkeypatch, (PublishedQueues, "move"), OSError, lambda: deferred.drop("payments"))
        assert sizes(resilience) == (TASKS, 0)
        assert len(deferred.drop("payments")) == TASKS
        wait_until(lambda: len(revoked) == len(set(revoked)) == TASKS, what="the signals")


def test_trials_are_tasks_that_have_never_failed_if_there_are_any(
    app: Celery, resilience: Resilience, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    resilience.deferred.drop("payments")
    for task_id in "abcde":
        defer(app, Envelope("payments", ORIGIN, attempted_at=float(task_id == "a")), task_id)
    monkeypatch.setattr(deferred_tasks, "PAGE", 2)
    runtime = runtime_of(app)
    resumer = Resumer(runtime, DeferredTasks(runtime, Events(app), runtime.queues))
    snapshot = payments.snapshot()
    assert resumer.release(payments._dependency, snapshot, 3, unfailed_first=True) == ["b", "a", "c"]
    assert sorted(resumer.release(payments._dependency, snapshot, 3, unfailed_first=True)) == ["d", "e"]


def test_only_tasks_for_queues_that_are_consumed_are_waited_for(
    app: Celery, resilience: Resilience, payments: Breaker
) -> None:
    resilience.deferred.drop("payments")
    runtime, queues = runtime_of(app), (ORIGIN, "elsewhere", ORIGIN)
    for task_id, queue in zip("abc", queues, strict=True):
        defer(app, Envelope("payments", queue), task_id)
    ledger = runtime.fleet.ledger
    ledger.taken_up("payments", ledger.pace("payments").outstanding)
    ledger.attend("a worker", [ORIGIN])
    resumer = Resumer(runtime, DeferredTasks(runtime, Events(app), runtime.queues))
    assert resumer.release(payments._dependency, payments.snapshot(), 3) == ["a", "b", "c"]
    assert ledger.pace("payments").outstanding == 2


def test_some_tasks_are_resumed_by_their_ids(app: Celery, resilience: Resilience, payments: Breaker) -> None:
    for task_id in "abc":
        defer(app, Envelope("payments", ORIGIN, not_before=2e9), task_id)
    assert resilience.deferred.resume_some("payments", ["c", "unknown", "a"]) == ("c", "a")
    assert sizes(resilience) == (TASKS + 1, 0)


def test_a_task_that_is_deferred_afresh_comes_to_its_end_afresh(
    app: Celery, resilience: Resilience, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    deferred = resilience.deferred
    deferred.drop("payments")
    defer(app, Envelope("payments", ORIGIN, since=1.0), "again")
    with monkeypatch.context() as patch:
        patch.setattr(PublishedQueues, "move", lambda *_: iter(()))  # another process has moved it
        assert deferred.drop("payments") == ()
    with app.connection_for_write() as connection:
        Queue(DEFERRED)(connection.default_channel).purge()
    app.backend.store_result("again", None, "PENDING")
    defer(app, Envelope("payments", ORIGIN, since=2.0), "again")
    assert deferred.drop("payments") == ("again",)
    assert app.AsyncResult("again").state == "REVOKED"
