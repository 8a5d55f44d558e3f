"""The gate's own rules: the ramp draws one lot per task, probes step aside, what was taken up is told once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import Breaker, Resilience
from resilient_tasks.store.standing import Standing
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker.gate import Gate
from resilient_tasks.worker.request import GatedRequest
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.ticket import Ticket

IDS = [f"task-{number}" for number in range(2000)]


@pytest.fixture
def app() -> Celery:
    return Celery("tasks", broker="memory://", set_as_current=False)


@pytest.fixture
def payments(resilience: Resilience) -> Breaker:
    return resilience.breaker("payments", trial_calls=1, open_duration=1, open_jitter=0, ramp=10)


@pytest.fixture
def gate(app: Celery, clock: Clock) -> Gate:
    return Gate(runtime_of(app))


def request(task_id: str, ticket: Ticket) -> Any:
    holder = vars(GatedRequest)["holder"].func(SimpleNamespace(id=task_id))
    return SimpleNamespace(id=task_id, ticket=ticket, holder=holder)


def test_the_ramp_draws_one_lot_per_task(
    gate: Gate, payments: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(payments, "OPEN")
    clock.advance(1.0)
    payments.call(lambda: None)
    clock.settle()
    clock.advance(2.0)
    share = payments.standing.ramp_share()
    assert share == pytest.approx(0.28, abs=0.02)
    monkeypatch.setattr(Standing, "ramp_share", lambda _: share)  # a view goes on in real time
    arrived = [task_id for task_id in IDS if not gate.refuses_now(payments, Ticket(), task_id)]
    entered = [task_id for task_id in arrived if not gate.admit(payments, request(task_id, Ticket())).refused_in]
    assert entered == arrived
    assert len(arrived) / len(IDS) == pytest.approx(share, abs=0.05)
    resumed = Ticket(breaker="payments", resumed=payments.standing.epoch)
    assert not any(gate.refuses_now(payments, resumed, task_id) for task_id in IDS)


def test_tasks_are_no_trials_where_there_is_a_probe(gate: Gate, payments: Breaker, clock: Clock) -> None:
    payments.probe(lambda: None)
    force(payments, "OPEN")
    clock.advance(1.0)
    assert gate.refuses_now(payments, Ticket(), "a")


def test_a_task_that_is_delivered_twice_is_one_trial_only(gate: Gate, payments: Breaker, clock: Clock) -> None:
    force(payments, "OPEN")
    clock.advance(1.0)
    first, second = (gate.admit(payments, request("task", Ticket())) for _ in range(2))
    assert first.trial
    assert second.refused_in == "HALF_OPEN"


def test_what_was_taken_up_is_told_until_somebody_listens(gate: Gate) -> None:
    told: list[tuple[str, int]] = []

    def deaf(breaker: str, count: int) -> None:
        raise ConnectionError

    for _ in range(3):
        gate.took_up(Ticket(breaker="payments", resumed=1))
    gate.took_up(Ticket(breaker="payments"))  # never deferred
    with pytest.raises(ConnectionError):
        gate.tell_taken_up(deaf)
    gate.tell_taken_up(lambda *said: told.append(said))
    gate.tell_taken_up(lambda *said: told.append(said))
    assert told == [("payments", 3)]
