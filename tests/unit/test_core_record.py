"""A policy in the machine's units, and what is told to others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks.core.model import State
from resilient_tasks.core.record import Record, Rules, brief, to_ms, to_seconds
from resilient_tasks.policy import BreakerPolicy


@pytest.mark.parametrize(
    ("seconds", "ms"),
    [(0, 0), (1.5, 1500), (0.0004, 0), (0.0006, 1), (-3, 0), (float("nan"), 0), (float("inf"), 10**13)],
)
def test_seconds_become_whole_milliseconds(seconds: float, ms: int) -> None:
    assert to_ms(seconds) == ms


def test_no_time_stays_none() -> None:
    assert to_seconds(None) is None
    assert to_seconds(1500) == 1.5


@given(st.text())
def test_any_text_becomes_one_short_line(text: str) -> None:
    line = brief(text)
    assert len(line) <= 200
    assert len(line.splitlines()) <= 1
    assert brief(line) == line.strip()
    line.encode()


def test_durations_are_never_zero() -> None:
    rules = Rules.of(BreakerPolicy(open_duration=1e-9, max_open_duration=1e-9), 0)
    assert (rules.open_time, rules.max_open_time) == (1, 1)


def test_what_a_policy_leaves_out_is_off() -> None:
    rules = Rules.of(BreakerPolicy(), 3)
    assert (rules.consecutive, rules.slow_trial_fails, rules.revision, rules.needed) == (0, False, 3, 3)
    assert Rules.of(BreakerPolicy(slow_call_duration=1.0), 0).slow_trial_fails


@pytest.mark.parametrize(
    ("openings", "retry_after", "jitter", "expected"),
    [
        (1, None, 0.0, 5_000),
        (2, None, 0.0, 10_000),
        (3, None, 0.0, 20_000),
        (4, None, 0.0, 30_000),
        (10**9, None, 0.0, 30_000),
        (1, 17_000, 0.0, 17_000),
        (1, 10**12, 0.0, 30_000),
        (3, 17_000, 0.0, 20_000),
        (1, None, 0.5, 5_250),
        (4, None, 1.0, 33_000),
    ],
)
def test_open_times(openings: int, retry_after: int | None, jitter: float, expected: int) -> None:
    rules = Rules.of(BreakerPolicy(open_duration=5, max_open_duration=30, open_jitter=0.1), 0)
    assert rules.open_for(openings, retry_after, jitter) == expected


@given(openings=st.integers(1, 10**6), growth=st.floats(1, 100), jitter=st.floats(0, 1, exclude_max=True))
def test_open_times_are_bounded_whatever_the_growth(openings: int, growth: float, jitter: float) -> None:
    policy = BreakerPolicy(open_duration=5, max_open_duration=30, open_multiplier=growth, open_jitter=0.5)
    assert 5_000 <= Rules.of(policy, 0).open_for(openings, None, jitter) <= 45_000


def test_the_newer_declaration_wins_and_of_equal_ones_the_last() -> None:
    old, new, again = (Rules.of(BreakerPolicy(minimum_calls=n), revision) for n, revision in ((1, 1), (2, 2), (3, 2)))
    assert old.or_newer(new) == new
    assert new.or_newer(old) == new
    assert new.or_newer(again) == again


def test_a_created_breaker_begins_with_the_time() -> None:
    record = Record.created("payments", Rules.of(BreakerPolicy(), 0), now=1_789_000_000_123)
    snapshot = record.snapshot(1_789_000_001_000)
    assert (snapshot.state, snapshot.epoch, snapshot.version) == (State.CLOSED, 1_789_000_000_123, 1_789_000_000_123)
    assert (snapshot.since, snapshot.now) == (1_789_000_000.123, 1_789_000_001.0)
