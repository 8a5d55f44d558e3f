"""Pools that grow, shrink and restart: processes that come late obey like the first ones, none loses an outcome."""

from __future__ import annotations

from tests.integration.conftest import Shop


def test_an_autoscaled_pool_obeys_and_loses_no_outcome(shop: Shop) -> None:
    worker = shop.worker(arguments=["--autoscale=4,1"], env={"AUTOSCALE_KEEPALIVE": "1"})
    occupy_and_isolate(shop, 4)
    shop.wait(lambda: "Scaling down" in worker.output(), "the pool to shrink")
    count_outcomes(shop)
    finish_an_outage(shop)


def test_a_pool_under_remote_control_obeys_and_loses_no_outcome(shop: Shop) -> None:
    shop.worker(arguments=["worker_pool_restarts=1"])
    first = pool_processes(shop)
    shop.app.control.pool_grow(2)
    shop.wait(lambda: len(pool_processes(shop)) == 4, "the pool to grow")
    shop.app.control.pool_restart()
    occupy_and_isolate(shop, 4)  # each finishes what it is at and is then replaced
    shop.wait(lambda: len(pool_processes(shop) - first) == 4, "all pool processes to be new")
    shop.app.control.pool_shrink(3)
    shop.wait(lambda: len(pool_processes(shop)) == 1, "the pool to shrink")
    count_outcomes(shop)
    finish_an_outage(shop)


def pool_processes(shop: Shop) -> set[int]:
    """Ids of the pool processes of the one worker; none while it is too busy to answer."""
    answers = shop.app.control.inspect(timeout=10, limit=1).stats() or {}
    return {pid for answer in answers.values() for pid in answer["pool"]["processes"]}


def occupy_and_isolate(shop: Shop, count: int) -> None:
    """Have so many pool processes watch payments, isolate it, and wait until all of them have noticed."""
    for _ in range(count):
        shop.watch.delay()
    shop.wait(lambda: shop.side.llen("watching") == count, "all pool processes to watch")
    assert len(set(shop.side.lrange("watching", 0, -1))) == count
    shop.open("payments")
    shop.wait(lambda: shop.side.llen("obeyed") == count, "all pool processes to obey")


def count_outcomes(shop: Shop) -> None:
    """Have some tasks succeed and some fail, and look whether each is counted once."""
    shop.set_health("reckless", "down")
    fine = [shop.antidote.delay() for _ in range(8)]
    failing = [shop.reckless.delay("reckless") for _ in range(8)]
    shop.wait_done(*fine)
    shop.wait(lambda: all(result.state == "FAILURE" for result in failing), "the others to fail")
    shop.wait(lambda: shop.tolerant.snapshot().calls >= 16, "all to be counted")
    snapshot = shop.tolerant.snapshot()
    assert (snapshot.calls, snapshot.failures) == (16, 8)


def finish_an_outage(shop: Shop) -> None:
    """Have tasks deferred behind the isolated breaker, and see them through."""
    results = [shop.charge.delay(order) for order in range(5)]
    shop.wait(lambda: shop.waiting("payments") == 5, "all to wait")
    assert shop.calls("payments") == 0
    shop.close("payments")
    shop.wait_done(*results)
