"""Signals of breakers and tasks, in Celery's style."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import Breaker, Resilience, signals
from resilient_tasks.core.model import Transition
from resilient_tasks.monitor.events import _EVENT_OF_STATE, BREAKER_WOULD_OPEN
from resilient_tasks.testing import Clock
from tests.support.doubles import wait_until

Received = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def received() -> Iterator[Received]:
    """Everything that signals send while the test runs."""
    received: Received = []

    def receiver(signal: Any, **fields: Any) -> None:
        received.append((signal.name, fields))

    everything = [getattr(signals, name) for name in signals.__all__]
    for signal in everything:
        signal.connect(receiver)
    yield received
    for signal in everything:
        signal.disconnect(receiver)


def test_every_event_of_a_breaker_is_a_signal_too() -> None:
    assert set(signals._OF_EVENT) == {*_EVENT_OF_STATE.values(), BREAKER_WOULD_OPEN}
    assert {signal.name for signal in signals._OF_EVENT.values()} <= set(signals.__all__)


def test_each_transition_is_sent_once_by_the_app_with_the_transition(
    app: Celery, payments: Breaker, clock: Clock, received: Received
) -> None:
    payments.trip(reason="by hand", actor="ann")
    clock.advance(payments.snapshot().retry_after or 0)
    for _ in range(3):
        payments.call(print)
    for verb in (payments.isolate, payments.isolate, payments.disable, payments.shadow, payments.reset):
        verb()
    wait_until(lambda: len(received) == 7)
    events = ("opened", "half_opened", "closed", "forced_open", "disabled", "shadowed", "closed")
    assert [name for name, _ in received] == [f"breaker_{event}" for event in events]
    assert all(fields["sender"] is app and fields["breaker"] == "payments" for _, fields in received)
    opened: Transition = received[0][1]["transition"]
    assert (opened.name, opened.state, opened.reason, opened.actor) == ("payments", "OPEN", "by hand", "ann")


def test_receivers_run_in_a_thread_of_their_own_and_one_that_raises_does_no_harm(
    payments: Breaker, clock: Clock, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    threads: list[threading.Thread] = []

    @signals.breaker_opened.connect
    def broken(**_: Any) -> None:
        threads.append(threading.current_thread())
        raise ZeroDivisionError

    payments.trip()
    payments.reset()
    wait_until(lambda: len(received) == 2)
    signals.breaker_opened.disconnect(broken)
    assert threads
    assert threads[0] is not threading.current_thread()
    assert "ZeroDivisionError" in caplog.text


def test_signals_without_receivers_cost_no_thread(
    payments: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[object] = []
    monkeypatch.setattr(signals._background, "submit", posted.append)
    payments.trip()
    assert posted == []


def test_without_an_app_there_is_no_sender(received: Received) -> None:
    Resilience()._announce(Transition("payments", "CLOSED", "OPEN", 1, 1.0, "", "", 0, 0, 0))  # type: ignore[arg-type]
    wait_until(lambda: received)
    assert received[0][1]["sender"] is None
