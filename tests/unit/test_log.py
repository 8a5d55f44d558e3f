"""Log lines by the thousand: some pass, the others are counted."""

from __future__ import annotations

from resilient_tasks.monitor.log import Throttle, about
from tests.support.doubles import ManualClock


def test_so_many_lines_of_a_kind_pass_in_an_interval_and_the_others_are_counted() -> None:
    clock = ManualClock()
    throttle = Throttle(2, 10.0, clock)
    assert [throttle.admits("a") for _ in range(5)] == [True, True, False, False, False]
    assert throttle.admits("b")
    assert throttle.take_suppressed() == {}
    clock.advance(10.0)
    assert throttle.take_suppressed() == {"a": 3}
    assert throttle.admits("a")


def test_what_is_counted_can_be_asked_for_before_the_interval_is_over() -> None:
    throttle = Throttle(1, 10.0, ManualClock())
    assert [throttle.admits("a"), throttle.admits("a")] == [True, False]
    assert throttle.take_suppressed(early=True) == {"a": 1}
    assert throttle.take_suppressed(early=True) == {}


def test_a_line_about_a_task_says_which() -> None:
    assert about("17", "shop.charge", "payments") == {"task_id": "17", "task": "shop.charge", "breaker": "payments"}
    assert about("17", "shop.charge") == {"task_id": "17", "task": "shop.charge"}
