"""A limit of calls in flight: kept by all workers together, also when some are killed, and no task waits in a pool."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.integration.conftest import Shop
from tests.integration.depots import TIMEOUT, Depot, are
from workers.processes import Program, wait_until

LIMIT = 2  # of the depot's scarce breaker


@pytest.fixture
def depot(broker: str, shop: Shop, tmp_path: Path) -> Iterator[Depot]:
    """A depot on each broker in turn."""
    depot = Depot(broker, shop.server, tmp_path, queue=f"isolation-{random.getrandbits(32):x}")
    redis.Redis.from_url(shop.server.url(0)).flushall()
    yield depot
    depot.stop()


def most_in_flight(depot: Depot, what: str = "scarce") -> int:
    return max(map(int, depot.side.lrange(f"seen in flight:{what}", 0, -1)))


def kill(depot: Depot, worker: Program) -> None:
    """Kill a worker with its pool; its runs end with it."""
    worker.send_signal(signal.SIGKILL)
    worker.kill()
    for run in map(str, depot.side.smembers("in flight:scarce")):
        if run.startswith(f"{worker.pid}:"):
            depot.side.srem("in flight:scarce", run)


def start(depot: Depot, **options: Any) -> Program:
    return depot.worker(arguments=["--without-mingle"], **options)


def test_tasks_beyond_the_limit_wait_outside_and_come_back_in_order(depot: Depot, broker: str) -> None:
    depot.side.set("hold", 1)
    worker = start(depot, pool="prefork" if broker.startswith("redis") else "threads", concurrency=4)
    client = depot.client()
    results = [client.send_task("occupy", (order,)) for order in range(16)]
    reason = "deferred: breaker 'scarce' is at capacity"
    wait_until(lambda: reason in worker.output(), timeout=TIMEOUT, what="some to wait")
    wait_until(lambda: any(each.state == "DEFERRED" for each in results), timeout=TIMEOUT, what="the state of one")
    assert client.send_task("ping").get(timeout=TIMEOUT) == "pong"
    depot.side.delete("hold")
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    assert most_in_flight(depot) == LIMIT
    begun = list(map(int, depot.side.lrange("begun:scarce", 0, -1)))
    overtaken = sum(later <= earlier - LIMIT for earlier, later in pairwise(begun))
    assert overtaken <= 2 * LIMIT, "in order, but for those that arrive just when a slot is free: none is kept"
    assert sorted(begun) == list(range(16)), "each once"


@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_the_limits_hold_when_workers_are_killed_and_all_tasks_finish(depot: Depot) -> None:
    restored_soon = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    depot.env["DEPOT_CONF"] = json.dumps({"broker_transport_options": restored_soon})
    workers = [start(depot, concurrency=3) for _ in range(3)]
    shares = [f"shared_out by {worker.pid}" for worker in workers]
    client = depot.client()

    def each_has_served() -> bool:
        client.send_task("serve", (0,))
        return depot.side.exists(*(f"seen in flight:{share}" for share in shares)) == len(shares)

    wait_until(each_has_served, timeout=TIMEOUT, what="each worker to serve")
    results = [client.send_task(name, (order,)) for order in range(30) for name in ("occupy", "serve")]
    for at, victim in ((5, workers[0]), (15, workers[1])):
        wait_until(partial(has_begun, depot, at), timeout=TIMEOUT, what="work to go on")
        kill(depot, victim)
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    assert most_in_flight(depot) == LIMIT
    assert [most_in_flight(depot, share) for share in shares] == [1, 1, 1], "each worker keeps a limit of its own"


def has_begun(depot: Depot, count: int) -> bool:
    return depot.side.llen("begun:scarce") >= count
