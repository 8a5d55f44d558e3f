"""A dependency that hangs opens its breaker before the first call has ended."""

from __future__ import annotations

import time

import pytest

from resilient_tasks.core.model import State
from tests.integration.conftest import Shop

SLOTS, LEAST = 4, 10  # pool slots; minimum_calls


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("task", ["ask", "ask_inside", "ask_unguarded"])
def test_calls_that_hang_open_the_breaker_while_they_run(shop: Shop, pool: str, task: str) -> None:
    shop.worker(pool=pool, concurrency=SLOTS)
    healthy = [getattr(shop, task).delay() for _ in range(20)]
    shop.wait_done(*healthy)
    shop.wait(lambda: shop.hanging.snapshot().calls == len(healthy), "all to be counted")
    missing = (1 - shop.hanging.snapshot().slow_evidence) * LEAST  # a slow machine may have made some calls slow
    shop.set_health("hanging", "hang")
    hung_at = time.time()
    results = [getattr(shop, task).delay() for _ in range(SLOTS)]
    shop.wait(lambda: shop.hanging.snapshot().state is State.OPEN, "it to open")
    snapshot = shop.hanging.snapshot()
    assert snapshot.since - hung_at > missing / SLOTS - 1, "each call adds one a second, and is not counted twice"
    assert not any(result.ready() for result in results)
    shop.set_health("hanging", "up")
    shop.wait(lambda: all(result.ready() for result in results), "those that ran to end")


def test_runs_that_their_time_limit_ends_count_for_as_long_as_they_ran(shop: Shop) -> None:
    shop.worker(concurrency=2)
    shop.set_health("hanging", "hang")
    began = time.monotonic()
    results = [shop.ask_quickly.delay() for _ in range(2)]
    shop.wait(lambda: all(result.ready() for result in results), "both to be killed")
    most = time.monotonic() - began
    least = shop.limited.policy.minimum_calls
    shop.wait(lambda: round(shop.limited.snapshot().evidence * least) == 2, "both failures to be counted")
    assert 4 <= round(shop.limited.snapshot().slow_evidence * least) <= 2 * most, "once a second each"
