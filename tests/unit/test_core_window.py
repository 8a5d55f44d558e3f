"""The sliding window, compared with a list of every call."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks.core.model import Calls, Outcome
from resilient_tasks.core.window import MOST_VOTERS, Totals, Window

LENGTH = 1000
calls = st.lists(
    st.tuples(st.integers(0, 700), st.sampled_from([Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW]), st.integers(1, 5))
)


def exactly(made: list[tuple[int, Outcome, int]], after: int) -> Totals:
    totals = Totals()
    for at, outcome, count in made:
        totals = totals.plus(Calls(outcome, count)) if at > after else totals
    return totals


@given(start=st.integers(10**12, 10**12 + 5000), calls=calls, pause=st.integers(0, 2500))
def test_a_call_counts_for_the_window_and_at_most_a_tenth_longer(
    start: int, calls: list[tuple[int, Outcome, int]], pause: int
) -> None:
    window, now, made = Window(), start, []
    for gap, outcome, count in calls:
        now += gap
        window.add(Calls(outcome, count), now=now, length=LENGTH)
        made.append((now, outcome, count))
    now += pause
    counted = window.totals(now=now, length=LENGTH)
    at_least, at_most = exactly(made, now - LENGTH), exactly(made, now - LENGTH - LENGTH // 10)
    for low, value, high in zip(at_least, counted, at_most, strict=True):
        assert low <= value <= high


def test_nothing_is_left_after_clear() -> None:
    window = Window()
    window.add(Calls(Outcome.SUCCESS, 3), now=5, length=LENGTH)
    window.clear()
    assert window.totals(now=5, length=LENGTH) == Totals()


def test_its_size_is_bounded() -> None:
    window = Window()
    for now in range(0, 100_000, 7):
        window.add(Calls(Outcome.SUCCESS), now=now, length=LENGTH)
    assert len(window._slots) == 11


def test_a_clock_set_back_a_little_loses_nothing_for_good() -> None:
    window = Window()
    window.add(Calls(Outcome.FAILURE), now=10_050, length=LENGTH)
    window.add(Calls(Outcome.FAILURE), now=9_990, length=LENGTH)
    assert window.totals(now=9_990, length=LENGTH).failures == 2
    assert window.totals(now=10_060, length=LENGTH).failures == 2


def test_a_bucket_remembers_only_so_many_voters() -> None:
    window = Window()
    for number in range(MOST_VOTERS + 1):
        window.remember(Calls(Outcome.FAILURE, 1, f"{number:08x}"), now=5, length=LENGTH)
    known = [window.vote(f"{number:08x}", now=5, length=LENGTH) is not None for number in range(MOST_VOTERS + 1)]
    assert known == [True] * MOST_VOTERS + [False]
