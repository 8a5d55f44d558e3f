"""The gate's own rules: the ramp draws one lot per task, probes step aside, what was taken up is reported once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import Breaker, Resilience
from resilient_tasks.core.outage import REDELIVERED, REFUSED
from resilient_tasks.dependency import with_parents
from resilient_tasks.store.view import CachedState
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker.admission import Gate
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.execution import Report
from resilient_tasks.worker.pipeline import Pipeline
from resilient_tasks.worker.request import GatedRequest
from tests.support.doubles import Request

pytestmark = pytest.mark.usefixtures("clock")  # breakers are in memory
IDS = [f"task-{number}" for number in range(2000)]


@pytest.fixture
def payments(resilience: Resilience) -> Breaker:
    return resilience.breaker("payments", trial_calls=1, open_duration=1, open_jitter=0, ramp=10)


@pytest.fixture
def gate(app: Celery, clock: Clock) -> Gate:
    return Gate(runtime_of(app))


def request(task_id: str, envelope: Envelope, *breakers: Breaker) -> Any:
    holder = vars(GatedRequest)["holder"].func(SimpleNamespace(id=task_id))
    return Request(
        id=task_id,
        name="shop.charge",
        envelope=envelope,
        holder=holder,
        breakers=[breaker._dependency for breaker in breakers],
        guards=with_parents([breaker._dependency for breaker in breakers]),
        time_limits=(9, 9),
        task=None,
        defers_when_refused=lambda: True,
    )


def test_the_ramp_draws_one_lot_per_task(
    gate: Gate, payments: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(payments, "OPEN")
    clock.advance(1.0)
    payments.call(lambda: None)
    clock.settle()
    clock.advance(2.0)
    share = payments._dependency.cached_state.ramp_share()
    assert share == pytest.approx(0.28, abs=0.02)
    monkeypatch.setattr(CachedState, "ramp_share", lambda _: share)  # a view goes on in real time
    arrived = [task_id for task_id in IDS if gate.refusing([payments._dependency], Envelope(), task_id) is None]
    entered = [task_id for task_id in arrived if not gate.admit(request(task_id, Envelope(), payments)).refusal]
    assert entered == arrived
    assert len(arrived) / len(IDS) == pytest.approx(share, abs=0.05)
    resumed = Envelope(breaker="payments", resumed=payments._dependency.cached_state.epoch)
    assert not any(gate.refusing([payments._dependency], resumed, task_id) for task_id in IDS)


def test_tasks_are_no_trials_where_there_is_a_probe(gate: Gate, payments: Breaker, clock: Clock) -> None:
    payments.probe(lambda: None)
    force(payments, "OPEN")
    clock.advance(1.0)
    assert gate.refusing([payments._dependency], Envelope(), "a") is payments._dependency


def test_a_task_that_is_delivered_twice_is_one_trial_only(gate: Gate, payments: Breaker, clock: Clock) -> None:
    force(payments, "OPEN")
    clock.advance(1.0)
    first, second = (gate.admit(request("task", Envelope(), payments)) for _ in range(2))
    assert first.admitted_by[0].trial
    assert second.refusal is not None
    assert second.refusal.state == "HALF_OPEN"


def test_what_was_taken_up_is_reported_until_it_is_received(gate: Gate) -> None:
    reported: list[tuple[str, int]] = []

    def deaf(breaker: str, count: int) -> None:
        raise ConnectionError

    for _ in range(3):
        gate.took_up(Envelope(breaker="payments", resumed=1))
    with pytest.raises(ConnectionError):
        gate.report_taken_up(deaf)
    gate.report_taken_up(lambda *said: reported.append(said))
    gate.report_taken_up(lambda *said: reported.append(said))
    assert reported == [("payments", 3)]


def test_a_task_of_several_breakers_gets_all_permits_or_none(
    gate: Gate, payments: Breaker, resilience: Resilience, clock: Clock
) -> None:
    accounts = resilience.breaker("accounts", trial_calls=1, open_duration=1, open_jitter=0)
    for breaker in (payments, accounts):
        force(breaker, "OPEN")
    clock.advance(1.0)
    assert resilience.fleet.acquire(accounts._dependency.spec, "another").trial
    refused = gate.admit(request("task", Envelope(), payments, accounts))
    clock.settle()
    assert refused.refusal is not None
    assert (refused.refusal.breaker, refused.admitted_by) == ("accounts", ())
    assert payments.snapshot().trials == 0
    assert payments.snapshot().state == "HALF_OPEN"
    assert resilience.fleet.acquire(payments._dependency.spec, "the next one").trial


def test_the_first_breaker_that_refuses_is_named(gate: Gate, payments: Breaker, resilience: Resilience) -> None:
    accounts = resilience.breaker("accounts")
    force(accounts, "OPEN")
    assert gate.refusing([payments._dependency, accounts._dependency], Envelope(), "a") is accounts._dependency
    force(payments, "OPEN")
    assert gate.refusing([payments._dependency, accounts._dependency], Envelope(), "a") is payments._dependency


def test_a_resumed_task_passes_the_ramp_of_the_breaker_that_it_waited_for_alone(
    gate: Gate, payments: Breaker, resilience: Resilience, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = resilience.breaker("accounts")
    monkeypatch.setattr(CachedState, "ramp_share", lambda _: 0.0)
    for recovered in (payments, accounts):
        recovered._dependency.cached_state.ramps = True
    for breaker, other in ((payments, accounts), (accounts, payments)):
        resumed = Envelope(breaker=breaker.name, resumed=breaker._dependency.cached_state.epoch)
        assert gate.refusing([breaker._dependency], resumed, "a") is None
        assert gate.refusing([breaker._dependency, other._dependency], resumed, "a") is other._dependency


def test_a_refused_run_that_a_fallback_answers_holds_nothing(gate: Gate, payments: Breaker, clock: Clock) -> None:
    force(payments, "OPEN")
    run = request("a", Envelope(), payments)
    admission = gate.admit(run)
    gate.hold(run, admission)
    gate.settle(run, admission, Report(source="constant", served_for="payments"))
    clock.settle()
    snapshot = payments.snapshot()
    assert (snapshot.state, snapshot.calls) == ("OPEN", 0)


def test_a_message_that_the_broker_delivers_again_runs_and_is_counted(
    app: Celery, gate: Gate, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(name="delivered-again", breaker=payments, shared=False)
    def charge() -> None: ...

    runtime = runtime_of(app)
    runtime.pipeline = Pipeline(runtime)
    counted: list[tuple[str, str]] = []
    monkeypatch.setattr(runtime.fleet.reporter, "tally", lambda *reported: counted.append(reported))
    message = SimpleNamespace(
        headers={"id": "an-id", "task": "delivered-again"}, body="[[], {}, {}]", payload=[[], {}, {}], properties={},
        delivery_info={"redelivered": True}, content_type="application/json", content_encoding="utf-8",
    )  # fmt: skip
    submitted: list[str] = []
    pool = SimpleNamespace(apply_async=lambda *_, **options: submitted.append(options["correlation_id"]))
    GatedRequest(message, app=app, task=app.tasks["delivered-again"]).execute_using_pool(pool)
    assert submitted == ["an-id"]
    assert counted == [("payments", REDELIVERED)]


@pytest.mark.parametrize(("max_concurrency", "deferred", "resumed", "waits"), [
    (4, 1, 0, True), (4, 0, 0, False), (4, 1, 7, False), (4, 1, 6, True), (None, 1, 0, False),
])  # fmt: skip
def test_a_task_keeps_its_place_behind_those_that_wait_for_a_slot(
    gate: Gate, resilience: Resilience, max_concurrency: int | None, deferred: int, resumed: int, *, waits: bool
) -> None:
    breaker = resilience.breaker("scarce", max_concurrency=max_concurrency)._dependency
    state = replace(breaker.cached_state.snapshot, concurrency_limit=max_concurrency, epoch=7, deferred=deferred)
    breaker.cached_state.take(state, 0.0)
    envelope = Envelope(breaker="scarce", resumed=resumed)
    assert gate.refusing([breaker], envelope, "a", in_line=True) is (breaker if waits else None)


def test_a_refusal_counts_when_it_is_made_and_not_when_it_is_looked_at(
    payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(payments, "OPEN")
    dependency, counted = payments._dependency, list[str]()
    monkeypatch.setattr(dependency.fleet.reporter, "tally", lambda _, kind: counted.append(kind))
    assert (dependency.refusal.state, counted) == ("OPEN", [])
    assert (dependency.refuse().state, counted) == ("OPEN", [REFUSED])
