"""Decisions go on while the shared store is unavailable, and come back to it by themselves."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from resilient_tasks.core.model import Calls, Outcome, State, Verb
from resilient_tasks.errors import StoreError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.local import FailoverStore
from tests.support.doubles import FlakyStore, ManualClock

SPEC = Spec("payments", BreakerPolicy(minimum_calls=3, trial_calls=2, open_duration=10, open_jitter=0))
SERVER_AHEAD = 60.0


class Line:
    """A failover store, the shared store behind it, and the clock of both."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.shared = FlakyStore(lambda: self.clock() + SERVER_AHEAD)
        self.store = FailoverStore(self.shared, clock=self.clock)

    def fail(self, times: int) -> Any:
        epoch = self.store.read([SPEC])[0].epoch
        return self.store.record(SPEC, Evidence(epoch, (Calls(Outcome.FAILURE, times),), "ConnectTimeout"))

    def state(self) -> State:
        return self.store.read([SPEC])[0].state


@pytest.fixture
def line() -> Line:
    return Line()


def test_the_shared_store_decides_while_it_answers(line: Line) -> None:
    line.fail(3)
    assert line.shared.inner.read([SPEC])[0].state is State.OPEN
    assert not line.store.is_unavailable


def test_a_local_breaker_opens_while_the_store_is_away_and_is_forgotten_when_it_is_back(line: Line) -> None:
    line.shared.is_unavailable = True
    answer = line.fail(3)
    assert answer.transition.state is State.OPEN
    assert line.store.is_unavailable
    assert line.state() is State.OPEN
    line.shared.is_unavailable = False
    assert line.state() is State.CLOSED
    assert not line.store.is_unavailable
    line.shared.is_unavailable = True
    assert line.state() is State.CLOSED


def test_open_is_honoured_until_its_deadline_then_local_trials_heal(line: Line) -> None:
    line.fail(3)
    line.clock.advance(4)
    line.shared.is_unavailable = True
    snapshot = line.store.read([SPEC])[0]
    assert snapshot.state is State.OPEN
    assert snapshot.retry_after == pytest.approx(6, abs=0.01)
    line.clock.advance(5.9)
    assert not line.store.acquire(SPEC, "a", lease=5).admitted
    line.clock.advance(0.2)
    for holder in ("a", "b"):
        grant = line.store.acquire(SPEC, holder, lease=5)
        assert grant.trial
        line.store.settle(SPEC, holder, Outcome.SUCCESS, Evidence(grant.snapshot.epoch, ()))
    assert line.state() is State.CLOSED


@pytest.mark.parametrize("verb", [Verb.ISOLATE, Verb.DISABLE, Verb.SHADOW])
def test_what_an_operator_has_set_stays_set(line: Line, verb: Verb) -> None:
    state = line.store.command(SPEC, verb).snapshot.state
    line.shared.is_unavailable = True
    line.clock.advance(3600)
    assert line.state() is state
    line.fail(100)
    assert line.state() is state


def test_changes_made_by_others_are_known_as_well(line: Line) -> None:
    changes = line.store.changes(timeout=0.01)
    next(changes)
    line.shared.inner.command(SPEC, Verb.ISOLATE)
    assert next(changes) is not None
    line.shared.is_unavailable = True
    assert line.state() is State.FORCED_OPEN


def test_the_next_absence_goes_on_from_the_newest_state(line: Line) -> None:
    line.state()
    line.shared.is_unavailable = True
    line.state()
    line.shared.is_unavailable = False
    line.fail(3)
    line.shared.is_unavailable = True
    assert line.state() is State.OPEN


def test_time_stays_the_servers(line: Line) -> None:
    line.state()
    line.shared.is_unavailable = True
    line.clock.advance(5)
    assert line.store.read([SPEC])[0].now == pytest.approx(line.clock() + SERVER_AHEAD, abs=0.01)


def test_no_decision_raises(line: Line) -> None:
    line.shared.is_unavailable = True
    evidence = Evidence(0, (Calls(Outcome.SUCCESS, 1),))
    assert line.store.read([SPEC, Spec("mail")])[1].name == "mail"
    assert line.store.acquire(SPEC, "holder", lease=5).admitted
    assert line.store.record(SPEC, evidence).snapshot.calls == 1
    assert line.store.settle(SPEC, "holder", Outcome.SUCCESS, evidence).transition is None
    assert line.store.advance(SPEC).transition is None
    assert line.store.renew("payments", ["holder", "other"], lease=5) == [True, True]


def test_local_permits_are_renewed(line: Line) -> None:
    line.shared.is_unavailable = True
    line.fail(3)
    line.clock.advance(10)
    grant = line.store.acquire(SPEC, "holder", lease=5)
    for _ in range(4):
        line.clock.advance(4)
        line.store.renew("payments", ["holder"], lease=5)
    assert grant.trial
    assert line.store.read([SPEC])[0].trials == 1


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda store: store.command(SPEC, Verb.TRIP).snapshot.state, State.OPEN),
        (lambda store: store.put("kind", "key", b"value", ttl=5), None),
        (lambda store: store.get("kind", "key"), (b"kept", 0.0)),
        (lambda store: next(store.changes(timeout=0.01)), None),
    ],
)
def test_what_one_process_cannot_make_up_raises(line: Line, ask: Any, answer: object) -> None:
    line.shared.put("kind", "key", b"kept", ttl=5)
    assert ask(line.store) == answer
    line.shared.is_unavailable = True
    with pytest.raises(StoreError):
        ask(line.store)


def test_going_and_coming_back_are_logged_once(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        line.shared.is_unavailable = True
        for _ in range(5):
            line.state()
        line.shared.is_unavailable = False
        for _ in range(5):
            line.state()
    assert ["unavailable" in record.message for record in caplog.records] == [True, False]


def test_an_emptied_store_is_taken_at_its_word(line: Line) -> None:
    line.fail(3)
    line.shared.is_unavailable = True
    line.state()
    line.shared.wipe(lambda: line.clock() + SERVER_AHEAD)
    line.shared.is_unavailable = False
    assert line.state() is State.CLOSED
