"""A background queue delays no caller, and what fails is logged."""

from __future__ import annotations

import threading
import time

import pytest

from resilient_tasks.store.background import BackgroundQueue, finish_all
from tests.support.doubles import wait_until


def test_actions_go_out_in_order_and_a_bad_one_stops_none(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[int] = []
    done = threading.Event()
    waiting = BackgroundQueue("events")
    waiting.submit(lambda: sent.append(1))
    waiting.submit(lambda: 1 / 0)
    waiting.submit(lambda: sent.append(2))
    waiting.submit(done.set)
    assert done.wait(60)
    assert sent == [1, 2]
    assert "ZeroDivisionError" in caplog.text


class Hold:
    """An action that takes until it is released."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.release.wait(60)


def test_submitting_never_blocks_and_what_is_dropped_is_logged_once_with_its_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting, hold = BackgroundQueue("events", most_waiting=2), Hold()
    waiting.submit(hold)
    assert hold.begun.wait(60)
    for _ in range(5):
        waiting.submit(lambda: None)
    assert [record.getMessage() for record in caplog.records] == ["events are dropped: 2 others wait to be sent"]
    hold.release.set()
    wait_until(lambda: "3 events were dropped" in caplog.text)


def test_what_the_end_of_a_process_cannot_wait_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    waiting, hold = BackgroundQueue("events"), Hold()
    for action in (hold, lambda: None):
        waiting.submit(action)
    assert hold.begun.wait(60)
    waiting.finish(give_up_at=time.monotonic())
    assert [record.getMessage() for record in caplog.records] == ["events not sent at the end of the process: 2"]
    hold.release.set()


def test_the_end_of_a_process_waits_for_the_last_actions() -> None:
    sent: list[int] = []
    waiting, hold = BackgroundQueue("events"), Hold()
    waiting.submit(hold)
    waiting.submit(lambda: sent.append(1))
    threading.Timer(0.05, hold.release.set).start()
    finish_all()
    assert sent == [1]
