"""Tasks over their worker's own limit wait in the worker for a moment, in the way of none, whatever happens."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import TIMEOUT, Shop
from tests.integration.test_faults import soon_restored
from workers.processes import Worker

HELD = 8


def hold(shop: Shop, **env: str) -> tuple[Worker, list[Any]]:
    """Return a worker that runs one task and holds others, by default for good."""
    worker = shop.worker(concurrency=2, env={"SHOP_HELD_AT_MOST": "3600", **env})
    shop.set_health("alone", "hang")
    results = [shop.one_by_one.delay() for _ in range(1 + HELD)]
    shop.wait(lambda: shop.runs("one_by_one"), "one to run")
    assert shop.ping.delay().get(timeout=TIMEOUT) == "pong", "others run"
    shop.wait(lambda: shop.broker.llen("celery") == 0, "the others to be taken")
    return worker, results


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_burst_over_the_limit_runs_without_a_way_through_the_deferred_queue(shop: Shop, pool: str) -> None:
    if pool == "gevent":
        pytest.importorskip("gevent")
    worker = shop.worker(pool=pool, concurrency=2)
    results: list[Any] = []

    def deferred_in_a_burst() -> int:
        before = worker.output().count(at_capacity)
        results.extend(shop.one_by_one.delay() for _ in range(60))
        shop.wait_done(*results)
        assert sorted(shop.runs("one_by_one")) == sorted(result.id for result in results), "each once"
        return worker.output().count(at_capacity) - before

    at_capacity = "deferred: breaker 'alone' is at capacity"
    shop.wait(lambda: deferred_in_a_burst() < 10, "a burst in which no call hangs because the machine does")


def test_what_is_held_for_too_long_is_deferred(shop: Shop) -> None:
    _, results = hold(shop, SHOP_HELD_AT_MOST="4")
    shop.wait(lambda: shop.waiting("alone") == HELD, "all others to wait outside")
    assert results[-1].state == "DEFERRED"
    shop.set_health("alone", "up")
    shop.wait_done(*results)


def test_what_is_held_is_deferred_when_its_breaker_opens(shop: Shop) -> None:
    _, results = hold(shop)
    shop.open("alone")
    shop.wait(lambda: shop.waiting("alone") == HELD, "all others to wait outside")
    assert "FORCED_OPEN" in results[-1].info["reason"]
    shop.set_health("alone", "up")
    shop.close("alone")
    shop.wait_done(*results)


def test_what_is_held_can_be_revoked_and_expires(shop: Shop) -> None:
    worker, results = hold(shop)
    expiring = shop.one_by_one.apply_async(expires=1)
    results[3].revoke()
    shop.wait_state(results[3], "REVOKED")
    shop.wait_state(expiring, "REVOKED")
    shop.set_health("alone", "up")
    shop.wait_done(*(result for result in results if result is not results[3]))
    assert results[3].id not in shop.runs("one_by_one")
    assert worker.running


def lose_the_connection(shop: Shop, worker: Worker) -> None:
    shop.broker.client_kill_filter(_type="normal", skipme=True)
    shop.wait(lambda: "Connection to broker lost" in worker.output(), "the worker to notice")
    shop.set_health("alone", "up")


def stop(how: signal.Signals) -> Callable[[Shop, Worker], None]:
    def stop(shop: Shop, worker: Worker) -> None:
        worker.send_signal(how)
        shop.wait(lambda: "shutdown" in worker.output().lower(), "the worker to notice")
        shop.set_health("alone", "up")
        shop.wait(lambda: not worker.running, "the worker to end")
        assert len(shop.runs("one_by_one")) == 1, "no other begins"
        shop.worker(concurrency=2)

    return stop


@pytest.mark.parametrize(
    "disturb",
    [lose_the_connection, stop(signal.SIGTERM), stop(signal.SIGQUIT)],
    ids=["reconnects", "warm", "cold"],
)
def test_nothing_that_is_held_is_lost(shop: Shop, disturb: Callable[[Shop, Worker], None]) -> None:
    worker, results = hold(shop, **soon_restored(5))
    disturb(shop, worker)
    shop.wait_done(*results)
