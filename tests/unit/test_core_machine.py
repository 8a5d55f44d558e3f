"""The rules as pure questions and answers; the contract suite tells the stories around them."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks.core.machine import Decision
from resilient_tasks.core.model import Calls, Outcome, State, Verb
from resilient_tasks.core.record import Record, Rules
from resilient_tasks.core.tripping import rate_trips, row_trips, trip_point
from resilient_tasks.policy import BreakerPolicy

NOW = 1_789_000_000_123
LETTERS = {"S": Outcome.SUCCESS, "F": Outcome.FAILURE, "L": Outcome.SLOW, "I": Outcome.IGNORED}


def new(**policy: object) -> Record:
    rules = Rules.of(BreakerPolicy(**{"open_jitter": 0.0, **policy}), 0)  # type: ignore[arg-type]
    return Record.created("payments", rules, NOW)


def report(record: Record, *runs: tuple[Outcome, int]) -> Decision:
    decision = Decision(record, NOW)
    decision.report(record.epoch, [Calls(*run) for run in runs], "ReadTimeout")
    return decision


@pytest.mark.parametrize(
    ("letters", "state", "reason"),
    [
        ("FFFS", State.CLOSED, ""),
        ("FFFSS", State.OPEN, "failure rate 60 % of 5 calls, last: ReadTimeout"),
        ("SSSFF", State.CLOSED, ""),
        ("SSSFFF", State.OPEN, "failure rate 50 % of 6 calls, last: ReadTimeout"),
        ("LLSSL", State.OPEN, "slow rate 60 % of 5 calls"),
        ("FLFLS", State.CLOSED, ""),
        ("SSSSSSSSSSSSSSSSFFFF", State.OPEN, "4 consecutive failures, last: ReadTimeout"),
        ("SSSSSSSSSSSSSSSSFFFIF", State.OPEN, "4 consecutive failures, last: ReadTimeout"),
        ("SSSSSSSSSSSSSSSSFFFLFFF", State.CLOSED, ""),
    ],
)
def test_when_it_trips(letters: str, state: State, reason: str) -> None:
    record = new(minimum_calls=5, slow_call_rate_threshold=0.6, consecutive_failures=4)
    report(record, *((LETTERS[letter], 1) for letter in letters))
    assert (record.state, record.reason) == (state, reason)


runs = st.lists(st.tuples(st.sampled_from(list(Outcome)), st.integers(0, 60)), max_size=8)
policies = st.fixed_dictionaries(
    {
        "failure_rate_threshold": st.floats(0.01, 1),
        "slow_call_rate_threshold": st.floats(0.01, 1),
        "minimum_calls": st.integers(1, 80),
        "consecutive_failures": st.none() | st.integers(1, 50),
        "minimum_tasks": st.none() | st.integers(1, 60),
    }
)


@given(policy=policies, runs=runs, verbs=st.sampled_from([(), (Verb.SHADOW,)]))
def test_a_run_equals_its_outcomes_one_by_one(
    policy: dict[str, object], runs: list[tuple[Outcome, int]], verbs: tuple[Verb, ...]
) -> None:
    at_once, one_by_one = new(**policy), new(**policy)
    for verb in verbs:
        Decision(at_once, NOW).command(verb)
        Decision(one_by_one, NOW).command(verb)
    told = report(at_once, *runs).transition
    single = report(one_by_one, *((outcome, 1) for outcome, count in runs for _ in range(count))).transition
    assert told == single
    assert asdict(at_once) == asdict(one_by_one)


@given(policy=policies, before=st.integers(0, 10**9), run=st.integers(1, 10**9))
def test_the_trip_point_of_a_huge_run_is_the_first(policy: dict[str, object], before: int, run: int) -> None:
    record = new(**policy)
    record.window.add(Calls(Outcome.SUCCESS, before), now=NOW, length=record.rules.window)
    rules, totals = record.rules, record.figures(NOW)
    point = trip_point(rules, totals, record.row, Calls(Outcome.FAILURE, run))
    assert point is None or 1 <= point <= run
    for position, trips in ((point or run + 1) - 1, False), (point, True):
        if position:
            then = totals.plus(Calls(Outcome.FAILURE, position))
            assert (rate_trips(rules, then) is not None or row_trips(rules, position, then)) is trips


def test_a_decision_makes_at_most_one_transition_and_says_that_others_should_hear() -> None:
    record = new(minimum_calls=1)
    decision = report(record, (Outcome.FAILURE, 3), (Outcome.SUCCESS, 3))
    assert decision.transition is not None
    assert (decision.transition.previous, decision.transition.state) == (State.CLOSED, State.OPEN)
    assert (decision.changed, record.epoch, record.version) == (True, NOW + 1, NOW + 1)
    assert record.total_failures == 1, "the rest belongs to an older epoch"


def test_a_decision_that_changes_nothing_says_so() -> None:
    record = new()
    decision = report(record, (Outcome.FAILURE, 3))
    assert (decision.transition, decision.changed, record.version) == (None, False, NOW)


def test_permits_beyond_a_smaller_policy_are_judged_at_the_next_look() -> None:
    """A deploy lowered ``trial_calls`` while a breaker was HALF_OPEN."""
    record = new(minimum_calls=1, trial_calls=5, open_duration=1.0)
    Decision(record, NOW).command(Verb.TRIP)
    later = NOW + 1000
    for holder in "abcd":
        assert Decision(record, later).acquire(holder, 1000) == (True, True)
    for holder in "ab":
        Decision(record, later).settle(holder, record.epoch, Outcome.SUCCESS)
    assert record.state is State.HALF_OPEN
    record.rules = Rules.of(BreakerPolicy(trial_calls=2), 1)
    assert Decision(record, later).acquire("e", 1000) == (True, False)
    assert record.state is State.CLOSED


def test_asking_again_with_a_permit_lengthens_no_earlier_trial_of_the_same_holder() -> None:
    record = new(trial_calls=2)
    record.state, record.trials, record.stragglers = State.HALF_OPEN, {"a": NOW + 10}, {"a": NOW + 20}
    assert Decision(record, NOW).acquire("a", 1000) == (True, True)
    assert (record.trials, record.stragglers) == ({"a": NOW + 1000}, {"a": NOW + 20})
