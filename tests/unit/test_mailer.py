"""The mailer waits for nobody and tells of nobody's troubles but in the log."""

from __future__ import annotations

import threading
import time

import pytest

from resilient_tasks.monitor.mailer import Mailer, finish_all
from tests.support.doubles import wait_until


def test_letters_go_out_in_order_and_a_bad_one_stops_none(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[int] = []
    done = threading.Event()
    box = Mailer("events")
    box.post(lambda: sent.append(1))
    box.post(lambda: 1 / 0)
    box.post(lambda: sent.append(2))
    box.post(done.set)
    assert done.wait(10)
    assert sent == [1, 2]
    assert "ZeroDivisionError" in caplog.text


class Hold:
    """An action that takes until it is released."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.release.wait(10)


def test_posting_never_blocks_and_what_is_dropped_is_told_once_with_its_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    box, hold = Mailer("events", most_waiting=2), Hold()
    box.post(hold)
    assert hold.begun.wait(10)
    for _ in range(5):
        box.post(lambda: None)
    assert [record.getMessage() for record in caplog.records] == ["events are dropped: 2 others wait to be sent"]
    hold.release.set()
    wait_until(lambda: "3 events were dropped" in caplog.text)


def test_what_the_end_of_a_process_cannot_wait_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    box, hold = Mailer("events"), Hold()
    for letter in (hold, lambda: None):
        box.post(letter)
    assert hold.begun.wait(10)
    box.finish(give_up_at=time.monotonic())
    assert [record.getMessage() for record in caplog.records] == ["events not sent at the end of the process: 2"]
    hold.release.set()


def test_the_end_of_a_process_waits_for_the_last_letters() -> None:
    sent: list[int] = []
    box, hold = Mailer("events"), Hold()
    box.post(hold)
    box.post(lambda: sent.append(1))
    threading.Timer(0.05, hold.release.set).start()
    finish_all()
    assert sent == [1]
