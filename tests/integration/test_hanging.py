"""A dependency that hangs opens its breaker before the first call has ended."""

from __future__ import annotations

import pytest

from resilient_tasks.core.model import State
from tests.integration.conftest import Shop


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_calls_that_hang_open_the_breaker_while_they_run(shop: Shop, pool: str) -> None:
    shop.worker(pool=pool, concurrency=4)
    shop.set_health("sluggish", "hang")
    results = [shop.dawdle.delay() for _ in range(6)]
    shop.wait(lambda: shop.sluggish.snapshot().state is State.OPEN, "it to open")
    snapshot = shop.sluggish.snapshot()
    print(f"OPEN {snapshot.since - float(shop.runs('dawdle')[0]):.2f} s after the first call began to hang")
    assert (snapshot.calls, snapshot.slow, snapshot.failures) == (4, 4, 0)
    assert not any(result.ready() for result in results)
    shop.set_health("sluggish", "up")
    shop.wait(lambda: shop.waiting("sluggish") == 2, "the others to be deferred")
    shop.wait(lambda: sum(result.ready() for result in results) == 4, "those that ran to end")
