"""A dependency goes down and comes back, with real workers, beat and broker."""

from __future__ import annotations

import re

import pytest

from tests.integration.conftest import Shop


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_tasks_wait_in_the_broker_and_finish_by_themselves(shop: Shop, pool: str) -> None:
    shop.beat()
    shop.worker(pool=pool)
    shop.set_health("payments", "down")
    results = [shop.charge.delay(order) for order in range(40)]

    shop.wait(lambda: all(result.state == "DEFERRED" for result in results), "all to be DEFERRED")
    shop.wait(lambda: shop.waiting("payments") == 40, "all to wait")  # the state is written first
    assert results[-1].info["breaker"] == "payments"
    assert results[-1].info["reason"]
    assert results[-1].info["since"] == pytest.approx(shop.resilience.fleet.view.server_now(), abs=60)

    shop.set_health("payments", "up")
    shop.wait_done(*results)
    assert [result.result for result in results] == list(range(40))
    assert shop.waiting("payments") == 0
    assert set(shop.runs("charge")) == {result.id for result in results}
    shop.wait(lambda: shop.payments.snapshot().deferred == 0, "the index to be empty")
    assert shop.payments.snapshot().state == "CLOSED"


def test_a_dead_dependency_is_called_a_few_times_and_healthy_work_goes_on(shop: Shop) -> None:
    shop.beat()
    shop.worker()
    shop.worker()
    shop.set_health("payments", "down")
    charges = [shop.charge.delay(order) for order in range(100)]
    pings = [shop.ping.delay() for _ in range(100)]
    shop.wait_done(*pings)
    shop.wait(lambda: shop.waiting("payments") == 100, "all charges to wait")
    calls, opened = shop.side.llen("runs:charge"), shop.payments.snapshot()
    assert opened.state == "OPEN" or opened.openings >= 1
    # three in a row open it; what the other processes were calling at that moment came on top
    assert calls <= 3 + 4 + 3 * opened.openings
    shop.set_health("payments", "up")
    shop.wait_done(*charges)


def test_a_probe_replaces_trials_of_tasks(shop: Shop) -> None:
    shop.beat()
    shop.worker()
    shop.set_health("probed", "down")
    results = [shop.ship.delay(order) for order in range(10)]
    shop.wait(lambda: shop.waiting("probed") == 10, "all to wait")
    deferred, openings = [result.info for result in results], shop.probed.snapshot().openings
    assert sum("failed" in info["reason"] for info in deferred) <= 3 + 2
    shop.wait(lambda: shop.probed.snapshot().openings >= openings + 3, "probes to fail")
    assert [result.info for result in results] == deferred, "no task was called"
    shop.set_health("probed", "up")
    shop.wait_done(*results)


def test_workers_take_over_when_there_is_no_beat(shop: Shop) -> None:
    shop.worker()
    shop.set_health("payments", "down")
    results = [shop.charge.delay(order) for order in range(10)]
    shop.wait(lambda: shop.waiting("payments") == 10, "all to wait")
    shop.set_health("payments", "up")
    shop.wait_done(*results)


def test_a_pool_full_of_hanging_tasks_does_not_starve_the_tick(shop: Shop) -> None:
    shop.beat()
    shop.worker(queues=["celery"])
    shop.open("payments")
    waiting = [shop.charge.delay(order) for order in range(5)]
    shop.wait(lambda: shop.waiting("payments") == 5, "all to wait")
    shop.set_health("hang", "hang")
    for _ in range(8):
        shop.hang.delay()
    shop.wait(lambda: shop.side.get("hanging") == "2", "the pool to be full")
    shop.close("payments")
    shop.wait(lambda: shop.waiting("payments") < 5, "the tick to resume the first ones")
    shop.set_health("hang", "up")
    shop.wait_done(*waiting)


def test_nothing_is_published_while_nothing_is_due(shop: Shop) -> None:
    beat = shop.beat()
    worker = shop.worker()
    assert shop.ping.delay().get(timeout=60) == "pong"
    shop.open("payments")
    charge = shop.charge.delay(1)
    shop.wait(lambda: shop.waiting("payments") == 1, "it to wait")
    assert "resilient-tasks-tick" not in beat.output()
    worker.stop()  # a worker might be quicker than beat
    shop.close("payments")
    beat.wait_for_output("resilient-tasks-tick", timeout=60)
    shop.worker()
    assert charge.get(timeout=60) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_joins_while_open_obeys_at_once(shop: Shop, pool: str) -> None:
    shop.open("payments")
    results = [shop.charge.delay(order) for order in range(20)]
    shop.worker(pool=pool)
    shop.wait(lambda: shop.waiting("payments") == 20, "all to wait")
    assert shop.calls("payments") == 0
    assert {result.state for result in results} == {"DEFERRED"}


def test_every_transition_is_announced_once(shop: Shop) -> None:
    programs = [shop.beat(), shop.worker(), shop.worker()]
    shop.set_health("payments", "down")
    charge = [shop.charge.delay(order) for order in range(6)]
    shop.wait(lambda: shop.payments.snapshot().openings >= 2, "two openings")
    shop.set_health("payments", "up")
    shop.wait_done(*charge)
    shop.wait(lambda: shop.payments.snapshot().state == "CLOSED", "it to close")
    made = shop.resilience.fleet.history.transitions("payments")
    moves = sorted(f"{each.previous} -> {each.state}" for each in made)

    def announced() -> list[str]:
        log = "".join(program.output() for program in programs)
        return sorted(re.findall(r"\] breaker payments: (\w+ -> \w+)", log))

    shop.wait(lambda: len(announced()) >= len(moves), "all to be announced")
    assert announced() == moves


def test_ticks_do_not_pile_up_while_there_is_no_worker(shop: Shop) -> None:
    shop.open("payments")
    worker = shop.worker()
    result = shop.charge.delay(1)
    shop.wait(lambda: shop.waiting("payments") == 1, "it to wait")
    worker.stop()
    shop.close("payments")
    beat = shop.beat()
    shop.wait(lambda: shop.broker.llen("resilient.control") == 3, "beat to send ticks")
    sent = beat.output().count("Sending due task resilient-tasks-tick")
    shop.wait(lambda: shop.probed.snapshot().now > shop.payments.snapshot().since + 3, "ten more ticks to be due")
    assert shop.broker.llen("resilient.control") == sent == 3
    shop.worker()
    shop.wait(lambda: result.state == "SUCCESS", "it to finish")


def test_a_queue_without_workers_does_not_hold_up_the_others(shop: Shop) -> None:
    shop.beat()
    deserter = shop.worker(queues=["deserted"])
    shop.open("payments")
    stranded = [shop.charge.apply_async((order,), queue="deserted") for order in range(10)]
    shop.wait(lambda: shop.waiting("payments") == 10, "the first to wait")
    shop.worker(queues=["celery"])
    others = [shop.charge.delay(order) for order in range(10)]
    shop.wait(lambda: shop.waiting("payments") == 20, "all to wait")
    deserter.stop()
    shop.close("payments")
    shop.wait_done(*others)
    shop.worker(queues=["deserted"])
    shop.wait_done(*stranded)


def test_a_worker_that_starts_while_ticks_arrive_is_ready_at_once(shop: Shop) -> None:
    worker = shop.worker()
    shop.open("payments")
    results = [shop.charge.delay(order) for order in range(5)]
    shop.wait(lambda: shop.waiting("payments") == 5, "all to wait")
    worker.stop()
    shop.payments.trip(reason="test")  # due for as long as no worker runs a trial
    shop.beat()  # four ticks a second, which no second of silence ever interrupts
    shop.wait(lambda: shop.broker.llen("resilient.control") > 0, "ticks to arrive")
    mingling = shop.worker(mingle=True)
    assert "mingle: all alone" in mingling.output()
    shop.wait_done(*results)
