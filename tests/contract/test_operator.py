"""What an operator can do, and who receives it."""

from __future__ import annotations

import pytest

from resilient_tasks.core.model import State, Verb
from tests.contract.lab import ONE_OF_EACH, Lab, Subject

STATES = {
    Verb.TRIP: State.OPEN,
    Verb.ISOLATE: State.FORCED_OPEN,
    Verb.DISABLE: State.DISABLED,
    Verb.SHADOW: State.SHADOW,
    Verb.RESET: State.CLOSED,
}


def test_isolate_refuses_for_ever_until_reset(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.ISOLATE, reason="maintenance", actor="ada")
    lab.clock.advance(30 * 24 * 3600)
    assert breaker.advance().transition is None
    grant = breaker.ask()
    assert (grant.admitted, grant.trial, grant.snapshot.state) == (False, False, State.FORCED_OPEN)
    assert (grant.snapshot.reason, grant.snapshot.actor) == ("maintenance", "ada")
    assert (grant.snapshot.retry_after, grant.snapshot.next_probe_at) == (None, None)

    breaker.command(Verb.RESET)
    assert breaker.ask().admitted


def test_disable_admits_all_and_counts_nothing(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.DISABLE)
    snapshot = breaker.calls("FFFFFFFFFF").snapshot
    assert (snapshot.state, snapshot.calls, snapshot.total_failures) == (State.DISABLED, 0, 0)
    grant = breaker.ask()
    assert (grant.admitted, grant.trial) == (True, False)


def test_shadow_counts_admits_and_reports_once_that_it_would_have_opened(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.SHADOW)
    assert breaker.calls("FFFF", cause="ReadTimeout").transition is None

    answer = breaker.batch(("F", 1), ("S", 5), cause="ReadTimeout")

    made, snapshot = answer.transition, answer.snapshot
    assert made is not None
    assert (made.previous, made.state, made.would_open, made.epoch) == (
        State.SHADOW,
        State.SHADOW,
        True,
        snapshot.epoch,
    )
    assert (made.calls, made.failures) == (10, 5)
    assert made.reason == "evidence 5 of 5: of the last 10 calls 5 failed, last: ReadTimeout"
    assert (snapshot.state, snapshot.would_open, snapshot.calls) == (State.SHADOW, True, 10)
    assert breaker.ask().admitted
    assert breaker.calls("FFFFFFFF").transition is None
    assert (breaker.snapshot().calls, breaker.snapshot().would_have_opened) == (18, 1)

    breaker.command(Verb.RESET)
    assert not breaker.snapshot().would_open


def test_trip_is_like_a_trip(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.calls("SSF")
    snapshot = breaker.command(Verb.TRIP, reason="drill", actor="ada").snapshot
    assert (snapshot.state, snapshot.openings, snapshot.retry_after) == (State.OPEN, 1, pytest.approx(5.0))
    assert (snapshot.calls, snapshot.failures) == (3, 1)
    lab.clock.advance(5)
    assert breaker.ask().trial


def test_reset_closes_with_nothing_left(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.trials("F")
    snapshot = breaker.command(Verb.RESET, reason="fixed", actor="ada").snapshot
    assert (snapshot.state, snapshot.calls, snapshot.openings, snapshot.trials) == (State.CLOSED, 0, 0, 0)
    assert (snapshot.ramp_since, snapshot.open_until) == (None, None)
    assert breaker.batch(("F", 5)).snapshot.retry_after == pytest.approx(5.0)


def test_reset_drops_permits(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("a")
    breaker.command(Verb.RESET)
    assert breaker.settle("a", "F").snapshot.state is State.CLOSED


def test_reset_while_closed_empties_the_window_without_a_transition(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1, consecutive_failures=5).half_open()
    breaker.trials("S")
    before = breaker.calls("FFFF").snapshot
    answer = breaker.command(Verb.RESET)
    snapshot = answer.snapshot
    assert answer.transition is None
    assert (snapshot.epoch, snapshot.since, snapshot.calls) == (before.epoch, before.since, 0)
    assert (snapshot.openings, snapshot.ramp_since) == (0, None)
    assert snapshot.version > before.version, "views learn that the ramp is over"
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED


def enter(breaker: Subject, state: State) -> None:
    if state is State.HALF_OPEN:
        breaker.half_open()
    else:
        breaker.command({target: verb for verb, target in STATES.items()}[state])
    assert breaker.state is state


@ONE_OF_EACH
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("verb", Verb)
def test_each_verb_in_each_state_makes_one_transition_or_none(lab: Lab, state: State, verb: Verb) -> None:
    breaker = lab.breaker()
    enter(breaker, state)
    before = breaker.snapshot()
    answer = breaker.command(verb, reason="because", actor="ada")
    snapshot, made = answer.snapshot, answer.transition
    assert snapshot.state is STATES[verb]
    if state is STATES[verb]:
        assert made is None
        assert (snapshot.epoch, snapshot.reason, snapshot.since) == (before.epoch, before.reason, before.since)
    else:
        assert made is not None
        assert (made.previous, made.state, made.epoch) == (state, STATES[verb], snapshot.epoch)
        assert (made.reason, made.actor, made.at) == ("because", "ada", lab.clock())
        assert (snapshot.reason, snapshot.actor, snapshot.since) == ("because", "ada", lab.clock())
        assert snapshot.epoch == before.epoch + 1
        assert snapshot.version > before.version


def test_every_transition_is_returned_once_in_order(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.trials("F")
    lab.clock.advance(10)
    breaker.trials("S")
    breaker.command(Verb.ISOLATE)
    states = [State.OPEN, State.HALF_OPEN, State.OPEN, State.HALF_OPEN, State.CLOSED, State.FORCED_OPEN]
    assert [made.state for made in breaker.transitions] == states
    epochs = [made.epoch for made in breaker.transitions]
    assert epochs == sorted(set(epochs))


def test_who_joins_later_obeys_the_operator_too(lab: Lab) -> None:
    lab.breaker().command(Verb.ISOLATE, reason="maintenance")
    newcomer = lab.breaker(minimum_calls=99)
    assert not newcomer.ask().admitted
    assert newcomer.snapshot().reason == "maintenance"
