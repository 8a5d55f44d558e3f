"""The mailer waits for nobody and tells of nobody's troubles but in the log."""

from __future__ import annotations

import threading

import pytest

from resilient_tasks.monitor import mailer
from resilient_tasks.monitor.mailer import Mailer


def test_letters_go_out_in_order_and_a_bad_one_stops_none(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[int] = []
    done = threading.Event()
    box = Mailer()
    box.post(lambda: sent.append(1))
    box.post(lambda: 1 / 0)
    box.post(lambda: sent.append(2))
    box.post(done.set)
    assert done.wait(10)
    assert sent == [1, 2]
    assert "ZeroDivisionError" in caplog.text


def test_posting_never_blocks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mailer, "MOST_WAITING", 2)
    release = threading.Event()
    box = Mailer()
    for _ in range(5):
        box.post(release.wait)
    assert "dropped" in caplog.text
    release.set()
