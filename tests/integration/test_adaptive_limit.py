"""An adaptive limit finds out what a real service can bear."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import pytest

from resilient_tasks import Breaker, BreakerOpenError, Resilience
from resilient_tasks.core.model import State
from tests.integration.conftest import TIMEOUT, Shop
from workers.stack import start_service

CAPACITY, CALLERS, CALLS = 8, 16, 400


class Traffic:
    """Callers that never rest: those who are refused soon ask again."""

    def __init__(self, breaker: Breaker, call: Callable[[], object]) -> None:
        self._breaker, self._call = breaker, call
        self.limits: list[int] = []  # after each call that was made
        self.failures = 0

    def go_on(self) -> None:
        while len(self.limits) < CALLS:
            try:
                self._breaker.call(self._call)
            except BreakerOpenError:
                time.sleep(0.01)
                continue
            except httpx.HTTPStatusError:
                self.failures += 1
            self.limits.append(self._breaker._dependency.cached_state.snapshot.concurrency_limit or 0)


def test_the_limit_converges_to_what_a_service_can_bear(shop: Shop, tmp_path: Path) -> None:
    service = start_service(tmp_path)
    service.make("payments", "up", latency=0.1, capacity=CAPACITY)
    resilience = Resilience(store_url=shop.server.url(0), store_timeout=20)
    metered = resilience.breaker("metered", concurrency="adaptive", max_concurrency=64)
    try:
        with httpx.Client(timeout=TIMEOUT) as client, ThreadPoolExecutor(CALLERS) as callers:
            url = f"{service.environment['PAYMENTS_URL']}/charges/1"
            traffic = Traffic(metered, lambda: client.post(url).raise_for_status())
            for done in [callers.submit(traffic.go_on) for _ in range(CALLERS)]:
                done.result()
        later = traffic.limits[CALLS // 3 :]
        assert median(later) == pytest.approx(CAPACITY, abs=2)
        assert traffic.failures < 0.15 * len(traffic.limits)
        assert metered.state is State.CLOSED
    finally:
        resilience.fleet.close()
        service.program.stop()
