"""No task opens a breaker on its own, no run adds twice, and a call that hangs adds while it still runs."""

from __future__ import annotations

from typing import Any

import pytest

from resilient_tasks.core.model import Calls, Outcome, State, Verb, voter_of
from resilient_tasks.core.rules import MOST_TASKS
from resilient_tasks.store.base import Evidence
from tests.contract.lab import Lab, Subject

POISON, OTHER = voter_of("poison"), voter_of("other")


def test_a_task_that_fails_again_and_again_adds_once(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=5)
    breaker.calls("FFFFFFFFFF", voter=POISON)
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.evidence, snapshot.calls) == (State.CLOSED, pytest.approx(0.2), 10)
    for task in "abcd":
        assert breaker.state is State.CLOSED
        breaker.calls("F", voter=voter_of(task))
    assert breaker.state is State.OPEN


def test_its_runs_add_again_once_the_score_was_0(lab: Lab) -> None:
    breaker = lab.breaker()
    assert breaker.calls("FSF", voter=POISON).snapshot.evidence == pytest.approx(0.2)
    assert breaker.calls("F", voter=POISON).snapshot.evidence == pytest.approx(0.2)
    lab.clock.advance(20)
    assert breaker.calls("F", voter=POISON).snapshot.evidence == pytest.approx(0.2)


def test_whole_runs_of_a_task_that_come_at_once_add_once(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.store.record(breaker.spec, Evidence(0, (Calls(Outcome.FAILURE, 7, POISON),)))
    assert breaker.snapshot().evidence == pytest.approx(0.2)


@pytest.mark.parametrize("letters", ["FF", "LL"])
def test_it_takes_as_many_tasks_as_the_policy_asks_for(lab: Lab, letters: str) -> None:
    breaker = lab.breaker(minimum_calls=2, slow_call_duration=1.0, minimum_tasks=3)
    for task in ("a", "b"):
        breaker.calls(letters, voter=voter_of(task))
    assert breaker.snapshot().evidence == (1.0 if letters == "FF" else 0.0)
    assert breaker.state is State.CLOSED
    assert breaker.calls(letters[0], voter=voter_of("c")).snapshot.state is State.OPEN


@pytest.mark.parametrize("policy", [{"minimum_calls": 1}, {"consecutive_failures": 1}])
def test_a_policy_that_opens_on_one_failure_needs_one_task(lab: Lab, policy: dict[str, Any]) -> None:
    assert lab.breaker(**policy).calls("F", voter=POISON).snapshot.state is State.OPEN


def test_calls_outside_any_task_are_tasks_of_their_own(lab: Lab) -> None:
    breaker = lab.breaker(minimum_tasks=5)
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED
    assert breaker.calls("F").snapshot.state is State.OPEN


def test_failures_in_a_row_open_when_enough_tasks_have_failed(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=2, minimum_calls=100, minimum_tasks=3)
    assert breaker.calls("FF").snapshot.state is State.CLOSED
    assert breaker.calls("F", cause="ReadTimeout").snapshot.reason == "3 consecutive failures, last: ReadTimeout"


def test_tasks_that_a_success_has_cleared_do_not_count(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=1, minimum_calls=100, minimum_tasks=2)
    breaker.calls("FS", voter=POISON)
    assert breaker.calls("F", voter=OTHER).snapshot.state is State.CLOSED


def test_evidence_of_another_epoch_is_none(lab: Lab) -> None:
    breaker = lab.breaker()
    epoch = breaker.calls("F", voter=POISON).snapshot.epoch
    assert breaker.calls("FFFFFF", voter=OTHER, epoch=epoch - 1).snapshot.calls == 1
    breaker.command(Verb.RESET)
    assert breaker.snapshot().evidence == 0.0
    assert breaker.calls("F", voter=POISON).snapshot.evidence == pytest.approx(0.2), "its tasks are forgotten, too"


def test_what_is_remembered_of_tasks_is_bounded(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=10 * MOST_TASKS)
    runs = tuple(Calls(Outcome.FAILURE, 1, voter_of(str(number))) for number in range(MOST_TASKS + 5))
    breaker.store.record(breaker.spec, Evidence(0, runs))

    def score() -> int:
        return round(breaker.snapshot().evidence * 10 * MOST_TASKS)

    assert score() == MOST_TASKS + 5
    breaker.calls("F", voter=voter_of("0"))
    assert score() == MOST_TASKS + 5
    breaker.calls("F", voter=voter_of(str(MOST_TASKS)))
    assert score() == MOST_TASKS + 6


def test_voters_are_known_by_the_id_of_their_task() -> None:
    assert voter_of("a") == voter_of("a") != voter_of("b")
    assert [len(voter_of(task_id)) for task_id in ("a", "é" * 300, "")] == [8, 8, 0]


# --- calls inside a task's body -----------------------------------------------------------------------


def test_calls_inside_a_task_all_add_and_open_nothing_on_their_own(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=10, consecutive_failures=3)
    snapshot = breaker.calls("F" * 10, voter=POISON, each=True).snapshot
    assert (snapshot.state, snapshot.evidence) == (State.CLOSED, 1.0)
    assert breaker.calls("F", voter=OTHER).snapshot.state is State.OPEN


def test_calls_of_a_task_that_come_at_once_count_as_one_by_one(lab: Lab) -> None:
    at_once, one_by_one = lab.breaker("at-once"), lab.breaker("one-by-one")
    runs = (Calls(Outcome.SUCCESS, 2), Calls(Outcome.FAILURE, 3, POISON, each=True), Calls(Outcome.SUCCESS, 1, POISON))
    at_once.store.record(at_once.spec, Evidence(at_once.snapshot().epoch, runs))
    one_by_one.calls("SSFFFS", voter=POISON, each=True)
    for breaker in (at_once, one_by_one):
        assert (breaker.snapshot().evidence, breaker.snapshot().calls) == (pytest.approx(0.4), 6)


# --- calls that hang ----------------------------------------------------------------------------------


def hanging(lab: Lab, **policy: Any) -> Subject:
    return lab.breaker(slow_call_duration=1.0, **policy)


def test_tasks_that_hang_open_it_while_they_still_run(lab: Lab) -> None:
    breaker = hanging(lab)
    for second in range(3):
        assert breaker.state is State.CLOSED, second
        for task in ("a", "b"):
            answer = breaker.calls("O", voter=voter_of(task))
        lab.clock.advance(1)
    snapshot = answer.snapshot
    assert (snapshot.state, snapshot.calls, snapshot.slow, snapshot.last_success_at) == (State.OPEN, 0, 0, None)
    assert snapshot.reason == "slow evidence 5 of 5: slow, hanging or failed 5 times, in time 0 times"


def test_one_task_alone_never_opens_it(lab: Lab) -> None:
    breaker = hanging(lab)
    assert breaker.calls("O" * 20, voter=POISON).snapshot.state is State.CLOSED
    assert breaker.snapshot().slow_evidence == 1.0
    assert breaker.calls("O", voter=OTHER).snapshot.state is State.OPEN


@pytest.mark.parametrize(
    ("end", "sums", "evidence"), [("S", (1, 0, 0), 0.0), ("L", (1, 0, 1), 0.0), ("F", (1, 1, 0), 0.2)]
)
def test_the_end_of_a_call_that_hung_says_nothing_more_about_slowness(
    lab: Lab, end: str, sums: tuple[int, int, int], evidence: float
) -> None:
    breaker = hanging(lab)
    breaker.calls("OO", voter=POISON)
    snapshot = breaker.calls(end, voter=POISON, was_overdue=True).snapshot
    assert (snapshot.calls, snapshot.failures, snapshot.slow) == sums
    assert (snapshot.evidence, snapshot.slow_evidence) == (pytest.approx(evidence), pytest.approx(0.4))


def test_where_nothing_is_slow_a_call_that_hangs_adds_nothing(lab: Lab) -> None:
    """A process of another release declares a ``slow_call_duration`` that the newest policy has not."""
    assert lab.breaker().calls("OOOOOOOO").snapshot.slow_evidence == 0.0


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
