"""When nothing more may be deferred: the task fails, or its queue is left alone until something may."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.conftest import TIMEOUT, Shop
from workers.processes import Worker

MOST = 2  # that ``blocking`` may defer


def ids(results: list[Any]) -> list[str]:
    return [result.id for result in results]


def queued(shop: Shop, queue: str = "bulk") -> list[str]:
    """Ids in the order in which a worker would take them."""
    return [json.loads(text)["headers"]["id"] for text in reversed(shop.broker.lrange(queue, 0, -1))]


def haul(shop: Shop, count: int, *, early: bool = False) -> list[Any]:
    task = shop.haul_early if early else shop.haul
    return [task.apply_async(queue="bulk") for _ in range(count)]


def wait_until_blocked(shop: Shop, worker: Worker, results: list[Any]) -> None:
    """Wait until as many wait as may, the others lie on their queue and none is under way."""
    shop.wait(lambda: shop.waiting("blocking") == MOST, "the first ones to be deferred")
    worker.wait_for_output("queue bulk is blocked", timeout=60)
    shop.wait(lambda: shop.broker.llen("bulk") == len(results) - MOST, "the others to be back")
    shop.wait(lambda: shop.broker.hlen("unacked") == 0, "none to be under way")


def finish(shop: Shop, results: list[Any]) -> None:
    shop.close("blocking")
    shop.wait_done(*results)
    assert sorted(shop.runs("haul")) == sorted(ids(results))


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_blocked_queue_keeps_its_backlog_in_order_and_holds_up_no_other(shop: Shop, pool: str) -> None:
    shop.open("blocking")
    results = haul(shop, 12)
    worker = shop.worker(queues=["bulk", "celery"], pool=pool)
    wait_until_blocked(shop, worker, results)
    assert queued(shop) == ids(results)[MOST:]
    assert {result.state for result in results[MOST:]} == {"PENDING"}
    pings = [shop.ping.delay() for _ in range(20)]
    shop.wait_done(*pings)
    assert queued(shop) == ids(results)[MOST:]
    assert worker.output().count("queue bulk is blocked") == 1
    assert shop.runs("haul") == []
    finish(shop, results)


def test_what_was_prefetched_goes_back_in_order(shop: Shop) -> None:
    shop.set_health("hang", "hang")
    worker = shop.worker(queues=["bulk"], concurrency=1, arguments=["--prefetch-multiplier=6"])
    shop.hang.apply_async(queue="bulk")
    shop.wait(lambda: shop.side.get("hanging") == "1", "the pool to be full")
    results = haul(shop, 5)
    shop.wait(lambda: shop.broker.hlen("unacked") == 6, "the worker to hold them")
    shop.open("blocking")
    results += haul(shop, 5)
    shop.set_health("hang", "up")
    shop.wait(lambda: shop.waiting("blocking") == MOST, "the first ones to be deferred")
    shop.wait(lambda: shop.broker.llen("bulk") == 8, "the others to be back")
    deferred = [json.loads(text)["headers"]["id"] for text in shop.broker.lrange("resilient.deferred.blocking", 0, -1)]
    assert queued(shop) == [one for one in ids(results) if one not in deferred]
    worker.wait_for_output("queue bulk is blocked", timeout=60)
    finish(shop, results)


@pytest.mark.parametrize("early", [False, True])
def test_a_run_that_fails_and_finds_no_room_goes_back_with_its_attempts(shop: Shop, early: bool) -> None:  # noqa: FBT001
    worker = shop.worker(queues=["bulk"])
    shop.set_health("blocking", "hang")
    [failing] = haul(shop, 1, early=early)
    shop.wait(lambda: failing.id in shop.runs("haul"), "it to run")
    shop.open("blocking")
    waiting = haul(shop, MOST)
    shop.wait(lambda: shop.waiting("blocking") == MOST, "the queue to be full")
    shop.set_health("blocking", "down")
    worker.wait_for_output("queue bulk is blocked", timeout=60)
    shop.wait(lambda: failing.id in queued(shop), "it to be back")
    shop.wait(lambda: shop.broker.hlen("unacked") == 0, "none to be under way")
    assert failing.state == "PENDING"
    [message] = [json.loads(text) for text in shop.broker.lrange("bulk", 0, -1)]
    assert message["headers"]["x-resilient-tasks"]["attempted_at"] > 0
    shop.set_health("blocking", "up")
    shop.close("blocking")
    shop.wait(lambda: all(result.state == "SUCCESS" for result in [*waiting, failing]), "all to finish")


def test_a_worker_that_stops_or_starts_while_blocked_changes_nothing(shop: Shop) -> None:
    shop.open("blocking")
    worker = shop.worker(queues=["bulk"])
    results = haul(shop, 8)
    wait_until_blocked(shop, worker, results)
    assert worker.stop() == 0
    assert queued(shop) == ids(results)[MOST:]
    worker = shop.worker(queues=["bulk"])
    worker.wait_for_output("queue bulk is blocked", timeout=60)
    shop.wait(lambda: shop.broker.hlen("unacked") == 0, "what it took to be back")
    assert queued(shop) == ids(results)[MOST:]
    finish(shop, results)


def test_an_operator_who_cancels_a_blocked_queue_has_the_last_word(shop: Shop) -> None:
    shop.open("blocking")
    worker = shop.worker(queues=["bulk", "celery"])
    results = haul(shop, 6)
    wait_until_blocked(shop, worker, results)
    control = shop.app.control
    control.cancel_consumer("bulk", reply=True, timeout=TIMEOUT, limit=1)
    shop.close("blocking")
    shop.wait(lambda: all(result.state == "DEFERRED" or result.ready() for result in results[:MOST]), "the resumed")
    assert shop.ping.delay().get(timeout=60) == "pong"
    assert set(queued(shop)) >= set(ids(results)[MOST:])
    control.add_consumer("bulk", reply=True, timeout=TIMEOUT, limit=1)
    finish(shop, results)
