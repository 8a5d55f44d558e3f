"""A Redis with little memory, and more refused tasks than it can hold: the guard acts before the server does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from kombu import Connection

from resilient_tasks import DeferredQueueFullError
from resilient_tasks.breaker import Breaker
from resilient_tasks.worker.deferral import LOOK_INTERVAL
from tests.integration.conftest import Shop
from workers.processes import Server

MAXIMUM = 32 * 1024**2
LIMIT = int(0.8 * MAXIMUM)
HEADERS = {"ballast": "x" * 200_000}  # bytes that no result repeats
BATCH = 5  # messages


@dataclass
class SmallBroker:
    """A broker of its own, with breakers' state in it, and a shop whose worker uses it."""

    shop: Shop
    server: Server
    payments: Breaker
    client: Any
    connection: Connection

    @property
    def used(self) -> int:
        return int(self.client.info("memory")["used_memory"])

    def worker(self, **env: str) -> Any:
        return self.shop.worker(queues=["celery", "bulk"], env={"SHOP_BROKER_URL": self.server.url(), **env})

    def charges(self, count: int) -> list[Any]:
        if self.used > 0.8 * LIMIT:
            time.sleep(LOOK_INTERVAL)  # so that the first of them has the worker look at the memory
        task = self.shop.charge
        options = {"queue": "bulk", "headers": HEADERS, "connection": self.connection}
        return [task.apply_async((order,), **options) for order in range(count)]

    def tally(self, count: int) -> None:
        """Run tasks that have nothing to do with payments."""
        before = int(self.shop.side.get("tally") or 0)
        for _ in range(count):
            self.shop.tally.apply_async(connection=self.connection)
        self.shop.wait(lambda: int(self.shop.side.get("tally") or 0) == before + count, "healthy tasks")

    def waiting(self) -> int:
        return int(self.client.llen("resilient.deferred.payments"))


@pytest.fixture
def small(shop: Shop) -> Iterator[SmallBroker]:
    server = shop.server_of_its_own()
    client = redis.Redis.from_url(server.url(), decode_responses=True)
    client.config_set("maxmemory", MAXIMUM)
    with shop.breaker_in(server) as payments, Connection(server.url()) as connection:
        payments.isolate(reason="test")
        yield SmallBroker(shop, server, payments, client, connection)


def test_what_finds_no_memory_fails_and_the_rest_waits(shop: Shop, small: SmallBroker) -> None:
    small.worker()
    results: list[Any] = []
    failed: list[Any] = []

    def are_dealt_with() -> bool:
        failed[:] = [result for result in results if result.state == "FAILURE"]
        return small.waiting() + len(failed) == len(results) and not small.client.hlen("unacked")

    while len(results) * len(HEADERS["ballast"]) < MAXIMUM:
        results += small.charges(BATCH)
        shop.wait(are_dealt_with)
    assert LIMIT * 0.9 < small.used < MAXIMUM * 0.9
    assert isinstance(failed[0].result, DeferredQueueFullError)
    assert (failed[0].result.memory_limit, failed[0].result.max_deferred) == (LIMIT, None)
    small.tally(10)
    small.payments.reset(reason="test")
    shop.wait_done(*[result for result in results if result not in failed])


def test_what_finds_no_memory_stays_on_its_queue(shop: Shop, small: SmallBroker) -> None:
    worker = small.worker(RESILIENT_TASKS_BREAKERS__PAYMENTS__OVERFLOW="block")
    results: list[Any] = []

    def is_blocked() -> bool:
        return "queue bulk is blocked" in worker.output()

    def wait_or_block() -> bool:
        return small.waiting() == len(results) or is_blocked()

    def are_in_place() -> bool:
        held = small.waiting() + small.client.llen("bulk")  # what is just being taken is nowhere
        return bool(held == len(results) and not small.client.hlen("unacked"))

    while not is_blocked():
        results += small.charges(BATCH)
        shop.wait(wait_or_block)
    shop.wait(are_in_place)
    small.tally(10)
    small.payments.reset(reason="test")
    shop.wait_done(*results)
    assert sorted(shop.runs("charge")) == sorted(result.id for result in results)


def test_a_server_that_refuses_to_store_anything_for_a_while_loses_nothing(shop: Shop, small: SmallBroker) -> None:
    worker = small.worker(RESILIENT_TASKS_STORE_MEMORY_LIMIT="none")
    results = small.charges(BATCH)
    shop.wait(lambda: small.waiting() == BATCH, "the first ones to wait")
    worker.freeze()
    results += small.charges(BATCH)
    for _ in range(BATCH):
        shop.tally.apply_async(connection=small.connection)
    small.client.config_set("maxmemory", small.used // 2)  # as if another program had filled it
    with pytest.raises(redis.OutOfMemoryError):
        small.client.set("anything", "at all")
    worker.thaw()
    shop.wait(lambda: shop.side.get("tally") == str(BATCH), "healthy tasks")
    shop.wait(lambda: small.waiting() == 2 * BATCH, "the others to be deferred all the same")
    shop.wait(lambda: not small.client.hlen("unacked"), "all to be acknowledged")
    assert worker.running
    small.client.config_set("maxmemory", MAXIMUM)
    small.payments.reset(reason="test")
    shop.wait_done(*results)
    assert sorted(shop.runs("charge")) == sorted(result.id for result in results)
    assert shop.side.get("tally") == str(BATCH)
