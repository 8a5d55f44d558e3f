"""How fast deferred tasks return."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.core.pace import LARGEST_BATCH, Pace, next_pace
from resilient_tasks.policy import BreakerPolicy

CLOSED_SINCE = 1_789_000_000.0
CLOSED = Snapshot("payments", State.CLOSED, 1, 1, now=CLOSED_SINCE + 1, since=CLOSED_SINCE, total_failures=100)


def resumed(
    policy: BreakerPolicy,
    *,
    ticks: int,
    taken_up: float = 10**9,
    interval: float = 1.0,
    fails_at: frozenset[int] = frozenset(),
) -> list[int]:
    """Return what each tick resumes while workers take up ``taken_up`` tasks per tick."""
    pace, snapshot, outstanding, counts = Pace(), CLOSED, 0.0, []
    for tick in range(ticks):
        pace, count = next_pace(pace, snapshot, policy, outstanding=int(outstanding), interval=interval)
        counts.append(count)
        outstanding = max(0.0, outstanding + count - taken_up)
        failures = snapshot.total_failures + (tick in fails_at)
        snapshot = replace(snapshot, now=snapshot.now + interval, total_failures=failures)
    return counts


def test_it_starts_with_the_trial_calls_and_grows_with_the_square_of_time() -> None:
    counts = resumed(BreakerPolicy(trial_calls=3), ticks=20)
    assert counts[:8] == [3, 7, 13, 21, 31, 43, 57, 73]
    assert counts[-1] == pytest.approx(20**2, rel=0.1)


def test_it_stops_growing_somewhere() -> None:
    assert resumed(BreakerPolicy(trial_calls=3), ticks=120)[-1] == LARGEST_BATCH


def test_where_calls_have_failed_it_returns_quickly_and_goes_on_slowly() -> None:
    counts = resumed(BreakerPolicy(trial_calls=20), ticks=11, fails_at=frozenset({3}))
    assert counts == [20, 29, 40, 53, 26, 39, 48, 49, 50, 51, 52]


def test_once_twice_as_much_goes_well_the_failure_is_forgotten() -> None:
    counts = resumed(BreakerPolicy(trial_calls=4), ticks=9, fails_at=frozenset({0}))
    assert counts == [4, 2, 4, 5, 6, 7, 8, 14, 22]


def test_a_failure_in_a_hundred_calls_is_the_daily_noise() -> None:
    assert resumed(BreakerPolicy(trial_calls=100), ticks=3, fails_at=frozenset({0, 1})) == [100, 120, 142]


@pytest.mark.parametrize(("fails_at", "counts"), [({2}, [4, 8, 14, 7, 13, 14]), ({0, 1, 2, 3}, [4, 2, 1, 1, 1, 2])])
def test_it_halves_when_calls_fail_but_never_stops(fails_at: set[int], counts: list[int]) -> None:
    assert resumed(BreakerPolicy(trial_calls=4), ticks=6, fails_at=frozenset(fails_at)) == counts


def test_it_starts_slowly_again_after_another_outage() -> None:
    fast = Pace(batch=5000, failures_seen=100, decided_at=CLOSED_SINCE + 500)
    healed_again = replace(CLOSED, since=CLOSED_SINCE + 900, now=CLOSED_SINCE + 901)
    assert next_pace(fast, healed_again, BreakerPolicy(trial_calls=3), outstanding=0, interval=1.0)[1] == 3


def test_it_does_not_pile_up_more_than_a_batch_for_slow_workers() -> None:
    counts = resumed(BreakerPolicy(trial_calls=3), ticks=200, taken_up=10)
    assert sum(counts) == pytest.approx(2000, abs=30), "as fast as they can take up"
    assert max(counts) < 50


def test_it_waits_while_nobody_takes_up_anything() -> None:
    assert resumed(BreakerPolicy(trial_calls=3), ticks=5, taken_up=0) == [3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rate", "interval", "counts"),
    [
        (0.5, 1.0, [0, 1, 0, 1, 0, 1, 0, 1]),
        (2.5, 1.0, [2, 3, 2, 3, 2, 3, 2, 3]),
        (1.0, 0.25, [0, 0, 0, 1, 0, 0, 0, 1]),
        (4.0, 1.0, [3, 4, 4, 4, 4, 4, 4, 4]),
    ],
)
def test_the_rate_is_a_ceiling_and_no_fraction_is_lost(rate: float, interval: float, counts: list[int]) -> None:
    told = resumed(BreakerPolicy(trial_calls=3, resume_rate=rate), ticks=8, interval=interval)
    assert sorted(told) == sorted(counts)
    assert max(abs(sum(told[:n]) - sum(counts[:n])) for n in range(8)) <= 1


@given(
    rate=st.floats(0.01, 1000),
    interval=st.floats(0.05, 10),
    late=st.lists(st.floats(0.0, 0.9), min_size=20, max_size=60),
)
def test_the_rate_holds_over_any_series_of_late_ticks(rate: float, interval: float, late: list[float]) -> None:
    policy, pace, snapshot, total = BreakerPolicy(trial_calls=3, resume_rate=rate), Pace(), CLOSED, 0
    for delay in late:
        pace, count = next_pace(pace, snapshot, policy, outstanding=0, interval=interval)
        total += count
        snapshot = replace(snapshot, now=snapshot.now + interval * (1 + delay))
    assert total <= rate * (snapshot.now - CLOSED.now + interval) + 1


@given(
    paces=st.builds(Pace, st.integers(0, 10**6), st.integers(0, 200), st.integers(0, 99), st.floats(0, 2e9)),
    rate=st.none() | st.floats(0.001, 1e6),
    outstanding=st.integers(0, 10**6),
)
def test_every_pace_leads_to_a_sane_one(paces: Pace, rate: float | None, outstanding: int) -> None:
    kept, count = next_pace(paces, CLOSED, BreakerPolicy(resume_rate=rate), outstanding=outstanding, interval=1.0)
    assert 1 <= kept.batch <= max(LARGEST_BATCH, paces.batch)
    assert 0 <= count <= kept.batch
    assert count + outstanding <= kept.batch or count == 0
    assert (kept.failures_seen, kept.decided_at) == (CLOSED.total_failures, CLOSED.now)


def test_late_ticks_do_not_make_up_for_a_long_pause() -> None:
    policy = BreakerPolicy(trial_calls=3, resume_rate=10.0)
    pace, _ = next_pace(Pace(), CLOSED, policy, outstanding=0, interval=1.0)
    later = replace(CLOSED, now=CLOSED.now + 3600)
    _, count = next_pace(replace(pace, batch=LARGEST_BATCH), later, policy, outstanding=0, interval=1.0)
    assert count <= 10
