"""What 10,000 children of one breaker cost: a tick, Redis, the memory of a process that has used them all, and others.

Others are guarded calls of another breaker, in a process that uses none of the children, while a second process opens
and closes one child after the other as fast as it can.

Each key is used once. ``active`` is a key of the last two minutes, ``idle`` one whose state has ended since; of both
the server keeps what was counted in the last minutes, and for a day in all.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import tempfile
import time
import tracemalloc
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import redis
from celery import Celery

from benchmarks._rig import verdict
from resilient_tasks import Breaker, Resilience
from resilient_tasks.core.model import State
from resilient_tasks.worker import maintenance as ticks
from resilient_tasks.worker.context import runtime_of
from workers.processes import Server, start_valkey

KEYS = 10_000
TICKS = 200
RECONCILE_INTERVAL = 0.1  # seconds, instead of ten: some of the ticks must reconcile
SLOWEST_TICK, MOST_PER_KEY, MOST_MEMORY = 0.010, 1024, 20e6  # seconds, bytes, bytes
PER_FLUSH = 500
CALLS, ROUNDS = 2_000, 20
IDLE = 5.0  # seconds
MOST_SLOWER = 1.1  # times as long


def use(breaker: Breaker, resilience: Resilience) -> None:
    """Make one good call with each key."""
    for number in range(KEYS):
        breaker.child(f"tenant-{number:05}").call(int)
        if number % PER_FLUSH == 0:
            resilience.fleet.reporter.flush(60)
    resilience.fleet.reporter.flush(60)


def memory_of_view(breaker: Breaker, resilience: Resilience) -> float:
    """Return the bytes that this process has come to hold by using all keys."""
    gc.collect()
    tracemalloc.start()
    use(breaker, resilience)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held


def bytes_per_key(client: redis.Redis) -> tuple[float, float]:
    """Return the bytes that the server holds per key: of an active one, and of an idle one."""
    active = idle = 0
    for key in client.scan_iter("resilient:*{tenants}:*", count=1000):
        size = int(client.memory_usage(key, samples=0) or 0)
        active += size
        idle += 0 if key.startswith(b"resilient:2:{tenants}:state:") else size
    return active / KEYS, idle / KEYS


def tick_times(app: Celery) -> list[float]:
    """Return how long each of many ticks takes while nothing is due; the first one, which connects, is left out."""
    ticks.RECONCILE_INTERVAL = RECONCILE_INTERVAL
    worker = SimpleNamespace(hostname="benchmark", event_dispatcher=None)
    tick, times = ticks.Tick(runtime_of(app), worker, wake=lambda: None), []
    tick.run()
    for _ in range(TICKS):
        began = time.perf_counter()
        tick.run()
        times.append(time.perf_counter() - began)
    tick.close()
    return times


def flap(url: str, begun: Event, ended: Event) -> None:
    """Open and close one child after the other, each for the time that all others take."""
    logging.getLogger("resilient_tasks").setLevel(logging.ERROR)  # each transition is worth a warning
    resilience = Resilience(store_url=url)
    tenants = resilience.breaker("tenants", ramp=0.0)
    while not ended.is_set():
        for number in range(KEYS):
            child = tenants.child(f"tenant-{number:05}")
            child.reset() if child.state is State.FORCED_OPEN else child.isolate()
            begun.set()
            if ended.is_set():
                break
    resilience.fleet.close()


def call_times(breaker: Breaker) -> list[float]:
    """Return the seconds that each of many calls takes, some at a time."""
    times = []
    for _ in range(ROUNDS):
        for _ in range(CALLS // ROUNDS):
            began = time.perf_counter()
            breaker.call(int)
            times.append(time.perf_counter() - began)
        time.sleep(IDLE / ROUNDS)
    return times


def measure_others(server: Server) -> None:
    resilience = Resilience(store_url=server.url(1))
    resilience.breaker("tenants", ramp=0.0)
    other = resilience.breaker("payments")
    alone = call_times(other)
    context = multiprocessing.get_context("spawn")
    begun, ended = context.Event(), context.Event()
    flapping = context.Process(target=flap, args=(server.url(1), begun, ended))
    flapping.start()
    begun.wait()
    used = time.process_time()
    beside = call_times(other)
    share = (time.process_time() - used) / IDLE
    ended.set()
    flapping.join()
    slower = median(beside) / median(alone)
    report("a call beside flapping children, its median", slower, "times", met=slower <= MOST_SLOWER)
    report("the same, 99th of 100", quantiles(beside, n=100)[-1] / quantiles(alone, n=100)[-1], "times", met=None)
    report("processor time of that process", 100 * share, "%", met=None)
    resilience.fleet.close()


def measure(server: Server) -> None:
    app = Celery("benchmark", broker=server.url(0), set_as_current=False)
    resilience = Resilience(app, store_url=server.url(1))
    tenants = resilience.breaker("tenants", ramp=0.0)
    tenants.call(int)
    held = memory_of_view(tenants, resilience)
    active, idle = bytes_per_key(redis.Redis.from_url(server.url(1)))
    times = tick_times(app)
    report(f"a tick, median of {TICKS}", median(times) * 1e3, "ms", met=median(times) <= SLOWEST_TICK)
    report("a tick, the slowest, with reconciling", max(times) * 1e3, "ms", met=max(times) <= SLOWEST_TICK)
    report("Redis, per idle key", idle, "bytes", met=idle <= MOST_PER_KEY)
    report("Redis, per active key", active, "bytes", met=None)
    report("memory of a process that has used all keys", held / 1e6, "MB", met=held <= MOST_MEMORY)
    resilience.fleet.close()


def report(what: str, figure: float, unit: str, *, met: bool | None) -> None:
    print(f"{what:45}{figure:10.2f} {unit:6}", "" if met is None else verdict(met=met))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        try:
            print(f"{KEYS} keys of one breaker\n")
            measure(server)
            measure_others(server)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
