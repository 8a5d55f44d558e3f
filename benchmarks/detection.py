"""How soon an outage is noticed, how often noise opens a breaker, and what a report costs the server.

``python -m benchmarks.detection [seconds]``: so long everything goes well before the service fails, 60 by default. The
policy is the README's: threshold 0.5, ``minimum_calls=10``, ``window=30``. Ends with 1 if a figure is missed.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import redis

from resilient_tasks import BreakerOpenError, Resilience
from resilient_tasks.core.model import Calls, Outcome, State, Verb
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.local import LocalStore
from resilient_tasks.store.redis import RedisStore
from workers.processes import Server, start_valkey

POLICY: dict[str, Any] = {"failure_rate_threshold": 0.5, "minimum_calls": 10, "window": 30}
SPEC = Spec("payments", BreakerPolicy(**POLICY, slow_call_duration=1.0))
FLEET = 12
ROUNDS, REPORTS = 20, 250
Figure = tuple[str, float, float]  # what, measured, at most


# --- noise, in memory -----------------------------------------------------------------------------------


def stream(seed: int, share: float) -> Iterator[Outcome]:
    """Yield outcomes of which a share are failures."""
    chance = random.Random(seed)
    while True:
        yield Outcome.FAILURE if chance.random() < share else Outcome.SUCCESS


def record(store: LocalStore, outcomes: list[Outcome]) -> State:
    runs = tuple(Calls(outcome, len(list(group))) for outcome, group in groupby(outcomes))
    return store.record(SPEC, Evidence(store.read([SPEC])[0].epoch, runs)).snapshot.state


def calls_until_open(seed: int, share: float, healthy: int) -> int:
    store, outcomes = LocalStore(lambda: 1e6), stream(seed, share)
    record(store, [Outcome.SUCCESS] * healthy)
    count = 1
    while record(store, [next(outcomes)]) is State.CLOSED:
        count += 1
    return count


def false_openings(share: float, calls: int) -> int:
    now = [1e6]
    store, outcomes, openings = LocalStore(lambda: now[0]), stream(1, share), 0
    for _ in range(calls // 100):
        now[0] += 0.1
        if record(store, [next(outcomes) for _ in range(100)]) is not State.CLOSED:
            openings += 1
            store.command(SPEC, Verb.RESET)
    return openings


def noise() -> list[Figure]:
    at_80 = sorted(calls_until_open(seed, 0.8, 3000) for seed in range(100))
    return [
        ("calls until OPEN, 80 % fail, 95th of 100 seeds", at_80[94], 40),
        ("false openings, 20 % fail, 1,000,000 calls", false_openings(0.2, 1_000_000), 3),
        ("false openings, 30 % fail, 100,000 calls", false_openings(0.3, 100_000), 12),
    ]


# --- a service that fails wholly, called by real processes ---------------------------------------------------


def call(url: str, rate: float, down: Event, reached: Any, is_over: Event) -> None:
    """Call the service at a steady rate until the breaker refuses."""
    payments = Resilience(store_url=url, namespace=f"detection{rate}").breaker("payments", **POLICY)

    def service() -> None:
        if down.is_set():
            with reached.get_lock():
                reached.value += 1
            raise ConnectionError("500")

    next_at = time.monotonic() + random.random() / rate
    while not is_over.is_set():
        time.sleep(max(0.0, next_at - time.monotonic()))
        next_at += 1 / rate
        try:
            payments.call(service)
        except ConnectionError:
            pass
        except BreakerOpenError:
            return


def calls_that_reach_it(server: Server, processes: int, rate: float, healthy: float) -> int:
    """Return how many calls reach the service after it has begun to fail."""
    forking = multiprocessing.get_context("spawn")
    down, is_over, reached = forking.Event(), forking.Event(), forking.Value("i", 0)
    arguments = (server.url(), rate / processes, down, reached, is_over)
    callers = [forking.Process(target=call, args=arguments, daemon=True) for _ in range(processes)]
    for caller in callers:
        caller.start()
    time.sleep(healthy)
    down.set()
    for caller in callers:
        caller.join(max(60.0, 20 * processes / rate))
    is_over.set()
    return int(reached.value)


def outages(server: Server, healthy: float) -> Iterator[Figure]:
    for processes in (1, FLEET):
        for rate in (1.0, 50.0, 1000.0):
            reached = calls_that_reach_it(server, processes, rate, healthy)
            what = f"calls that reach a dead service, {rate:g}/s, {processes} process{'es' if processes > 1 else ''}"
            yield what, reached, POLICY["minimum_calls"] + processes


# --- what a report costs --------------------------------------------------------------------------------------


def cost_of_reports(server: Server) -> Figure:
    """Return the server's time per report: five successes, a failure and five successes."""
    store = RedisStore(server.url(), namespace="cost")
    store.command(SPEC, Verb.SHADOW)
    epoch = store.read([SPEC])[0].epoch
    good, bad = Calls(Outcome.SUCCESS, 5), Calls(Outcome.FAILURE, 1, "0a1b2c3d", each=True)
    client = redis.Redis.from_url(server.url())
    costs = []
    for _ in range(ROUNDS):
        client.config_resetstat()
        for _ in range(REPORTS):
            store.record(SPEC, Evidence(epoch, (good, bad, good)))
        stats: Any = client.info("commandstats")
        costs.append(stats["cmdstat_evalsha"]["usec_per_call"])
    return f"server's time per report, us, best of {ROUNDS} rounds", min(costs), 80


def main() -> int:
    """Measure, print, and return 1 if a figure is missed."""
    healthy = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    server = start_valkey(Path(tempfile.mkdtemp()))
    missed = False
    try:
        for what, measured, most in (*noise(), cost_of_reports(server), *outages(server, healthy)):
            missed |= measured > most
            print(f"{what:<60}{measured:>8g}   at most {most:g}{'   MISSED' if measured > most else ''}", flush=True)
    finally:
        server.stop()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
