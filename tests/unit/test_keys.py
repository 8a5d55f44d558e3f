"""Keys of calls, and the children that they name: seen from a task, from a guard, and from a process that has many."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import Breaker, BreakerOpenError, ConfigurationError, Resilience
from resilient_tasks.core.model import Calls, Outcome, Verb, child_name, is_child, key_of, parent_of
from resilient_tasks.dependency import REMEMBERED_FOR, Admitted
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker import maintenance as tick
from resilient_tasks.worker.admission import Gate
from resilient_tasks.worker.context import Runtime, runtime_of
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.execution import Admission
from resilient_tasks.worker.maintenance import Reconciler
from tests.unit.test_body import FAILURE, gated
from tests.unit.test_gate import request


@pytest.fixture
def acme(payments: Breaker, clock: Clock) -> Breaker:
    return payments.child("acme")


def failing() -> None:
    raise ConnectionError


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("acme", "payments:acme"), (7, "payments:7"), ("api.example:80", "payments:api.example%3A80"),
        ("*", "payments:%2A"), ("ü/~ {x}", "payments:%C3%BC%2F%7E%20%7Bx%7D"),
    ],
)  # fmt: skip
def test_a_key_becomes_part_of_a_name(key: object, name: str) -> None:
    assert child_name("payments", key) == name
    assert (parent_of(name), parent_of("payments"), key_of("payments")) == ("payments", None, "")
    assert is_child(name)


@pytest.mark.parametrize(
    "name", ["payments", "payments:", "payments:{x}", "payments:a:b", "payments:%2a", "p:" + 100 * "a"]
)
def test_what_is_no_name_of_a_child(name: str) -> None:
    assert not is_child(name)


@pytest.mark.parametrize("key", ["", "a" * 100, "ü" * 20, "\ud800", None, 1.5, True, b"acme", ["acme"]])
def test_what_cannot_be_a_key_is_an_error(key: object) -> None:
    with pytest.raises(ConfigurationError, match=r"key .* of breaker 'payments': allowed is text or an integer"):
        child_name("payments", key)


# --- the key of a call --------------------------------------------------------------------------------------


def keyed(app: Celery, key: Any, **options: Any) -> Any:
    @app.task(name="charge", shared=False, breaker=["payments"], breaker_key=key, **options)
    def charge(order: int, tenant: str = "house", *, host: str = "here") -> None:
        failing()

    return charge


@pytest.mark.parametrize(
    ("key", "args", "kwargs", "found"),
    [
        ("tenant", (1, "acme"), {}, "acme"),
        ("tenant", (1,), {"tenant": "acme"}, "acme"),
        ("tenant", (1,), {}, "house"),
        ("order", (1,), {}, "1"),
        ("host", (1,), {}, "here"),
        ("host", (1,), {"host": "there"}, "there"),
        (lambda args, kwargs: f"{args[0]}-{kwargs['host']}", (1,), {"host": "there"}, "1-there"),
    ],
)
def test_a_key_is_found_among_the_arguments(
    app: Celery, clock: Clock, key: Any, args: Any, kwargs: Any, found: str
) -> None:
    task = keyed(app, key)
    assert [breaker.name for breaker in runtime_of(app).guarding(task, args, kwargs)] == [f"payments:{found}"]


def test_a_bound_task_has_no_key_in_itself(app: Celery, clock: Clock) -> None:
    @app.task(name="bound", shared=False, bind=True, breaker="payments", breaker_key="tenant")
    def bound(self: Any, tenant: str) -> None: ...

    assert runtime_of(app).guarding(bound, ("acme",), {})[0].name == "payments:acme"


@pytest.mark.parametrize(
    ("key", "args", "complaint"),
    [
        ("order", (), "breaker_key='order': TypeError over the arguments"),
        (lambda _args, kwargs: kwargs["secret"], (1,), "breaker_key=.*: KeyError over the arguments"),
        (lambda _args, _kwargs: None, (1,), "key None of breaker 'payments'"),
    ],
)
def test_a_call_without_a_key_fails_alone(app: Celery, clock: Clock, key: Any, args: Any, complaint: str) -> None:
    task = keyed(app, key)
    assert runtime_of(app).guarding(task, args, {}) == []
    gate = Gate(runtime_of(app))
    assert gate.admit(request("a", Envelope())) == Admission()
    with pytest.raises(ConfigurationError, match=complaint):
        runtime_of(app).breakers_of(task, args, {})
    error, report = gated(task, Admission())
    assert isinstance(error, ConfigurationError)
    assert report.verdicts == ()


# --- parent and child ---------------------------------------------------------------------------------------


def test_a_child_is_the_same_one_each_time_and_has_none_itself(payments: Breaker, acme: Breaker) -> None:
    assert payments.child("acme") is acme
    assert payments._dependency.child_named(acme.name) is acme._dependency
    assert acme.policy is payments.policy
    with pytest.raises(ConfigurationError, match="is a child"):
        acme.child("branch")


def test_a_childs_calls_count_for_the_child(payments: Breaker, acme: Breaker, clock: Clock) -> None:
    for _ in range(3):
        with pytest.raises(ConnectionError):
            acme.call(failing)
    clock.settle()
    assert (acme.snapshot().state, payments.snapshot().calls) == ("OPEN", 0)
    payments.child("other").call(int)
    with pytest.raises(BreakerOpenError, match="payments:acme"), acme.guard():
        pass


def test_an_open_parent_refuses_for_its_children(payments: Breaker, acme: Breaker) -> None:
    force(payments, "OPEN")
    with pytest.raises(BreakerOpenError, match="'payments'"):
        acme.call(int)


@pytest.mark.parametrize("state", ["CLOSED", "OPEN"])
def test_a_trial_of_the_parent_is_decided_by_the_childs_call(
    payments: Breaker, acme: Breaker, clock: Clock, state: str
) -> None:
    force(payments, "OPEN")
    force(acme, state)
    clock.advance(20)
    with pytest.raises(ConnectionError):
        acme.call(failing)
    clock.settle()
    assert payments.snapshot().state == "OPEN"
    assert acme.snapshot().failures == (state == "CLOSED")


def test_a_permit_of_the_parent_is_given_back_when_the_child_refuses(
    payments: Breaker, acme: Breaker, clock: Clock
) -> None:
    force(payments, "OPEN")
    clock.advance(20)
    force(acme, "FORCED_OPEN")
    with pytest.raises(BreakerOpenError, match="payments:acme"):
        acme.call(int)
    clock.settle()
    assert payments.snapshot().trials == 0


def test_coroutines_are_guarded_by_both(payments: Breaker, acme: Breaker) -> None:
    async def nothing() -> None: ...

    asyncio.run(acme.call(nothing))
    force(payments, "OPEN")
    with pytest.raises(BreakerOpenError, match="'payments'"):
        asyncio.run(acme.call(nothing))


def test_a_tasks_outcome_counts_for_the_child_and_a_trial_for_its_parent(
    app: Celery, payments: Breaker, acme: Breaker, clock: Clock
) -> None:
    force(payments, "OPEN")
    clock.advance(20)
    gate, call = Gate(runtime_of(app)), request("a", Envelope(), acme)
    admission = gate.admit(call)
    assert admission.admitted_by[0].trial
    assert (admission.admitted_by[0].for_child, admission.admitted_by[1].for_child) == (True, False)
    task = app.task(shared=False, breaker="payments", breaker_key=lambda _args, _kwargs: "acme", name="t")(failing)
    deferred, report = gated(task, admission)
    assert (deferred.breaker, report.verdicts) == ("payments:acme", (FAILURE, FAILURE))
    gate.settle(call, admission, report)
    clock.settle()
    assert (payments.snapshot().state, acme.snapshot().failures) == ("OPEN", 1)


def test_a_failure_inside_a_childs_guard_counts_for_the_parent(app: Celery, acme: Breaker) -> None:
    @app.task(shared=False, breaker="payments", name="t")
    def guarded() -> None:
        acme.call(failing)

    admission = Admission((Admitted("payments", trial=True),))
    assert gated(guarded, admission)[1].verdicts == (FAILURE,)


def test_a_probe_with_one_parameter_is_the_childrens(payments: Breaker, acme: Breaker) -> None:
    asked: list[str] = []
    payments.probe(active=True)(asked.append)
    assert payments._dependency.probe_to_run is None
    probe = payments.child("api:80")._dependency.probe_to_run
    assert probe is not None
    probe.function()
    assert asked == ["api:80"]
    assert not probe.active


def test_a_probe_without_parameters_is_the_parents(payments: Breaker, acme: Breaker) -> None:
    payments.probe(lambda: None)
    assert payments._dependency.probe_to_run is not None
    assert acme._dependency.probe_to_run is None


# --- many -----------------------------------------------------------------------------------------------------


def test_a_key_too_many_shares_its_parent(resilience: Resilience, clock: Clock) -> None:
    hosts = resilience.breaker("hosts", max_keys=2)
    assert [hosts.child(key) is hosts for key in ("a", "b", "c", "a")] == [False, False, True, False]


def test_idle_children_are_forgotten_when_there_are_many(
    resilience: Resilience, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = resilience.breaker("hosts", max_keys=2)
    view = resilience.fleet.view
    first, opened = hosts.child("a"), hosts.child("b")
    first.call(int)
    force(opened, "OPEN")
    clock.settle()
    now = view.clock()
    monkeypatch.setattr(view, "clock", lambda: now + REMEMBERED_FOR + 1)
    monkeypatch.setattr(resilience.fleet, "register", lambda _: True)
    for cached in view.states():
        monkeypatch.setattr(cached, "_clock", view.clock)
    hosts.child("c")
    assert "hosts:a" not in {cached.name for cached in view.states()}
    assert hosts.child("b") is opened
    first.call(int)  # who still holds it finds its state anew
    assert first.state == "CLOSED"


def test_a_change_that_is_due_is_made_when_a_child_is_used(
    payments: Breaker, resilience: Resilience, clock: Clock
) -> None:
    spec = replace(payments._dependency.spec, name="payments:acme")
    store: Any = resilience.fleet.store
    store._primary._count(spec, 0, [Calls(Outcome.FAILURE, 3, "", True)])  # and the process that did it has died
    assert payments.child("acme").state == "OPEN"


def test_a_child_that_others_have_opened_is_known_here(
    payments: Breaker, acme: Breaker, resilience: Resilience
) -> None:
    view, store = resilience.fleet.view, resilience.fleet.store
    payments.call(int)
    foreign = replace(payments._dependency.spec, name="payments:foreign")
    store.command(foreign, Verb.TRIP)
    view.refresh()
    assert view.state("payments:foreign").snapshot.state == "OPEN"
    assert "payments:foreign" in {breaker.name for breaker in runtime_of(resilience._app).present()}
    store.command(foreign, Verb.RESET)
    store.mark_idle(foreign)
    view.refresh()
    assert view.active_children() == []
    view.refresh()  # what has become of it was read once more
    assert "payments:foreign" not in {cached.name for cached in view.states()}
    assert "payments:foreign" not in store._known


def test_of_many_children_that_are_not_closed_some_can_be_read(payments: Breaker, clock: Clock, app: Celery) -> None:
    for key in "abc":
        force(payments.child(key), "OPEN")
    names = [snapshot.name for snapshot in runtime_of(app).read(most_children=2)]
    assert names == ["payments", "payments:a", "payments:b"]


def test_a_tick_serves_as_many_children_as_it_has_time_for_and_the_next_one_the_others(
    payments: Breaker, clock: Clock, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []
    children = [payments.child(number) for number in range(3)]
    monkeypatch.setattr(tick, "CHILDREN_SHARE", 0)
    monkeypatch.setattr(tick.Tick, "_serve", lambda _, breaker: served.append(breaker.name))
    monkeypatch.setattr(Reconciler, "reconcile", lambda *_: None)
    monkeypatch.setattr(Runtime, "active_children", lambda _: [child._dependency for child in children])
    for child in children:
        child.trip()
    clock.advance(payments.policy.max_open_duration)
    clock.settle()
    ticks = tick.Tick(runtime_of(app), SimpleNamespace(hostname="here", event_dispatcher=None), wake=lambda: None)
    for count in (1, 2, 3):
        ticks._serve_children()
        assert len(served) == len(set(served)) == count
    ticks._serve_children()
    assert served[-1] == served[0]
    ticks.close()
