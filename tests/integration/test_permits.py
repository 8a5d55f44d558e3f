"""Processes that hold permits are killed at random: trials never exceed the limit, and HALF_OPEN always ends."""

from __future__ import annotations

import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest

from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Spec
from resilient_tasks.store.redis import RedisStore
from resilient_tasks.store.reporter import LEASE
from tests.integration import trials
from tests.integration.conftest import Shop
from tests.integration.test_faults import soon_restored
from tests.integration.trials import NAMES, TRIAL_CALLS, Service
from tests.support import forks
from workers.processes import Worker

SEED = int(os.environ.get("PERMITS_SEED") or random.randrange(1_000_000))
PROCESSES, KILLS = 16, 24
TICK, SLACK = 1.0, 30.0  # seconds; a tick is late on a machine that has much to do
SPECS = [Spec(name, trials.POLICY) for name in NAMES]


class Herd:
    """Processes that make trials, and lose their lives."""

    def __init__(self, shop: Shop, address: str, choices: random.Random) -> None:
        self._context = forks.CONTEXT
        self._arguments = shop.server.url(), address
        self._choices = choices
        self._alive: list[Any] = []

    def join(self) -> None:
        """Start one more process."""
        args = (*self._arguments, self._choices.randrange(1_000_000))
        process = self._context.Process(target=trials.call_all_the_time, args=args, daemon=True)
        process.start()
        self._alive.append(process)

    def kill_one_of(self, process_ids: list[int]) -> bool:
        """Kill one of these processes; False if there are none."""
        candidates = [process for process in self._alive if process.pid in process_ids]
        if not candidates:
            return False
        victim = self._choices.choice(candidates)
        self._alive.remove(victim)
        victim.kill()
        victim.join()
        return True

    def kill_all(self) -> None:
        """Kill those that are left."""
        for process in self._alive:
            process.kill()
        for process in self._alive:
            process.join()


class Chronicle:
    """Writes down every transition of every breaker."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._changes: dict[str, dict[int, Snapshot]] = defaultdict(dict)  # name -> epoch -> its first snapshot
        self._done = threading.Event()

    @contextmanager
    def kept(self) -> Iterator[Chronicle]:
        """Write until the end of the block."""
        with running(self._listen, self._done):
            yield self

    def _listen(self) -> None:
        for snapshot in self._store.changes(timeout=0.2):
            if snapshot is not None:
                self._changes[snapshot.name].setdefault(snapshot.epoch, snapshot)
            if self._done.is_set():
                return

    def half_open_times(self) -> list[float]:
        """How long each HALF_OPEN has lasted, seconds on the store's clock."""
        return [
            after.since - before.since
            for changes in list(self._changes.values())
            for before, after in pairwise(changes[epoch] for epoch in sorted(changes))
            if before.state is State.HALF_OPEN
        ]


@contextmanager
def ticking(store: RedisStore) -> Iterator[None]:
    """Let the breakers move on once per tick, as workers do."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(TICK):
            for spec in SPECS:
                with suppress(StoreError):  # it did not answer in time: the next tick asks again
                    store.advance(spec)

    with running(tick, done):
        yield


@contextmanager
def running(target: Callable[[], None], done: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def choices() -> random.Random:
    print(f"again with the same choices: PERMITS_SEED={SEED}")
    return random.Random(SEED)


def test_sixteen_processes_killed_at_random_never_exceed_the_permits(shop: Shop, choices: random.Random) -> None:
    service, store = Service(choices, healthy=0.8), RedisStore(shop.server.url(), namespace="permits", timeout=20.0)
    with service.open() as address, Chronicle(store).kept() as chronicle, ticking(store):
        herd = Herd(shop, address, choices)
        for _ in range(PROCESSES):
            herd.join()
        for _ in range(KILLS):
            shop.wait(lambda: herd.kill_one_of(service.visitors()), "a trial in flight")
            herd.join()  # a fresh one takes part at once
        ends = len(chronicle.half_open_times())
        shop.wait(lambda: len(chronicle.half_open_times()) >= ends + len(NAMES), "the breakers to go on")
        herd.kill_all()
    assert 1 < max(service.most.values()) <= TRIAL_CALLS
    assert max(chronicle.half_open_times()) <= LEASE + SLACK


def test_workers_killed_at_random_never_exceed_the_permits(shop: Shop, choices: random.Random) -> None:
    service, store = Service(choices, healthy=0.0), RedisStore(shop.server.url(), namespace="resilient", timeout=20.0)
    with service.open() as address, Chronicle(store).kept() as chronicle:
        shop.side.set("service", address)
        shop.knocked.trip()
        for order in range(20):
            shop.knock.delay(order)
        workers = [shop.worker(env=soon_restored(2), pool=pool, concurrency=4) for pool in ("prefork", "threads")]
        for _ in range(2):
            shop.wait(lambda: kill_one_that_makes_a_trial(workers, service, choices), "a trial in flight")
            workers.append(shop.worker(env=soon_restored(2), pool="threads", concurrency=4))
        ends = len(chronicle.half_open_times())
        shop.wait(lambda: len(chronicle.half_open_times()) > ends + 1, "the breaker to go on")
        most = service.most["knocked"]
        service.healthy = 1.0
        # not all 20: kombu fetches with BRPOP, and what a worker is just fetching when it is killed dies with it
        shop.wait(lambda: shop.knocked.snapshot().state is State.CLOSED, "the breaker to close")
        shop.wait(lambda: shop.waiting("knocked") == 0, "all that wait to be resumed")
    assert 1 <= most <= TRIAL_CALLS
    assert max(chronicle.half_open_times()) <= LEASE + SLACK


def kill_one_that_makes_a_trial(workers: list[Worker], service: Service, choices: random.Random) -> bool:
    """Kill a worker with all its pool processes; False if no trial is in flight."""
    visitors = service.visitors()  # process groups, and a worker leads its own
    candidates = [worker for worker in workers if worker.pid in visitors and worker.running]
    if candidates:
        choices.choice(candidates).kill()
    return bool(candidates)
