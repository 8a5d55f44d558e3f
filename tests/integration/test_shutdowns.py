"""Workers are stopped in mid-outage, warmly and not, and beats are killed: nothing is lost or counted as a failure."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from resilient_tasks.core.model import State
from tests.integration.conftest import TIMEOUT, Shop


class Outage:
    """A worker in mid-outage: tasks that wait for one dependency, tasks that hang in another, tasks on the queue."""

    def __init__(self, shop: Shop, *, slots: int = 2, **worker: Any) -> None:
        self.shop = shop
        shop.open("payments")
        shop.set_health("slow", "hang")
        self.waiting = [shop.charge.delay(order) for order in range(5)]
        self.worker = shop.worker(**worker)
        shop.wait(lambda: shop.waiting("payments") == 5, "the refused ones to wait")
        self.running = [shop.poison.delay("slow") for _ in range(slots)]
        shop.wait(lambda: len(shop.runs("poison")) == slots, "the pool to be full")
        self.queued = [shop.charge.delay(order) for order in range(3)]

    @property
    def tasks(self) -> list[Any]:
        """All of them."""
        return self.waiting + self.running + self.queued

    def wait_for_the_end(self) -> None:
        """Wait until the worker has ended, and look whether the broker holds every task once."""
        shop = self.shop
        shop.wait(lambda: not self.worker.running, "the worker to end")
        assert shop.broker.hlen("unacked") == 0
        held = shop.waiting("payments"), shop.waiting("tolerant"), shop.broker.llen("celery")
        assert sum(held) == len(self.tasks), held

    def heal(self) -> None:
        """Bring the dependencies back, start another worker and wait until all tasks have finished."""
        self.shop.set_health("slow", "up")
        self.shop.close("payments")
        self.shop.worker(pool="threads")  # quicker to start and to stop
        self.shop.wait_done(*self.tasks)


def test_a_cold_shutdown_in_mid_outage_loses_nothing(shop: Shop) -> None:
    outage = Outage(shop)
    outage.worker.send_signal(signal.SIGQUIT)
    outage.wait_for_the_end()
    assert shop.tolerant.snapshot().calls == 0, "the tasks that were cut off say nothing about their dependency"
    outage.heal()


def test_what_fails_in_the_grace_of_a_soft_shutdown_is_deferred(shop: Shop) -> None:
    outage = Outage(shop, arguments=["worker_soft_shutdown_timeout=8"])
    outage.worker.send_signal(signal.SIGQUIT)
    shop.wait(lambda: "Initiating Soft Shutdown" in outage.worker.output(), "the grace to begin")
    shop.set_health("slow", "down")
    outage.wait_for_the_end()
    assert outage.worker.output().count("deferred: the task failed: DependencyDownError") == 2
    outage.heal()


def test_a_warm_shutdown_that_turns_cold_loses_nothing(shop: Shop) -> None:
    outage = Outage(shop)
    outage.worker.send_signal(signal.SIGTERM)
    shop.wait(lambda: "Warm shutdown" in outage.worker.output(), "the shutdown to begin")
    outage.worker.send_signal(signal.SIGQUIT)  # as container runtimes do, and people who press Ctrl+C twice
    outage.wait_for_the_end()
    outage.heal()


@pytest.mark.parametrize(("pool", "slots"), [("threads", 2), ("solo", 1)])
def test_other_pools_shut_down_warmly_without_loss(shop: Shop, pool: str, slots: int) -> None:
    outage = Outage(shop, slots=slots, pool=pool)
    outage.worker.send_signal(signal.SIGTERM)
    shop.wait(lambda: "Warm shutdown" in outage.worker.output(), "the shutdown to begin")
    shop.set_health("slow", "down")
    outage.wait_for_the_end()
    outage.heal()


def test_a_trial_cut_off_by_a_cold_shutdown_gives_its_permit_back(shop: Shop) -> None:
    shop.set_health("payments", "hang")
    shop.payments.trip()
    worker = shop.worker()
    results = [shop.charge.delay(order) for order in range(4)]
    shop.wait(lambda: shop.calls("payments") == 2, "trials to fill the pool")
    half_open = shop.payments.snapshot()
    worker.send_signal(signal.SIGQUIT)
    shop.wait(lambda: not worker.running, "the worker to end")
    left = shop.payments.snapshot()
    assert (half_open.state, left.state, left.trials) == (State.HALF_OPEN, State.HALF_OPEN, 0)
    assert left.epoch == half_open.epoch
    shop.set_health("payments", "up")
    shop.worker(pool="threads")
    shop.wait_done(*results)


def test_beats_may_run_twice_and_be_killed(shop: Shop) -> None:
    shop.accounts.trip()  # then it is HALF_OPEN until there is a call: a tick is due all the time
    shop.open("payments")
    results = [shop.charge.delay(order) for order in range(30)]
    shop.worker()
    beats = [shop.beat(), shop.beat()]
    shop.wait(lambda: shop.waiting("payments") == 30, "all to wait")
    shop.close("payments")
    for beat in beats:
        beat.wait_for_output("Sending due task resilient-tasks-tick", timeout=TIMEOUT)
    for beat in beats:
        beat.kill()
    shop.wait_done(*results)
    assert sorted(shop.runs("charge")) == sorted(result.id for result in results), "each ran once"
