"""The store of this process takes over when the shared one goes away, and is bounded while it serves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_tasks.core.model import Snapshot, State, Verb
from resilient_tasks.store.local import LocalStore
from tests.contract.lab import Lab, LocalClock, Subject


@pytest.fixture
def clock() -> LocalClock:
    """A clock that differs from the shared store's."""
    return LocalClock(now=5000.0)


@pytest.fixture
def local(clock: LocalClock) -> LocalStore:
    return LocalStore(clock)


def taken_over(breaker: Subject, local: LocalStore, clock: LocalClock) -> Subject:
    """Return the breaker as it lives on in the process's own store."""
    local.adopt(breaker.snapshot())
    return Subject(local, clock, breaker.spec)


def test_open_keeps_what_was_left_of_its_time(lab: Lab, local: LocalStore, clock: LocalClock) -> None:
    shared = lab.breaker(trial_calls=1, max_open_duration=60.0).half_open()
    shared.trials("F")
    lab.clock.advance(4)
    adopted = taken_over(shared, local, clock)
    there, here = shared.snapshot(), adopted.snapshot()
    assert here.retry_after == pytest.approx(6.0)
    for name in ("state", "epoch", "version", "reason", "calls", "failures", "openings", "total_failures"):
        assert getattr(here, name) == getattr(there, name), name
    clock.advance(5.999)
    assert not adopted.ask().admitted
    clock.advance(0.001)
    assert adopted.trials("F") is State.OPEN
    assert adopted.snapshot().retry_after == pytest.approx(20.0), "the third opening in a row"


def test_closed_goes_on_with_an_empty_window_and_its_ramp(lab: Lab, local: LocalStore, clock: LocalClock) -> None:
    shared = lab.breaker(trial_calls=1).half_open()
    shared.trials("S")
    lab.clock.advance(3)
    shared.calls("FFFF")
    adopted = taken_over(shared, local, clock)
    here = adopted.snapshot()
    assert (here.state, here.calls, here.ramp_since) == (State.CLOSED, 0, clock() - 3)
    assert here.last_success_at == clock() - 3
    assert adopted.calls("FFFF").snapshot.state is State.CLOSED
    assert adopted.calls("F").snapshot.state is State.OPEN


@pytest.mark.parametrize("verb", [Verb.ISOLATE, Verb.DISABLE, Verb.SHADOW])
def test_an_operators_state_is_obeyed(lab: Lab, local: LocalStore, clock: LocalClock, verb: Verb) -> None:
    shared = lab.breaker()
    shared.command(verb, reason="maintenance", actor="ada")
    here = taken_over(shared, local, clock).snapshot()
    assert (here.state, here.reason, here.actor) == (shared.state, "maintenance", "ada")


def test_half_open_goes_on_with_permits_of_its_own(lab: Lab, local: LocalStore, clock: LocalClock) -> None:
    shared = lab.breaker(trial_calls=2).half_open()
    shared.ask("elsewhere")
    adopted = taken_over(shared, local, clock)
    assert (adopted.state, adopted.snapshot().trials) == (State.HALF_OPEN, 0)
    assert adopted.trials("SS") is State.CLOSED


def test_it_replaces_what_was_known_of_an_earlier_outage(lab: Lab, local: LocalStore, clock: LocalClock) -> None:
    shared = lab.breaker()
    shared.calls("S")
    adopted = taken_over(shared, local, clock).open()
    assert adopted.state is State.OPEN
    local.adopt(shared.snapshot())
    assert adopted.state is State.CLOSED


def test_a_breaker_that_the_shared_store_never_saw_starts_new(local: LocalStore, clock: LocalClock, lab: Lab) -> None:
    unknown = lab.breaker()
    adopted = taken_over(unknown, local, clock)
    assert adopted.snapshot().epoch == 0
    adopted.calls("S")
    local.adopt(unknown.snapshot())
    assert adopted.snapshot().epoch == 0


def test_a_policy_declared_here_decides(lab: Lab, local: LocalStore, clock: LocalClock) -> None:
    shared = lab.breaker(minimum_calls=2, revision=-7)
    shared.calls("S")
    assert taken_over(shared, local, clock).calls("FF").snapshot.state is State.OPEN


# --- bounds -----------------------------------------------------------------------------------------


def test_values_are_bounded(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient_tasks.store.local._MOST_VALUES", 2)
    for key in "aabc":
        local.put("fallback", key, key.encode(), ttl=60)
    assert [local.get("fallback", key) for key in "abc"] == [None, (b"b", 0.0), (b"c", 0.0)]


def test_a_listener_that_does_not_listen_costs_no_memory(
    local: LocalStore, clock: LocalClock, monkeypatch: pytest.MonkeyPatch, lab: Lab
) -> None:
    monkeypatch.setattr("resilient_tasks.store.local._MOST_UNREAD_CHANGES", 2)
    changes = local.changes(timeout=0.01)
    assert next(changes) is None
    breaker = Subject(local, clock, lab.breaker().spec)
    for _ in range(3):
        breaker.command(Verb.ISOLATE)
        breaker.command(Verb.RESET)
    received = [next(changes) for _ in range(3)]
    assert [snapshot and snapshot.state for snapshot in received] == [State.FORCED_OPEN, State.CLOSED, None]


def test_a_clock_that_is_set_back_stops_nothing(local: LocalStore, clock: LocalClock, lab: Lab) -> None:
    breaker = Subject(local, clock, lab.breaker().spec)
    breaker.calls("FFFF")
    clock.advance(-3600)
    snapshot: Snapshot = breaker.calls("SSSS").snapshot
    assert (snapshot.state, snapshot.calls) == (State.CLOSED, 4), "what lies in the future is forgotten"
    assert replace(snapshot, now=clock()) == breaker.snapshot()
