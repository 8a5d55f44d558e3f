"""Names, namespaces, and policies that differ during a rolling deploy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resilient_tasks.core.model import Outcome, State, Verb
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.store.base import Evidence, Spec, Store
from resilient_tasks.store.ledger import LONGEST_ABSENCE, Ledger
from tests.contract.lab import SHARED, Lab, ledger_of


def test_reading_changes_nothing(lab: Lab) -> None:
    breaker = lab.breaker(window=0.5)
    first = breaker.snapshot()
    assert (first.state, first.epoch, first.version, first.calls) == (State.CLOSED, 0, 0, 0)
    lab.clock.advance(1)
    assert breaker.snapshot().epoch == 0

    breaker.calls("S")
    lab.clock.advance(60)
    assert breaker.snapshot() == breaker.snapshot()


def test_several_breakers_are_read_in_order(lab: Lab) -> None:
    breakers = [lab.breaker(name) for name in ("mail", "payments", "geocoder")]
    breakers[1].open()
    snapshots = lab.store.read([breaker.spec for breaker in breakers])
    assert [snapshot.name for snapshot in snapshots] == ["mail", "payments", "geocoder"]
    assert [snapshot.state for snapshot in snapshots] == [State.CLOSED, State.OPEN, State.CLOSED]
    assert lab.store.read([]) == []


def test_many_breakers_are_read_at_once(lab: Lab) -> None:
    breakers = [lab.breaker(f"customer {number}") for number in range(1001)]
    assert [s.name for s in lab.store.read([b.spec for b in breakers])] == [b.name for b in breakers]


def test_the_epoch_of_a_new_breaker_is_the_time(lab: Lab) -> None:
    snapshot = lab.breaker().calls("S").snapshot
    assert snapshot.epoch == snapshot.version == round(lab.clock() * 1000)
    assert snapshot.now == lab.clock()


def test_the_epoch_of_a_transition_is_one_that_no_other_store_has_been_in(lab: Lab) -> None:
    """A replica that has missed a transition makes another one later, and so does a process that was cut off."""
    breaker = lab.breaker()
    created = breaker.calls("S").snapshot.epoch
    lab.clock.advance(1)
    assert breaker.calls("FFFFF").snapshot.epoch == round(lab.clock() * 1000) > created + 1


def test_the_policy_with_the_highest_revision_decides(lab: Lab) -> None:
    old = lab.breaker(minimum_calls=3, revision=1)
    new = lab.breaker(minimum_calls=8, revision=2)
    old.calls("FF")
    new.calls("F")
    assert old.calls("FFFF").snapshot.state is State.CLOSED, "the newer policy is known by now"
    assert old.calls("F").snapshot.state is State.OPEN


def test_a_newer_policy_decides_from_its_first_use(lab: Lab) -> None:
    lab.breaker(open_duration=5.0, revision=1).open()
    new = lab.breaker(open_duration=5.0, trial_calls=1, revision=2)
    lab.clock.advance(5)
    assert [new.ask(holder).trial for holder in "ab"] == [True, False]


def test_of_equal_revisions_the_one_in_use_decides(lab: Lab) -> None:
    slow_to_open = lab.breaker(minimum_calls=8)
    strict = lab.breaker(minimum_calls=3)
    assert slow_to_open.calls("FFF").snapshot.state is State.CLOSED
    assert strict.calls("F").snapshot.state is State.OPEN


def test_a_look_by_a_newer_policy_writes_nothing(lab: Lab) -> None:
    current = lab.breaker(revision=5)
    current.calls("FF")
    assert lab.breaker(minimum_calls=2, revision=9).snapshot().evidence == 1.0
    assert lab.breaker(minimum_calls=2, revision=1).snapshot().evidence == pytest.approx(0.4)
    assert current.calls("FF").snapshot.state is State.CLOSED
    assert current.snapshot().evidence == pytest.approx(0.8)


@SHARED
def test_two_namespaces_do_not_see_each_other(lab: Lab) -> None:
    here, there = lab.breaker(), lab.other_namespace()
    here.open()
    lab.store.put("fallback", "key", b"value", ttl=60)
    lab.ledger.revoke(["task"])
    lab.ledger.tick_completed()
    lab.ledger.add_deferred(here.name, "task")
    lab.ledger.resumed(here.name, 3)
    snapshot = there.read([here.spec])[0]
    assert (snapshot.state, snapshot.deferred) == (State.CLOSED, 0)
    assert there.get("fallback", "key") is None
    assert ledger_of(there).revoked(["task"]) == {}
    assert ledger_of(there).last_tick_age() is None
    assert ledger_of(there).pace(here.name).outstanding == 0
    with lab.ledger.tick_lease("a", ttl=60) as one, ledger_of(there).tick_lease("b", ttl=60) as other:
        assert (one, other) == (True, True)


NOTHING = Evidence(0, ())
USES: list[Callable[[Store, Spec], object]] = [
    lambda store, spec: store.read([spec]),
    lambda store, spec: store.acquire(spec, "a", lease=1),
    lambda store, spec: store.record(spec, NOTHING),
    lambda store, spec: store.settle(spec, "a", Outcome.SUCCESS, NOTHING),
    lambda store, spec: store.advance(spec),
    lambda store, spec: store.command(spec, Verb.RESET),
    lambda store, spec: store.renew(spec.name, ["a"], lease=1),
]
ENTRIES: list[Callable[[Ledger, str], object]] = [
    lambda ledger, name: ledger.add_deferred(name, "task"),
    lambda ledger, name: ledger.remove_deferred(name, ["task"]),
    lambda ledger, name: ledger.clear_deferred(name),
    lambda ledger, name: ledger.pace(name),
    lambda ledger, name: ledger.resumed(name, 1),
]


IMPOSSIBLE = pytest.mark.parametrize(
    "name", ["", " ", "pay{ments}", "pay}ments", "pay\nments", "pay\x00ments", "x" * 201, "\udcff"]
)


@IMPOSSIBLE
def test_names_that_no_key_could_hold_are_refused(lab: Lab, name: str) -> None:
    for use in USES:
        with pytest.raises(ConfigurationError, match="breaker name"):
            use(lab.store, Spec(name))


@SHARED
@IMPOSSIBLE
def test_names_that_no_key_could_hold_are_refused_by_the_ledger(lab: Lab, name: str) -> None:
    for use in ENTRIES:
        with pytest.raises(ConfigurationError, match="breaker name"):
            use(lab.ledger, name)


@SHARED
@pytest.mark.parametrize("name", ["payments:acme", "Zahlung über PayPal", "x/y?z=*[1]'\""])
def test_the_ledger_takes_all_other_names(lab: Lab, name: str) -> None:
    lab.ledger.add_deferred(name, "task")
    assert lab.breaker(name).snapshot().deferred == 1


@pytest.mark.parametrize("name", ["payments", "payments:acme", "Zahlung über PayPal", "a" * 200, "x/y?z=*[1]'\""])
def test_all_other_names_work(lab: Lab, name: str) -> None:
    breaker = lab.breaker(name, trial_calls=1).half_open()
    assert breaker.snapshot().name == name
    assert breaker.trials("S") is State.CLOSED
    assert {change.name for change in breaker.transitions} == {name}


@SHARED
def test_workers_that_attend_are_counted(lab: Lab) -> None:
    for worker in ("one", "two", "one"):
        lab.ledger.attend(worker)
    assert lab.ledger.workers() == 2
    lab.clock.advance(LONGEST_ABSENCE / 2)
    lab.ledger.attend("two")
    lab.clock.advance(LONGEST_ABSENCE / 2)
    assert lab.ledger.workers() == 1
