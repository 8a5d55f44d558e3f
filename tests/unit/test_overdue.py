"""Calls that pass their time are reported while they run, again each time; those that end in time never are."""

from __future__ import annotations

import os
import threading

import pytest

from resilient_tasks.store.background import Overdue
from tests.support.doubles import ManualClock, wait_until

TIMEOUT = 60


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def overdue(clock: ManualClock) -> Overdue:
    return Overdue(clock)


def look(overdue: Overdue) -> None:
    """Have the thread look at the clock."""
    with overdue._condition:
        overdue._condition.notify_all()


def test_a_call_is_reported_each_time_that_it_passes_its_time(overdue: Overdue, clock: ManualClock) -> None:
    reported: list[str] = []
    hangs = overdue.begin(5, lambda: reported.append("hangs"))
    quick = overdue.begin(5, lambda: reported.append("quick"))
    longer = overdue.begin(50, lambda: reported.append("longer"))
    assert not overdue.end(quick)
    clock.advance(5)
    look(overdue)
    wait_until(lambda: reported == ["hangs"])
    clock.advance(5)
    look(overdue)
    wait_until(lambda: reported == ["hangs"] * 2)
    assert overdue.end(hangs)
    assert not overdue.end(longer)
    clock.advance(100)
    look(overdue)
    wait_until(lambda: overdue._wakes_at == float("inf"))
    assert reported == ["hangs"] * 2


def test_a_process_that_was_frozen_makes_up_for_nothing(overdue: Overdue, clock: ManualClock) -> None:
    reported: list[str] = []
    overdue.begin(1, lambda: reported.append("hangs"))
    clock.advance(100)
    look(overdue)
    wait_until(lambda: reported)
    clock.advance(0.9)
    look(overdue)
    clock.advance(0.2)
    look(overdue)
    wait_until(lambda: len(reported) == 2)


def test_no_call_is_overslept_however_many_threads_begin_some() -> None:
    overdue, reported = Overdue(), threading.Semaphore(0)

    def begin() -> None:
        for number in range(300):
            watch = overdue.begin(0.01, reported.release)
            if number % 3:
                overdue.end(watch)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(reported.acquire(timeout=TIMEOUT) for _ in range(8 * 100))
    wait_until(lambda: all(watch.reports for watch in list(overdue._watches)))


def test_a_call_that_may_be_overdue_first_is_not_overslept(overdue: Overdue, clock: ManualClock) -> None:
    reported = threading.Event()
    overdue.begin(1000, reported.clear)
    overdue.begin(1, reported.set)
    clock.advance(1)
    look(overdue)
    assert reported.wait(TIMEOUT)


def test_a_report_that_fails_hinders_no_other(
    overdue: Overdue, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    reported = threading.Event()
    overdue.begin(1, lambda: 1 / 0)
    clock.advance(1)
    look(overdue)
    wait_until(lambda: "could not be reported" in caplog.text)
    overdue.begin(1, reported.set)
    clock.advance(1)
    look(overdue)
    assert reported.wait(TIMEOUT)


def test_a_forked_process_watches_its_own_calls_only(overdue: Overdue) -> None:
    overdue.begin(1000, lambda: None)
    if (pid := os.fork()) == 0:
        os._exit(len(overdue._watches))
    assert os.waitpid(pid, 0)[1] == 0
