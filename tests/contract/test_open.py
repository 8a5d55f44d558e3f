"""How long it stays open."""

from __future__ import annotations

import pytest

from resilient_tasks.core.model import State, Verb
from tests.contract.lab import ONE_OF_EACH, Lab, Subject


def open_time(breaker: Subject) -> float:
    """Trip a breaker and return how long it opened for."""
    retry_after = breaker.open().snapshot().retry_after
    assert retry_after is not None
    return retry_after


def reopen_time(breaker: Subject) -> float:
    """Fail the next trial and return how long the breaker opened for."""
    lab_clock, retry_after = breaker.clock, breaker.snapshot().retry_after
    assert retry_after is not None
    lab_clock.advance(retry_after)
    assert breaker.trials("F") is State.OPEN
    return open_until_from_now(breaker)


def open_until_from_now(breaker: Subject) -> float:
    retry_after = breaker.snapshot().retry_after
    assert retry_after is not None
    return round(retry_after, 3)


def test_it_refuses_until_exactly_its_open_time_is_over(lab: Lab) -> None:
    breaker = lab.breaker().open()
    for left in (5.0, 3.0, 1.0, 0.001):
        lab.clock.advance(open_until_from_now(breaker) - left)
        grant = breaker.ask()
        assert not grant.admitted
        assert grant.snapshot.retry_after == pytest.approx(left, abs=1e-6)
        assert grant.snapshot.next_probe_at == grant.snapshot.open_until
    lab.clock.advance(0.001)
    grant = breaker.ask()
    assert (grant.admitted, grant.trial, grant.snapshot.state) == (True, True, State.HALF_OPEN)
    assert grant.snapshot.next_probe_at is None


def test_one_caller_learns_that_it_became_half_open(lab: Lab) -> None:
    breaker = lab.breaker().open()
    lab.clock.advance(5)
    transitions = [breaker.ask("a").transition, breaker.ask("b").transition, breaker.advance().transition]
    assert [t is not None for t in transitions] == [True, False, False]
    assert transitions[0] is not None
    assert (transitions[0].previous, transitions[0].state) == (State.OPEN, State.HALF_OPEN)


def test_openings_in_a_row_last_longer_and_longer_up_to_the_cap(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1, max_open_duration=30.0)
    assert open_time(breaker) == 5.0
    assert [reopen_time(breaker) for _ in range(4)] == [10.0, 20.0, 30.0, 30.0]
    assert breaker.snapshot().openings == 5


@ONE_OF_EACH
def test_a_growth_without_bounds_overflows_nothing(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1, open_multiplier=100.0, max_open_duration=30.0)
    open_time(breaker)
    assert [reopen_time(breaker) for _ in range(200)][-1] == 30.0


def test_time_spent_closed_takes_back_one_opening_per_max_open_duration(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1, max_open_duration=30.0, minimum_calls=1)
    open_time(breaker)
    reopen_time(breaker)
    reopen_time(breaker)
    lab.clock.advance(20)
    assert breaker.trials("S") is State.CLOSED
    assert breaker.calls("SSSS").snapshot.openings == 3, "one success takes nothing back"
    lab.clock.advance(30)
    assert breaker.snapshot().openings == 2
    lab.clock.advance(29.999)
    assert breaker.snapshot().openings == 2
    assert open_time(breaker) == 20.0, "the third in a row"


def test_a_long_calm_takes_back_all_openings(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1, max_open_duration=30.0)
    open_time(breaker)
    reopen_time(breaker)
    lab.clock.advance(10)
    breaker.trials("S")
    lab.clock.advance(3600)
    assert breaker.snapshot().openings == 0
    assert open_time(breaker) == 5.0


@pytest.mark.parametrize(("asked_for", "open_for"), [(1.0, 5.0), (17.5, 17.5), (9999.0, 60.0), (-3.0, 5.0)])
def test_retry_after_lengthens_the_open_time_up_to_the_cap(lab: Lab, asked_for: float, open_for: float) -> None:
    breaker = lab.breaker(max_open_duration=60.0)
    answer = breaker.batch(("F", 5), retry_after=asked_for)
    assert answer.snapshot.retry_after == pytest.approx(open_for)


def test_retry_after_of_a_failed_trial_counts_too(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("a")
    assert breaker.settle("a", "F", retry_after=42.0).snapshot.retry_after == pytest.approx(42.0)


@pytest.mark.parametrize(("jitter", "open_for"), [(0.0, 5.0), (0.5, 5.5), (0.999, 5.999)])
def test_jitter_only_lengthens(lab: Lab, jitter: float, open_for: float) -> None:
    breaker = lab.breaker(open_jitter=0.2)
    answer = lab.store.command(breaker.spec, Verb.TRIP, jitter=jitter)
    assert answer.snapshot.retry_after == pytest.approx(open_for, abs=1e-6)


def test_what_lands_while_open_changes_nothing(lab: Lab) -> None:
    breaker = lab.breaker()
    closed_epoch = breaker.calls("F").snapshot.epoch
    opened = breaker.batch(("F", 4)).snapshot
    lab.clock.advance(2)
    late = breaker.calls("FFF", epoch=closed_epoch, retry_after=60.0).snapshot
    now = breaker.calls("FFF", retry_after=60.0).snapshot
    for snapshot in (late, now):
        assert (snapshot.state, snapshot.epoch, snapshot.version) == (State.OPEN, opened.epoch, opened.version)
        assert (snapshot.open_until, snapshot.calls, snapshot.total_failures) == (opened.open_until, 5, 5)
    assert len(breaker.transitions) == 1


def test_the_figures_of_the_trip_stay_while_it_is_open_and_on_trial(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).open()
    lab.clock.advance(5)
    breaker.ask("a")
    assert (breaker.snapshot().calls, breaker.snapshot().failure_rate) == (5, 1.0)
    reopened = breaker.settle("a", "F").snapshot
    lab.clock.advance(3600)
    assert (reopened.calls, breaker.snapshot().calls) == (5, 5)
