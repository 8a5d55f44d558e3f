"""One vote per task and window: no task opens a breaker on its own, and no run is counted twice."""

from __future__ import annotations

from typing import Any

import pytest

from resilient_tasks.core.model import Calls, Outcome, State, Verb, voter_of
from resilient_tasks.core.window import MOST_VOTERS
from resilient_tasks.store.base import Evidence
from tests.contract.lab import Lab

POISON, OTHER = voter_of("poison"), voter_of("other")


def test_a_task_that_fails_again_and_again_is_one_failure(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=3)
    breaker.calls("FFFFFFFFFF", voter=POISON)
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.calls, snapshot.failures, snapshot.total_failures) == (State.CLOSED, 1, 1, 1)
    breaker.calls("FF")
    assert breaker.state is State.OPEN, "others that fail, too, are votes of their own"


def test_a_task_has_a_vote_again_when_its_last_one_has_left_the_window(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.calls("F", voter=POISON)
    lab.clock.advance(19.9)
    assert breaker.calls("F", voter=POISON).snapshot.failures == 1
    lab.clock.advance(2.2)
    assert breaker.calls("F", voter=POISON).snapshot.failures == 1
    assert breaker.snapshot().total_failures == 2


@pytest.mark.parametrize("letters", ["FF", "LL"])
def test_it_takes_as_many_tasks_as_the_policy_asks_for(lab: Lab, letters: str) -> None:
    breaker = lab.breaker(minimum_calls=2, failure_rate_threshold=0.1, slow_call_rate_threshold=0.1, minimum_tasks=3)
    for task in ("a", "b"):
        breaker.calls(letters, voter=voter_of(task))
    assert breaker.calls("SSSSS").snapshot.state is State.CLOSED
    assert breaker.calls(letters[0], voter=voter_of("c")).snapshot.state is State.OPEN


def test_by_default_two_tasks_must_have_failed(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=3, failure_rate_threshold=0.2)
    assert breaker.calls("SSF", voter=POISON).snapshot.state is State.CLOSED
    assert breaker.calls("F", voter=OTHER).snapshot.state is State.OPEN


@pytest.mark.parametrize("policy", [{"minimum_calls": 1}, {"consecutive_failures": 1}])
def test_a_policy_that_opens_on_one_failure_needs_one_task(lab: Lab, policy: dict[str, Any]) -> None:
    assert lab.breaker(**policy).calls("F", voter=POISON).snapshot.state is State.OPEN


def test_successes_of_a_task_all_count(lab: Lab) -> None:
    snapshot = lab.breaker().calls("SSFSS", voter=POISON).snapshot
    assert (snapshot.calls, snapshot.failures) == (5, 1)


def test_failures_in_a_row_open_when_enough_tasks_have_failed(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=2, minimum_calls=100, minimum_tasks=3)
    assert breaker.calls("FF").snapshot.state is State.CLOSED
    assert breaker.batch(("F", 5)).snapshot.failures == 3


def test_an_overdue_call_is_slow_before_it_ends_and_has_been_no_success(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, consecutive_failures=4)
    breaker.calls("FFF")
    snapshot = breaker.calls("O", voter=POISON).snapshot
    assert (snapshot.state, snapshot.calls, snapshot.slow, snapshot.last_success_at) == (State.CLOSED, 4, 1, None)
    assert breaker.calls("F").snapshot.reason == "failure rate 80 % of 5 calls"


def test_overdue_calls_open_the_breaker(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0)
    for number in range(5):
        answer = breaker.calls("O", voter=voter_of(str(number)))
    assert answer.snapshot.reason == "slow rate 100 % of 5 calls"


def test_an_overdue_call_that_ends_late_is_counted_once(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0)
    breaker.calls("OL", voter=POISON)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.slow, snapshot.last_success_at) == (1, 1, lab.clock())


def test_an_overdue_call_that_fails_is_a_failure_instead(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0)
    breaker.calls("O", voter=POISON)
    lab.clock.advance(7)
    breaker.calls("FF", voter=POISON)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.slow, snapshot.failures, snapshot.total_failures) == (1, 0, 1, 1)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"slow_call_rate_threshold": 0.7}, "failure rate 60 % of 5 calls"),
        ({"minimum_calls": 100}, "3 consecutive failures"),
    ],
)
def test_a_vote_that_becomes_a_failure_may_open_the_breaker(lab: Lab, policy: dict[str, Any], reason: str) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, failure_rate_threshold=0.6, consecutive_failures=3, **policy)
    breaker.calls("SS")
    for task in "abc":
        breaker.calls("O", voter=voter_of(task))
    for task in "ab":
        assert breaker.calls("F", voter=voter_of(task)).snapshot.state is State.CLOSED
    answer = breaker.calls("F", voter=voter_of("c"), cause="ReadTimeout")
    assert (answer.snapshot.state, answer.snapshot.reason) == (State.OPEN, f"{reason}, last: ReadTimeout")
    assert [transition.state for transition in breaker.transitions] == [State.OPEN]


def test_in_shadow_a_vote_that_becomes_a_failure_tells_once(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, minimum_calls=2)
    breaker.command(Verb.SHADOW)
    for letters in ("O", "F"):
        for task in "abc":
            breaker.calls(letters, voter=voter_of(task))
    assert [transition.would_open for transition in breaker.transitions] == [False, True]
    assert breaker.snapshot().failures == 3


def test_a_vote_of_another_epoch_is_no_vote(lab: Lab) -> None:
    breaker = lab.breaker()
    epoch = breaker.calls("F", voter=POISON).snapshot.epoch
    assert breaker.calls("FFFFFF", voter=OTHER, epoch=epoch - 1).snapshot.calls == 1
    breaker.command(Verb.RESET)
    assert breaker.calls("F", voter=POISON).snapshot.failures == 1, "the window was emptied, with its voters"


def test_what_is_remembered_of_voters_is_bounded(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=1000)
    for number in range(MOST_VOTERS + 5):
        breaker.calls("F", voter=voter_of(str(number)), epoch=0)
    assert breaker.calls("F", voter=voter_of("0")).snapshot.calls == MOST_VOTERS + 5
    assert breaker.calls("F", voter=voter_of(str(MOST_VOTERS))).snapshot.calls == MOST_VOTERS + 6


def test_an_overdue_trial_has_failed_and_is_still_in_flight(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, trial_calls=2, trial_successes=1).half_open()
    breaker.ask("hangs")
    breaker.settle("hangs", "O")
    assert (breaker.state, breaker.snapshot().trials) == (State.HALF_OPEN, 1)
    assert lab.store.renew(breaker.name, ["hangs"], lease=30.0) == [True]
    assert breaker.ask("second").trial
    assert not breaker.ask("third").trial, "two are in flight"
    breaker.settle("hangs", "S")
    assert (breaker.state, breaker.snapshot().trials) == (State.HALF_OPEN, 1), "its vote was cast when it was overdue"
    breaker.settle("second", "S")
    assert breaker.state is State.CLOSED


def test_an_overdue_trial_opens_the_breaker_and_frees_its_permit_when_it_ends(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, trial_calls=1).half_open()
    epoch = breaker.ask("hangs").snapshot.epoch
    breaker.settle("hangs", "O")
    assert (breaker.state, breaker.snapshot().trials) == (State.OPEN, 1)
    breaker.settle("hangs", "O", epoch=epoch)
    assert breaker.snapshot().trials == 1
    breaker.settle("hangs", "F", epoch=epoch)
    assert (breaker.state, breaker.snapshot().trials) == (State.OPEN, 0)


def test_a_trial_is_not_overdue_where_nothing_is_slow(lab: Lab) -> None:
    """A process of another release declares a ``slow_call_duration`` that the newest policy has not."""
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("trial")
    breaker.settle("trial", "O")
    assert breaker.state is State.HALF_OPEN
    breaker.settle("trial", "S")
    assert breaker.state is State.CLOSED


def test_voters_are_told_by_the_id_of_their_task() -> None:
    assert voter_of("a") == voter_of("a") != voter_of("b")
    assert [len(voter_of(task_id)) for task_id in ("a", "é" * 300, "")] == [8, 8, 0]


# --- calls inside a task's body -----------------------------------------------------------------------


def test_calls_inside_a_task_all_count_and_open_nothing_on_their_own(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=3)
    snapshot = breaker.calls("FSFFFFF", voter=POISON, each=True).snapshot
    assert (snapshot.state, snapshot.calls, snapshot.failures) == (State.CLOSED, 7, 6)
    assert breaker.calls("F", voter=OTHER).snapshot.state is State.OPEN


def test_calls_of_a_task_that_come_at_once_count_as_one_by_one(lab: Lab) -> None:
    at_once, one_by_one = lab.breaker("at-once"), lab.breaker("one-by-one")
    for breaker in (at_once, one_by_one):
        breaker.calls("F", voter=OTHER)
    runs = (Calls(Outcome.SUCCESS, 2), Calls(Outcome.FAILURE, 9, POISON, each=True))
    at_once.store.record(at_once.spec, Evidence(at_once.snapshot().epoch, runs))
    one_by_one.calls("SSFFFFFFFFF", voter=POISON, each=True)
    for breaker in (at_once, one_by_one):
        assert (breaker.state, breaker.snapshot().calls) == (State.OPEN, 5)


@pytest.mark.parametrize(
    ("letters", "calls", "slow", "failures"),
    [("OF", 1, 0, 1), ("OL", 1, 1, 0), ("OLOL", 2, 2, 0), ("OFOF", 2, 0, 2), ("FOO", 2, 1, 1), ("LFL", 3, 2, 1)],
)
def test_a_call_inside_a_task_that_was_overdue_counts_once(
    lab: Lab, letters: str, calls: int, slow: int, failures: int
) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, minimum_calls=100)
    for letter in letters:
        breaker.calls(letter, voter=POISON, each=True)
        lab.clock.advance(3)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.slow, snapshot.failures) == (calls, slow, failures)


def test_slow_calls_make_up_the_tasks_that_a_failure_rate_needs(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=2, failure_rate_threshold=0.3, minimum_tasks=3)
    assert breaker.calls("F", voter=POISON).snapshot.state is State.CLOSED
    assert breaker.batch(("L", 5)).snapshot.reason == "failure rate 33 % of 3 calls"
