"""What a guard costs while the breaker is CLOSED, beside the bare call and other breakers.

Three questions: how long one guarded call takes, how many commands 1,000 of them send to the server, and
whether four threads still run side by side. Everything compared runs in this one process, interleaved;
figures are medians, and a ratio is the median of the ratios of single rounds, so that a busy machine slows
both sides alike.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import circuitbreaker
import pybreaker
import redis

from resilient_tasks.breaker import Breaker
from resilient_tasks.dependency import Fleet
from resilient_tasks.store.redis import RedisStore
from workers.processes import start_valkey

ROUNDS = 31
CALLS = 4_000  # per round and contestant
REDIS_CALLS = 60  # the same for a breaker that talks to the server in each call
THREADS = 4
THREAD_CALLS = 40  # per thread and round
WORK = 0.005  # seconds that a call of the thread test takes

Contestants = dict[str, Callable[[], Any]]


def work() -> None:
    """Be a call that costs nothing, so that only the guard is measured."""


def slow_work() -> None:
    time.sleep(WORK)


def ours(breaker: Breaker, fn: Callable[[], Any]) -> Contestants:
    def with_guard() -> Any:
        with breaker.guard():
            return fn()

    return {
        "breaker.call(fn)": lambda: breaker.call(fn),
        "@breaker": breaker(fn),
        "with breaker.guard()": with_guard,
    }


def rivals(fn: Callable[[], Any]) -> Contestants:
    in_memory = pybreaker.CircuitBreaker()
    return {
        "circuitbreaker, in memory": circuitbreaker.circuit(fn),
        "pybreaker, in memory": lambda: in_memory.call(fn),
    }


def rival_on_redis(client: redis.Redis, fn: Callable[[], Any]) -> Callable[[], Any]:
    storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, client)
    shared = pybreaker.CircuitBreaker(state_storage=storage)
    return lambda: shared.call(fn)


# --- one call -----------------------------------------------------------------------------------------


def seconds_per_call(call: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def compare_latency(contestants: Contestants, on_redis: str) -> None:
    """Time each contestant in turn, round after round, the bare call among them."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            taken[name].append(seconds_per_call(call, REDIS_CALLS if name == on_redis else CALLS))
    over_bare = {
        name: median(own - bare for own, bare in zip(times, taken["bare call"], strict=True))
        for name, times in taken.items()
    }
    reference = taken["pybreaker, in memory"]
    print(f"\nOne guarded call that does nothing (median of {ROUNDS} rounds)\n")
    print(f"{'':28}{'a call':>12}{'over bare':>12}   compared with pybreaker in memory")
    for name, times in taken.items():
        ratio = median(own / other for own, other in zip(times, reference, strict=True))
        print(f"{name:28}{median(times) * 1e6:9.2f} µs{over_bare[name] * 1e6:9.2f} µs   {ratio:8.2f} x")


# --- commands -----------------------------------------------------------------------------------------


def commands_of(client: redis.Redis, job: Callable[[], None]) -> tuple[int, int]:
    """Return how many requests ``job`` sent to the server, and how many commands ran, those inside scripts included."""
    client.config_resetstat()
    job()
    stats = client.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}
    calls = {name: count for name, count in calls.items() if not name.startswith(("config", "info", "client"))}
    total, scripts = sum(calls.values()), sum(count for name, count in calls.items() if name.startswith("eval"))
    return scripts or total, total


def compare_commands(client: redis.Redis, fleet: Fleet, breaker: Breaker, rival: Callable[[], Any]) -> None:
    """Count requests; ``fleet`` has not been used before, so that its own polls are not counted as the rival's."""

    def ours_in_a_burst() -> None:
        for _ in range(1000):
            breaker.call(work)
        fleet.reporter.flush(5)

    def ours_in_a_second() -> None:
        for _ in range(1000):
            breaker.call(work)
            time.sleep(0.001)
        fleet.reporter.flush(5)

    def rival_in_a_burst() -> None:
        for _ in range(1000):
            rival()

    print("\nWhat 1,000 guarded successes make the server do\n")
    print(f"{'':44}{'requests':>10}{'commands':>10}")
    for name, job in {
        "pybreaker on Redis": rival_in_a_burst,
        "breaker.call, in a burst (first use)": ours_in_a_burst,
        "breaker.call, one a millisecond": ours_in_a_second,
    }.items():
        requests, commands = commands_of(client, job)
        print(f"{name:44}{requests:10}{commands:10}")
    print("\n(requests: round trips, our poll once or twice a second among them; commands: with those inside scripts)")


# --- threads ------------------------------------------------------------------------------------------


def calls_per_second(call: Callable[[], Any]) -> float:
    def run() -> None:
        for _ in range(THREAD_CALLS):
            call()

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return THREADS * THREAD_CALLS / (time.perf_counter() - started)


def compare_threads(contestants: Contestants, rounds: int = 5) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            speeds[name].append(calls_per_second(call))
    print(f"\n{THREADS} threads, calls of {WORK * 1000:.0f} ms (median of {rounds} rounds)\n")
    for name, own in speeds.items():
        ratio = median(mine / bare for mine, bare in zip(own, speeds["bare call"], strict=True))
        print(f"{name:28}{median(own):9.0f} calls/s   {ratio:6.3f} of the bare call")


@contextmanager
def membership() -> Iterator[tuple[redis.Redis, Fleet, Breaker]]:
    """Start a server and a fleet of one on it."""
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        fleet = Fleet(RedisStore(server.url(), namespace="bench"))
        try:
            with redis.Redis.from_url(server.url()) as client:
                yield client, fleet, Breaker("payments", fleet=lambda: fleet)
        finally:
            fleet.close()
            server.stop()


def main() -> None:
    on_redis = "pybreaker, on Redis"
    with membership() as (client, fleet, breaker):
        rival = rival_on_redis(client, work)
        compare_commands(client, fleet, breaker, rival)
        compare_latency({"bare call": work, **ours(breaker, work), **rivals(work), on_redis: rival}, on_redis)
        compare_threads({"bare call": slow_work, **ours(breaker, slow_work), **rivals(slow_work)})


if __name__ == "__main__":
    main()
