"""A limit of calls in flight, as guards, the gate and the tick keep it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import Breaker, BreakerOpenError, Resilience
from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, Snapshot, State
from resilient_tasks.core.pace import Pace, refill_count
from resilient_tasks.dependency import Admitted
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.testing import Clock
from resilient_tasks.worker.admission import Gate
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.execution import Run
from tests.support.doubles import Request, wait_until
from tests.unit.test_breaker import Call, Rig, cancelled_call, elsewhere, every_way

SCARCE = BreakerPolicy(max_concurrency=1, minimum_calls=100)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(SCARCE)
    yield rig
    rig.fleet.close()


# --- guards ---------------------------------------------------------------------------------------------


@every_way
def test_a_call_beyond_the_limit_is_refused_and_does_not_run(rig: Rig, use: Any) -> None:
    with rig.breaker.guard(), pytest.raises(BreakerOpenError, match="breaker 'payments' is at capacity") as raised:
        elsewhere(use, rig, rig.works)
    assert raised.value.state == "AT_CAPACITY"
    assert rig.ran == 0
    assert use(rig, rig.works) == "paid"
    assert rig.figures() == (2, 0)


@every_way
def test_a_call_that_fails_counts_and_frees_its_slot(rig: Rig, use: Any) -> None:
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            use(rig, rig.fails)
    assert rig.figures() == (2, 2)
    assert rig.breaker.snapshot().in_flight == 0


@every_way
def test_a_guard_inside_a_task_shares_its_slot(rig: Rig, use: Any) -> None:
    task = Call(Admitted("payments", leased=True))
    rig.acquire("the task")
    with task:
        assert use(rig, rig.works) == "paid"
    assert rig.store.calls["acquire"] == 1
    assert set(task.noted) == {"payments"}


def test_a_cancelled_call_frees_its_slot(rig: Rig) -> None:
    asyncio.run(cancelled_call(rig, lambda: rig.breaker.snapshot().in_flight == 1))
    wait_until(lambda: rig.breaker.snapshot().in_flight == 0)
    assert rig.breaker.call(rig.works) == "paid"


def test_while_the_store_is_away_each_process_keeps_the_limit_for_itself(rig: Rig) -> None:
    rig.store.is_unavailable = True
    with rig.breaker.guard():
        assert not rig.fleet.acquire(rig.breaker._dependency.spec, "second").admitted
    assert rig.breaker.call(rig.works) == "paid"


def test_free_slots_are_reported_while_tasks_wait(rig: Rig) -> None:
    noticed: list[str] = []
    view = rig.fleet.view
    view.on_room = lambda: noticed.append("room")
    spec, epoch = rig.breaker._dependency.spec, rig.acquire("first").snapshot.epoch
    view.look_for_room(replace(rig.breaker.snapshot(), deferred=1))
    assert noticed == [], "no slot is free"
    rig.fleet.reporter.settle(spec, "first", epoch, Verdict(Outcome.SUCCESS), wait=5)
    assert noticed == [], "no task waits"
    view.look_for_room(replace(rig.breaker.snapshot(), deferred=1))
    assert noticed == ["room"]


# --- the gate --------------------------------------------------------------------------------------------


@pytest.fixture
def payments(resilience: Resilience) -> Breaker:
    return resilience.breaker("payments", max_concurrency=2, max_concurrency_per_worker=1)


@pytest.fixture
def gate(app: Celery, clock: Clock) -> Gate:
    return Gate(runtime_of(app))


def request(task_id: str, *breakers: Breaker, envelope: Envelope | None = None) -> Any:
    return Request(
        id=task_id,
        name="shop.charge",
        envelope=envelope or Envelope(),
        holder=f"{task_id}:run",
        breakers=[breaker._dependency for breaker in breakers],
        guards=[breaker._dependency for breaker in breakers],
        defers_when_refused=lambda: True,
    )


def test_a_worker_runs_no_more_than_it_may(gate: Gate, payments: Breaker) -> None:
    first, second = (gate.admit(request(task_id, payments)) for task_id in "ab")
    assert first.admitted_by[0].leased
    assert str(second.refusal) == "breaker 'payments' is at capacity"
    gate.settle(request("a", payments), first, Run(first, "a").report())
    resumed = Envelope(breaker="payments", resumed=payments._dependency.cached_state.epoch)
    assert gate.admit(request("b", payments, envelope=resumed)).admitted_by


def test_a_slot_of_one_breaker_is_given_back_if_another_refuses(
    gate: Gate, payments: Breaker, resilience: Resilience, clock: Clock
) -> None:
    accounts = resilience.breaker("accounts", max_concurrency=1)
    resilience.fleet.acquire(accounts._dependency.spec, "another task")
    refused = gate.admit(request("a", payments, accounts))
    clock.settle()
    assert refused.refusal is not None
    assert refused.refusal.breaker == "accounts"
    assert payments.snapshot().in_flight == 0
    assert gate.admit(request("b", payments)).admitted_by


# --- the tick ------------------------------------------------------------------------------------------

FULL = Snapshot("payments", State.CLOSED, 1, 1, now=1000.0, since=900.0, in_flight=4, concurrency_limit=4)


@pytest.mark.parametrize(
    ("in_flight", "resume_rate", "decided_at", "count"),
    [
        (4, None, 0.0, 0),
        (1, None, 0.0, 3),
        (5, None, 0.0, 0),
        (0, 2.0, 999.0, 2),
        (0, 2.0, 1000.0, 0),
        (0, 100.0, 0.0, 4),
    ],
)
def test_as_many_are_resumed_as_slots_are_free(
    in_flight: int, resume_rate: float | None, decided_at: float, count: int
) -> None:
    policy = BreakerPolicy(resume_rate=resume_rate)
    free = max(0, (FULL.concurrency_limit or 0) - in_flight)
    pace, resumed = refill_count(Pace(decided_at=decided_at), FULL, policy, free=free, interval=1.0)
    assert resumed == count
    assert pace.decided_at == (decided_at if resume_rate is None else FULL.now)
