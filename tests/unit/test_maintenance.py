"""When a worker runs a tick: one that was sent is not lost because another worker was filling slots just then."""

from __future__ import annotations

import threading
from unittest import mock

import pytest

from resilient_tasks.worker.maintenance import RECONCILE_INTERVAL, Maintenance


class Ticks:
    """A tick whose lease another worker holds for a while, and the age of the last one that was completed."""

    not_due: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.lease_is_free = True
        self.age = 1.0
        self.tried = 0

    def run(self, *, observed_for: float) -> bool:
        assert observed_for >= 0
        self.tried += 1
        return self.lease_is_free

    def last_tick_age(self, _scope: str) -> float:
        return self.age


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def maintenance(ticks: Ticks) -> Maintenance:
    runtime = mock.MagicMock(breakers={})
    runtime.present.return_value = []
    runtime.settings.tick_interval = 1.0
    runtime.fleet.ledger.last_tick_age = ticks.last_tick_age
    maintenance = Maintenance(runtime, mock.Mock(), mock.Mock(), mock.Mock(), mock.Mock())
    maintenance._tick = ticks  # type: ignore[assignment]
    return maintenance


def test_a_tick_that_was_sent_runs_once(maintenance: Maintenance, ticks: Ticks) -> None:
    maintenance.want_tick()
    for _ in range(3):
        maintenance._run(threading.Event())
    assert ticks.tried == 1


def test_a_tick_during_a_refill_is_made_up_for(maintenance: Maintenance, ticks: Ticks) -> None:
    maintenance.want_tick()
    ticks.lease_is_free = False
    maintenance._run(threading.Event())
    ticks.lease_is_free = True
    maintenance._run(threading.Event())
    maintenance._run(threading.Event())
    assert ticks.tried == 2


def test_a_tick_during_another_is_not_run_again(maintenance: Maintenance, ticks: Ticks) -> None:
    maintenance.want_tick()
    ticks.lease_is_free = False
    maintenance._run(threading.Event())
    ticks.age = 0.1
    maintenance._run(threading.Event())
    assert ticks.tried == 1


def test_a_worker_looks_for_itself_when_no_other_ticks(maintenance: Maintenance, ticks: Ticks) -> None:
    ticks.age = RECONCILE_INTERVAL
    maintenance._run(threading.Event())
    maintenance._run(threading.Event())
    assert ticks.tried == 1
