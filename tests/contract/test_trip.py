"""When a breaker opens."""

from __future__ import annotations

import pytest

from resilient_tasks.core.model import State
from tests.contract.lab import Lab


def test_the_rate_is_judged_at_every_outcome_and_trips_once(lab: Lab) -> None:
    breaker = lab.breaker()
    assert breaker.calls("FFFS", cause="ReadTimeout").snapshot.state is State.CLOSED

    answer = breaker.calls("S")

    assert answer.snapshot.state is State.OPEN
    assert answer.snapshot.reason == "failure rate 60 % of 5 calls"
    assert (answer.snapshot.calls, answer.snapshot.failures, answer.snapshot.failure_rate) == (5, 3, 0.6)
    assert [(t.previous, t.state) for t in breaker.transitions] == [(State.CLOSED, State.OPEN)]
    assert not breaker.ask().admitted


def test_the_threshold_is_inclusive(lab: Lab) -> None:
    breaker = lab.breaker()
    for letter in "SSSFF":
        assert breaker.calls(letter).snapshot.state is State.CLOSED
        lab.clock.advance(1)
    assert breaker.calls("F", cause="HTTP 503").snapshot.reason == "failure rate 50 % of 6 calls, last: HTTP 503"


def test_slow_calls_open_it_although_nothing_failed(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, slow_call_rate_threshold=0.5)
    snapshot = breaker.calls("LSLLL").snapshot
    assert snapshot.state is State.OPEN
    assert (snapshot.slow_rate, snapshot.failure_rate) == (0.8, 0.0)
    assert snapshot.reason == "slow rate 80 % of 5 calls"


def test_consecutive_failures_count_whatever_the_rate(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=6, minimum_calls=1000)
    assert breaker.calls("FFFFFSFFFFF").snapshot.state is State.CLOSED
    answer = breaker.calls("F", cause="HTTP 503")
    assert answer.snapshot.state is State.OPEN
    assert answer.snapshot.reason == "6 consecutive failures, last: HTTP 503"


@pytest.mark.parametrize("ends_the_row", ["S", "L"])
def test_a_late_success_ends_a_row_of_failures_too(lab: Lab, ends_the_row: str) -> None:
    breaker = lab.breaker(consecutive_failures=2, minimum_calls=1000)
    assert breaker.calls(f"F{ends_the_row}F").snapshot.state is State.CLOSED
    assert breaker.calls("F").snapshot.state is State.OPEN


def test_ignored_outcomes_are_counted_nowhere(lab: Lab) -> None:
    breaker = lab.breaker(consecutive_failures=5)
    snapshot = breaker.calls("FFIIIIIIFF").snapshot
    assert (snapshot.state, snapshot.calls, snapshot.total_failures) == (State.CLOSED, 4, 4)
    assert breaker.calls("F").snapshot.state is State.OPEN


@pytest.mark.parametrize("offset", [0.0, 0.4, 1.3, 1.999])
def test_calls_older_than_the_window_do_not_count(lab: Lab, offset: float) -> None:
    lab.clock.advance(offset)
    breaker = lab.breaker(minimum_calls=5)
    breaker.calls("FF")
    lab.clock.advance(21)
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED
    assert breaker.snapshot().calls == 4


@pytest.mark.parametrize("offset", [0.0, 0.4, 1.3, 1.999])
def test_every_call_counts_for_the_whole_window(lab: Lab, offset: float) -> None:
    lab.clock.advance(offset)
    breaker = lab.breaker(minimum_calls=5)
    breaker.calls("FF")
    lab.clock.advance(19.999)
    assert breaker.snapshot().calls == 2
    assert breaker.calls("FFF").snapshot.state is State.OPEN


@pytest.mark.parametrize("offset", [0.0, 0.4, 1.3, 1.999])
def test_no_call_outlives_the_window_by_more_than_a_tenth(lab: Lab, offset: float) -> None:
    lab.clock.advance(offset)
    breaker = lab.breaker(minimum_calls=1000)
    for _ in range(100):
        breaker.calls("S")
        lab.clock.advance(1)
    assert 19 <= breaker.snapshot().calls <= 22, "those younger than 20 s, and at most a bucket of older ones"
    lab.clock.advance(22)
    assert breaker.snapshot().calls == 0


def test_a_batch_trips_where_single_outcomes_would_have(lab: Lab) -> None:
    batched = lab.breaker("batched")
    single = lab.breaker("single")
    single.calls("SSSSFFFFFF")
    answer = batched.batch(("S", 4), ("F", 6))
    assert answer.snapshot.state is State.OPEN
    assert (answer.snapshot.calls, answer.snapshot.failures) == (8, 4)
    assert single.snapshot().calls == 8
    assert batched.snapshot().total_failures == single.snapshot().total_failures == 4


def test_a_huge_run_is_counted_at_once(lab: Lab) -> None:
    breaker = lab.breaker(failure_rate_threshold=0.5, minimum_calls=5)
    snapshot = breaker.batch(("S", 400_000), ("F", 10_000_000)).snapshot
    assert (snapshot.state, snapshot.calls, snapshot.failures) == (State.OPEN, 800_000, 400_000)


def test_reports_of_another_epoch_are_dropped(lab: Lab) -> None:
    breaker = lab.breaker()
    epoch = breaker.calls("S").snapshot.epoch
    assert breaker.calls("FFFFFFFF", epoch=epoch - 1).snapshot.calls == 1
    assert breaker.calls("FFFFFFFF", epoch=epoch + 1).snapshot.calls == 1


def test_the_first_reports_of_many_processes_all_count(lab: Lab) -> None:
    """None of them had seen the breaker in the store when it admitted its call."""
    breaker = lab.breaker()
    unknown = breaker.snapshot()
    assert (unknown.epoch, unknown.state) == (0, State.CLOSED)
    assert breaker.calls("FFFF", epoch=0).snapshot.calls == 4
    assert breaker.calls("F", epoch=0).snapshot.state is State.OPEN
    assert breaker.calls("F", epoch=0).snapshot.total_failures == 5


def test_last_success_and_total_failures_are_kept(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0)
    assert breaker.snapshot().last_success_at is None
    breaker.calls("S")
    lab.clock.advance(2.5)
    breaker.calls("L")
    slow_at = lab.clock()
    lab.clock.advance(1)
    breaker.calls("FF")
    assert breaker.snapshot().last_success_at == slow_at
    lab.clock.advance(1000)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.last_success_at, snapshot.total_failures) == (0, slow_at, 2)


@pytest.mark.parametrize("cause", ["", "RéadTimeout", "x\udcff\ny" * 500, 'quo"te\\'])
def test_whatever_the_cause_is_called_it_can_be_kept(lab: Lab, cause: str) -> None:
    breaker = lab.breaker(minimum_calls=1)
    reason = breaker.calls("F", cause=cause).snapshot.reason
    assert reason.startswith("failure rate 100 % of 1 calls")
    assert len(reason) < 300
    assert breaker.snapshot().reason == reason
