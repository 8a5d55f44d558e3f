"""A dependency that hangs leaves the other tasks of its worker alone: spare slots come, and go when it is back."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.integration.conftest import Shop
from workers.processes import Worker

CALLS, OTHERS = 12, 12
ADDED, REMOVED = "spare slot added", "spare slot removed"


def spare_slots(worker: Worker) -> int:
    """How many a worker has at present."""
    log = worker.output()
    return log.count(ADDED) - log.count(REMOVED)


def hang(shop: Shop, worker: Worker, calls: int = CALLS) -> list[Any]:
    """Let calls hang after some that did not, until a spare slot was added; return the results of all calls."""
    results = [shop.linger.delay() for _ in range(3)]
    shop.wait_done(*results)
    shop.set_health("lingering", "hang")
    results += [shop.linger.delay() for _ in range(calls)]
    shop.wait(lambda: spare_slots(worker) > 0, "a spare slot")
    return results


def others_run(shop: Shop, others: int = OTHERS) -> None:
    """Tasks without a breaker run while the calls hang."""
    shop.wait_done(*[shop.ping.delay() for _ in range(others)])
    assert shop.side.get("health:lingering") == "hang"


def recover(shop: Shop, worker: Worker, results: list[Any]) -> None:
    """All calls end, and the pool has its size again."""
    shop.set_health("lingering", "up")
    shop.wait_done(*results)
    shop.wait(lambda: spare_slots(worker) == 0, "the spare slots to go")


@pytest.mark.parametrize(
    ("pool", "concurrency"), [("prefork", 1), ("prefork", 2), ("prefork", 4), ("threads", 2), ("gevent", 2)]
)
def test_other_tasks_run_while_all_slots_are_held_by_calls_that_hang(shop: Shop, pool: str, concurrency: int) -> None:
    if pool == "gevent":
        pytest.importorskip("gevent")
    worker = shop.worker(pool=pool, concurrency=concurrency)
    results = hang(shop, worker)
    others_run(shop)
    shop.wait(lambda: shop.waiting("tolerant") >= CALLS - concurrency - 2, "what is over to wait")
    assert spare_slots(worker) <= 2
    recover(shop, worker, results)
    if pool == "prefork":
        shop.wait(lambda: len(psutil.Process(worker.pid).children()) == concurrency, "the spare process to end")


def kill_a_pool_process(shop: Shop, worker: Worker) -> None:
    os.kill(psutil.Process(worker.pid).children()[0].pid, signal.SIGKILL)


def lose_the_connection(shop: Shop, worker: Worker) -> None:
    shop.broker.client_kill_filter(_type="normal", skipme=True)
    shop.wait(lambda: "Connection to broker lost" in worker.output(), "the worker to notice")


def nothing(shop: Shop, worker: Worker) -> None:
    """Nothing happens."""


@pytest.mark.parametrize(
    ("disturb", "arguments"),
    [
        (kill_a_pool_process, ()),
        (lose_the_connection, ()),
        (nothing, ("--autoscale=2,1",)),
        (nothing, ("--max-tasks-per-child=1",)),
        (nothing, ("--max-memory-per-child=1",)),
    ],
    ids=["killed", "reconnects", "autoscale", "max-tasks", "max-memory"],
)
def test_it_is_the_same_whatever_else_becomes_of_the_pool(
    shop: Shop, disturb: Callable[[Shop, Worker], None], arguments: tuple[str, ...]
) -> None:
    worker = shop.worker(concurrency=2, arguments=arguments)
    results = hang(shop, worker, calls=5)  # few: some of these pools start a process for each task
    disturb(shop, worker)
    others_run(shop, others=4)
    shop.set_health("lingering", "up")
    shop.wait(lambda: all(result.ready() for result in results), "all calls to end")
    shop.wait(lambda: spare_slots(worker) == 0, "the spare slots to go")
    shop.wait_done(*[shop.ping.delay() for _ in range(4)])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT], ids=["warm", "cold"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_shutdown_in_the_middle_of_it_loses_nothing(shop: Shop, pool: str, how: signal.Signals) -> None:
    worker = shop.worker(pool=pool, concurrency=2)
    results = hang(shop, worker)
    others_run(shop)
    worker.send_signal(how)
    if how is signal.SIGTERM:
        shop.wait(lambda: "Warm shutdown" in worker.output(), "the worker to notice")
    shop.set_health("lingering", "up")
    shop.wait(lambda: not worker.running, "the worker to end")
    if (pool, how) == ("threads", signal.SIGQUIT):  # Celery cancels late tasks, which its pool of threads cannot
        assert re.search(r'File ".*/resilient_tasks/', worker.output()) is None
    else:
        assert "Traceback" not in worker.output()
    shop.worker(concurrency=2)
    shop.wait_done(*results)


def test_a_burst_in_healthy_times_adds_no_slot_and_makes_no_breaker_suspect(shop: Shop) -> None:
    worker = shop.worker(concurrency=2)

    def changes_nothing() -> bool:
        before = worker.output()
        shop.wait_done(*[shop.linger.delay() for _ in range(600)])
        log = worker.output().removeprefix(before)
        return "suspect" not in log and ADDED not in log

    shop.wait(changes_nothing, "a burst in which no call hangs because the machine does")


def test_a_solo_pool_says_that_it_cannot_grow(shop: Shop) -> None:
    worker = shop.worker(pool="solo")
    shop.wait(lambda: "the solo pool cannot add a slot" in worker.output(), "the log line")
