"""What 10,000 children of one breaker cost: a tick, Redis, and the memory of a process that has met them all.

Each key is used once. ``active`` is a key of the last two minutes, ``idle`` one whose state has ended since; of both
the server keeps what was counted in the last minutes, and for a day in all.
"""

from __future__ import annotations

import gc
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import redis
from celery import Celery

from benchmarks._rig import verdict
from resilient_tasks import Breaker, Resilience
from resilient_tasks.worker import maintenance as ticks
from resilient_tasks.worker.context import runtime_of
from workers.processes import Server, start_valkey

KEYS = 10_000
TICKS = 200
RECONCILE_INTERVAL = 0.1  # seconds, instead of ten: some of the ticks must take stock
SLOWEST_TICK, MOST_PER_KEY, MOST_MEMORY = 0.010, 1024, 20e6  # seconds, bytes, bytes
PER_FLUSH = 500


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
    for key in client.scan_iter("resilient:{tenants}:*", count=1000):
        size = int(client.memory_usage(key, samples=0) or 0)
        active += size
        idle += 0 if key.startswith((b"resilient:{tenants}:state:", b"resilient:{tenants}:window:")) else size
    return active / KEYS, idle / KEYS


def tick_times(app: Celery) -> list[float]:
    """Return the seconds that each of many ticks takes while nothing is due; the first one, which connects, aside."""
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


def measure(server: Server) -> None:
    app = Celery("benchmark", broker=server.url(0), set_as_current=False)
    resilience = Resilience(app, store_url=server.url(1))
    tenants = resilience.breaker("tenants", ramp=0.0)
    tenants.call(int)
    held = memory_of_view(tenants, resilience)
    active, idle = bytes_per_key(redis.Redis.from_url(server.url(1)))
    times = tick_times(app)
    report(f"a tick, median of {TICKS}", median(times) * 1e3, "ms", met=median(times) <= SLOWEST_TICK)
    report("a tick, the slowest, with stocktaking", max(times) * 1e3, "ms", met=max(times) <= SLOWEST_TICK)
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
        finally:
            server.stop()


if __name__ == "__main__":
    main()
