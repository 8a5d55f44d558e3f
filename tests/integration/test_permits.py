"""Processes that hold permits are killed at random: trials never exceed the limit, and HALF_OPEN always ends."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.store.base import Spec
from resilient_tasks.store.redis import RedisStore
from resilient_tasks.store.reports import LEASE
from tests.integration import trials
from tests.integration.conftest import Shop
from tests.integration.trials import NAMES, TRIAL_CALLS, Service

SEED = int(os.environ.get("PERMITS_SEED") or random.randrange(1_000_000))
PROCESSES, KILLS = 16, 24
TICK = 1.0  # seconds
SPECS = [Spec(name, trials.POLICY) for name in NAMES]


class Herd:
    """Processes that make trials, and lose their lives."""

    def __init__(self, shop: Shop, address: str, choices: random.Random) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.integration.trials"])
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
    """Ticks, as a worker does, and writes down every transition of every breaker."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._told: dict[str, dict[int, Snapshot]] = {name: {} for name in NAMES}  # by epoch
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._tick, self._listen)]

    @contextmanager
    def kept(self) -> Iterator[Chronicle]:
        for thread in self._threads:
            thread.start()
        yield self
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _tick(self) -> None:
        while not self._stopping.wait(TICK):
            for spec in SPECS:
                self._store.advance(spec)

    def _listen(self) -> None:
        for snapshot in self._store.changes(timeout=0.2):
            if snapshot is not None:
                self._told[snapshot.name].setdefault(snapshot.epoch, snapshot)
            if self._stopping.is_set():
                return

    def half_open_times(self) -> list[float]:
        """How long each HALF_OPEN has lasted, seconds on the store's clock."""
        return [
            after.since - before.since
            for told in self._told.values()
            for before, after in pairwise(told[epoch] for epoch in sorted(told))
            if before.state is State.HALF_OPEN and after.epoch == before.epoch + 1
        ]


@pytest.fixture
def choices() -> random.Random:
    print(f"again with the same choices: PERMITS_SEED={SEED}")
    return random.Random(SEED)


def test_sixteen_processes_killed_at_random_never_exceed_the_permits(shop: Shop, choices: random.Random) -> None:
    service, store = Service(choices, healthy=0.8), RedisStore(shop.server.url(), namespace="permits")
    with service.open() as address, Chronicle(store).kept() as chronicle:
        herd = Herd(shop, address, choices)
        for _ in range(PROCESSES):
            herd.join()
        for _ in range(KILLS):
            shop.wait(lambda: herd.kill_one_of(service.visitors()), "a trial in flight")
            herd.join()  # a fresh one takes part at once
        ends = len(chronicle.half_open_times())
        shop.wait(lambda: len(chronicle.half_open_times()) >= ends + len(NAMES), "the breakers to go on")
        herd.kill_all()
    times = chronicle.half_open_times()
    print(f"{len(times)} HALF_OPENs, the longest {max(times):.2f} s; most trials at once: {dict(service.most)}")
    assert max(service.most.values()) == TRIAL_CALLS
    assert max(times) <= LEASE + 2 * TICK
