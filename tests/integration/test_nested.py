"""Guarded code inside tasks: one permit and one slot per run, whatever its threads call; wrapped refusals defer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import TIMEOUT, Shop

pools = pytest.mark.parametrize("pool", ["prefork", "threads"])


@pytest.fixture
def shop(_shop: Shop, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(_shop.server, tmp_path, module="tests.integration.nested")
    shop.clear()
    yield shop
    shop.stop()


def heals(shop: Shop, task: str, pool: str) -> None:
    """Open ``payments`` and let tasks come: all finish, and the breaker closes."""
    shop.payments.trip(reason="test")
    shop.worker(concurrency=4, pool=pool)
    results = [getattr(shop, task).delay() for _ in range(6)]
    shop.wait_done(*results)
    shop.wait(lambda: shop.payments.snapshot().state == "CLOSED", "payments to close")
    assert {result.get(timeout=TIMEOUT) for result in results} == {"token"}


def test_tasks_of_another_breaker_that_call_nested_functions_finish(shop: Shop) -> None:
    heals(shop, "order", "prefork")


@pools
def test_a_trial_goes_on_in_the_threads_of_its_task(shop: Shop, pool: str) -> None:
    heals(shop, "charge_in_threads", pool)


@pools
def test_the_threads_of_a_task_share_its_slot(shop: Shop, pool: str) -> None:
    shop.worker(concurrency=4, pool=pool)
    results = [shop.narrow_in_threads.delay() for _ in range(8)]
    shop.wait_done(*results)
    assert int(shop.side.get("runs of narrow_in_threads")) == 8


def test_wrapped_refusals_defer_or_fall_back(shop: Shop) -> None:
    shop.mail.isolate(reason="maintenance")
    shop.worker(concurrency=2)
    tasks = [shop.send_in_group, shop.send_again_and_again, shop.send_with_an_error_of_its_own]
    results = [task.delay() for task in tasks]
    for result in results:
        shop.wait_state(result, "DEFERRED")
    assert shop.send_or_later.delay().get(timeout=TIMEOUT) == "later"
    shop.mail.reset(reason="done")
    shop.wait_done(*results)


def test_a_task_that_is_refused_inside_its_body_backs_off(shop: Shop) -> None:
    shop.worker(concurrency=2)
    began = time.monotonic()
    shop.refused_inside.delay()
    shop.wait(lambda: int(shop.side.get("runs of refused_inside") or 0) >= 4, "four runs")
    assert time.monotonic() - began >= 0.5 + 1 + 2
