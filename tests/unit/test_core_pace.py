"""How fast deferred tasks return."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.core.pace import LARGEST_BATCH, PORTIONS, Pace, next_pace
from resilient_tasks.policy import BreakerPolicy

CLOSED_SINCE = 1_789_000_000.0
CLOSED = Snapshot("payments", State.CLOSED, 1, 1, now=CLOSED_SINCE + 1, since=CLOSED_SINCE, total_failures=100)


def resumed(
    policy: BreakerPolicy,
    *,
    ticks: int,
    taken_up: float = 10**9,
    interval: float = 1.0,
    portions: int = PORTIONS,
    fails_at: Callable[[int], int] = lambda _: 0,
) -> list[int]:
    """Return what each tick resumes in its portions while workers take up ``taken_up`` tasks per tick.

    ``fails_at`` gives for each tick how many calls have failed at its end.
    """
    pace, snapshot, outstanding, counts = Pace(), CLOSED, 0.0, [0] * ticks
    for portion in range(ticks * portions):
        pace, count = next_pace(pace, snapshot, policy, outstanding=int(outstanding), interval=interval)
        counts[portion // portions] += count
        outstanding = max(0.0, outstanding + count - taken_up / portions)
        failed = fails_at(portion // portions) if portion % portions == portions - 1 else 0
        now = CLOSED.now + (portion + 1) * interval / portions
        snapshot = replace(snapshot, now=now, total_failures=snapshot.total_failures + failed)
    return counts


def test_it_starts_with_the_trial_calls_and_doubles_six_times_per_tick() -> None:
    pace, count = next_pace(Pace(), CLOSED, BreakerPolicy(trial_calls=3), outstanding=0, interval=1.0)
    assert (pace.batch, count) == (3, 3)
    counts = resumed(BreakerPolicy(trial_calls=3), ticks=2)
    assert counts[0] == pytest.approx(3 + 3 * (2**6 - 1) / 6, abs=3)
    assert sum(counts) == pytest.approx(3 + 3 * (2**12 - 1) / 6, rel=0.1), "300 tasks are resumed within two ticks"


def test_it_doubles_at_most_once_if_it_is_asked_seldom() -> None:
    assert resumed(BreakerPolicy(trial_calls=3), ticks=4, portions=1) == [3, 6, 12, 24]


def test_it_stops_growing_somewhere() -> None:
    assert resumed(BreakerPolicy(trial_calls=3), ticks=5)[-1] == LARGEST_BATCH


def test_when_calls_fail_a_quarter_of_a_batch_has_been_released_at_most() -> None:
    pace, snapshot, policy, released = Pace(), CLOSED, BreakerPolicy(trial_calls=3), 0
    while released < 100:
        snapshot = replace(snapshot, now=snapshot.now + 1 / PORTIONS)
        pace, count = next_pace(pace, snapshot, policy, outstanding=0, interval=1.0)
        released += count
    assert count <= 25, "a quarter of what has gone before"
    failed = replace(snapshot, now=snapshot.now + 1 / PORTIONS, total_failures=snapshot.total_failures + 3)
    after, count = next_pace(pace, failed, policy, outstanding=0, interval=1.0)
    assert after.too_large == 2 * after.batch
    assert after.batch < released
    assert count <= 3


@pytest.mark.parametrize("failures", [1, 2, 5])
def test_after_failures_it_returns_quickly_and_goes_on_slowly(failures: int) -> None:
    counts = resumed(BreakerPolicy(trial_calls=20), ticks=30, fails_at=lambda tick: 100 * (tick < failures))
    after = counts[failures + 1 :]
    assert counts[0] > after[0] > 0
    assert all(later >= sooner - 1 for sooner, later in itertools.pairwise(after)), "it grows from there"
    assert max(later - sooner for sooner, later in itertools.pairwise(after)) < 2 * math.sqrt(max(after)) + 2


def test_a_failure_in_a_hundred_calls_is_the_daily_noise() -> None:
    noisy = resumed(BreakerPolicy(trial_calls=100), ticks=3, fails_at=lambda _: 1)
    assert noisy == resumed(BreakerPolicy(trial_calls=100), ticks=3)


def test_it_never_stops_however_many_calls_fail() -> None:
    counts = resumed(BreakerPolicy(trial_calls=4), ticks=12, fails_at=lambda _: 100)
    assert counts[-5:] == [1] * 5


def test_it_starts_slowly_again_after_another_outage() -> None:
    fast = Pace(batch=5000, failures_seen=100, decided_at=CLOSED_SINCE + 500)
    healed_again = replace(CLOSED, since=CLOSED_SINCE + 900, now=CLOSED_SINCE + 901)
    assert next_pace(fast, healed_again, BreakerPolicy(trial_calls=3), outstanding=0, interval=1.0)[1] == 3


def test_it_does_not_pile_up_more_than_slow_workers_take_up_in_a_tick() -> None:
    counts = resumed(BreakerPolicy(trial_calls=3), ticks=200, taken_up=10)
    assert sum(counts) == pytest.approx(2000, abs=30), "as fast as they can take up"
    assert max(counts) < 50


def test_it_waits_while_no_worker_takes_up_anything() -> None:
    assert resumed(BreakerPolicy(trial_calls=3), ticks=5, taken_up=0) == [3, 0, 0, 0, 0]


@pytest.mark.parametrize(("rate", "interval"), [(0.5, 1.0), (2.5, 1.0), (1.0, 0.25), (4.0, 1.0), (100.0, 1.0)])
@pytest.mark.parametrize("portions", [1, PORTIONS])
def test_the_rate_is_a_ceiling_and_no_fraction_is_lost(rate: float, interval: float, portions: int) -> None:
    counts = resumed(BreakerPolicy(trial_calls=3, resume_rate=rate), ticks=20, interval=interval, portions=portions)
    assert sum(counts) <= rate * interval * 21 + 1
    assert sum(counts[10:]) == pytest.approx(rate * interval * 10, abs=1)


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
    paces=st.builds(
        Pace,
        st.integers(0, 10**6),
        st.integers(0, 200),
        st.integers(0, 99),
        st.floats(0, 2e9),
        st.integers(0, 10**6),
        st.floats(0, 2e9),
    ),
    rate=st.none() | st.floats(0.001, 1e6),
    outstanding=st.integers(0, 10**6),
)
def test_every_pace_leads_to_a_sane_one(paces: Pace, rate: float | None, outstanding: int) -> None:
    kept, count = next_pace(paces, CLOSED, BreakerPolicy(resume_rate=rate), outstanding=outstanding, interval=1.0)
    assert 1 <= kept.batch <= max(LARGEST_BATCH, paces.batch)
    assert 0 <= count <= kept.batch
    assert count + outstanding <= kept.batch or count == 0
    assert kept.released_at == CLOSED.now


def test_late_ticks_do_not_make_up_for_a_long_pause() -> None:
    policy = BreakerPolicy(trial_calls=3, resume_rate=10.0)
    pace, _ = next_pace(Pace(), CLOSED, policy, outstanding=0, interval=1.0)
    later = replace(CLOSED, now=CLOSED.now + 3600)
    _, count = next_pace(replace(pace, batch=LARGEST_BATCH), later, policy, outstanding=0, interval=1.0)
    assert count <= 10
