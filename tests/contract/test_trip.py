"""When a breaker opens."""

from __future__ import annotations

import random

import pytest

from resilient_tasks.core.model import State
from tests.contract.lab import ONE_OF_EACH, Lab


@pytest.mark.parametrize(
    ("threshold", "outcomes", "then"),
    [
        (0.5, "FFFF", "F"),
        (0.5, "FFFSFF", "F"),
        (0.25, "FFFFSSSF", "F"),
        (1.0, "FFFFSFFFF", "F"),
        (0.9, "FFFFSFFFF", "F"),
        (0.5, "S" * 1000 + "FFFF", "F"),
        (0.5, "FFFFI", "F"),
        (0.4, "FFFSSSFFF", "F"),
    ],
)
def test_it_opens_when_the_evidence_reaches_minimum_calls(lab: Lab, threshold: float, outcomes: str, then: str) -> None:
    breaker = lab.breaker(failure_rate_threshold=threshold)
    assert breaker.batch(*[(letter, 1) for letter in outcomes]).snapshot.state is State.CLOSED
    assert breaker.transitions == []

    answer = breaker.calls(then, cause="ReadTimeout")

    assert answer.snapshot.state is State.OPEN
    assert [(made.previous, made.state) for made in breaker.transitions] == [(State.CLOSED, State.OPEN)]
    assert not breaker.ask().admitted


def test_what_was_good_before_does_not_count_against_an_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    assert breaker.batch(("S", 100_000)).snapshot.state is State.CLOSED
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED
    answer = breaker.calls("F", cause="HTTP 503")
    assert answer.snapshot.state is State.OPEN
    assert answer.snapshot.reason == "evidence 5 of 5: of the last 5 calls 5 failed, last: HTTP 503"


def test_a_snapshot_shows_the_evidence_and_keeps_it_as_at_the_trip(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0, slow_call_rate_threshold=0.75)
    assert breaker.calls("FFS").snapshot.evidence == pytest.approx(0.2)
    assert breaker.snapshot().slow_evidence == 0.0, "a quick success takes three away"
    assert breaker.calls("LL").snapshot.evidence == 0.0
    assert breaker.snapshot().slow_evidence == pytest.approx(0.4)
    opened = breaker.calls("FFFFF").snapshot
    assert (opened.state, opened.evidence, opened.slow_evidence) == (State.OPEN, pytest.approx(0.6), 1.0)
    lab.clock.advance(100)
    assert (breaker.snapshot().evidence, breaker.snapshot().slow_evidence) == (pytest.approx(0.6), 1.0)


@pytest.mark.parametrize(("lab", "seed"), [*(("local", seed) for seed in range(5)), ("server", 0)], indirect=["lab"])
def test_noise_below_the_threshold_opens_nothing_and_an_outage_is_noticed(lab: Lab, seed: int) -> None:
    stream, breaker = random.Random(seed), lab.breaker(minimum_calls=10)
    for _ in range(200):
        noise = [("F" if stream.random() < 0.2 else "S", 1) for _ in range(500)]
        assert breaker.batch(*noise).snapshot.state is State.CLOSED
    breaker.batch(("S", 5000))
    calls = 0
    while breaker.state is State.CLOSED:
        breaker.calls("F" if stream.random() < 0.8 else "S")
        calls += 1
    assert calls <= 60


def test_slow_calls_open_it_although_nothing_failed(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0)
    snapshot = breaker.calls("LSLLLLL").snapshot
    assert snapshot.state is State.OPEN
    assert (snapshot.slow, snapshot.failures, snapshot.evidence) == (6, 0, 0.0)
    assert snapshot.reason == "slow evidence 5 of 5: slow, hanging or failed 5 times, in time 0 times"


def test_slow_and_failed_calls_in_turn_open_it(lab: Lab) -> None:
    breaker = lab.breaker(slow_call_duration=1.0)
    assert breaker.calls("FLFL").snapshot.state is State.CLOSED
    assert breaker.calls("F").snapshot.state is State.OPEN


def test_without_a_duration_failures_are_not_slow(lab: Lab) -> None:
    breaker = lab.breaker(failure_rate_threshold=0.9, slow_call_rate_threshold=0.1)
    assert breaker.calls("FFS" * 20).snapshot.state is State.CLOSED
    assert breaker.snapshot().slow_evidence == 0.0


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
def test_evidence_to_which_nothing_was_added_for_the_window_is_forgotten(lab: Lab, offset: float) -> None:
    lab.clock.advance(offset)
    breaker = lab.breaker()
    breaker.calls("FFFF")
    lab.clock.advance(19.999)
    breaker.calls("I")
    assert breaker.snapshot().evidence == pytest.approx(0.8)
    lab.clock.advance(0.001)
    assert breaker.snapshot().evidence == 0.0
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED
    lab.clock.advance(19.999)
    assert breaker.calls("F").snapshot.state is State.OPEN, "what adds keeps all of it"


def test_a_success_does_not_keep_evidence(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.calls("FFFF")
    lab.clock.advance(15)
    breaker.calls("S")
    lab.clock.advance(15)
    assert breaker.calls("FF").snapshot.evidence == pytest.approx(0.4)


@ONE_OF_EACH
@pytest.mark.parametrize("offset", [0.0, 0.4, 1.3, 1.999])
def test_sums_for_people_cover_the_window_and_a_quarter_more_at_most(lab: Lab, offset: float) -> None:
    lab.clock.advance(offset)
    breaker = lab.breaker(minimum_calls=1000)
    for _ in range(100):
        breaker.calls("S")
        lab.clock.advance(1)
    assert 19 <= breaker.snapshot().calls <= 26
    lab.clock.advance(26)
    assert breaker.snapshot().calls == 0


def test_a_score_that_peaks_inside_a_batch_opens_the_breaker(lab: Lab) -> None:
    batched, single = lab.breaker("batched"), lab.breaker("single")
    single.calls("SSSSFFFFFSSSSS")
    answer = batched.batch(("S", 4), ("F", 5), ("S", 50))
    assert single.state is State.OPEN
    assert (answer.snapshot.state, answer.snapshot.calls, answer.snapshot.failures) == (State.OPEN, 59, 5)
    assert batched.snapshot().total_failures == single.snapshot().total_failures == 5


def test_a_huge_run_is_counted_at_once(lab: Lab) -> None:
    snapshot = lab.breaker(minimum_calls=5).batch(("S", 400_000), ("F", 10_000_000)).snapshot
    assert (snapshot.state, snapshot.calls, snapshot.failures) == (State.OPEN, 10_400_000, 10_000_000)


def test_a_policy_that_asks_for_more_is_not_met_by_what_was_counted_before(lab: Lab) -> None:
    lab.breaker(minimum_calls=20, revision=1).calls("FFFFFSSSSSSSSS")
    assert lab.breaker(minimum_calls=5, revision=2).calls("FFFF").snapshot.state is State.CLOSED


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
    assert reason.startswith("evidence 1 of 1: of the last 1 calls 1 failed")
    assert len(reason) < 300
    assert breaker.snapshot().reason == reason
