"""How much longer guarded calls take while the store refuses connections, or hangs.

One process makes a call a millisecond, one in a hundred fails; the store goes away in mid-run, or before the process
first used it. The delay is the mean over all calls, so what a few of them wait is spread over the
others, and the longest wait is shown beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean

from benchmarks._rig import verdict
from resilient_tasks.breaker import Breaker
from resilient_tasks.dependency import Fleet
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.redis import RedisStore
from workers.processes import Server, start_valkey

CALLS = 10_000
PAUSE = 0.001  # seconds between two calls
FAILING = 100  # of so many calls, one fails
TOLERANT = BreakerPolicy(failure_rate_threshold=1.0)
TARGETS = {"refused": 1.0, "frozen": 5.0}  # ms


class Run:
    """A store, and a process that guards its calls with it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.fleet = Fleet(RedisStore(server.url(), namespace="bench"))
        self.breaker = Breaker("payments", TOLERANT, fleet=lambda: self.fleet)

    def delays(self) -> list[float]:
        """Make the calls and return what the guard took of each, in milliseconds."""
        delays = []
        for number in range(CALLS):
            started = time.perf_counter()
            with suppress(ConnectionError):
                self.breaker.call(fail if number % FAILING == 0 else succeed)
            delays.append((time.perf_counter() - started) * 1000)
            time.sleep(PAUSE)
        return delays


def succeed() -> None:
    """Be a call that costs nothing, so that only the guard is measured."""


def fail() -> None:
    raise ConnectionError


@contextmanager
def a_run() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as directory:
        run = Run(start_valkey(Path(directory)))
        try:
            yield run
        finally:
            run.server.program.kill()
            run.fleet.close()


def stays(_: Server) -> None:
    """Leave the store alone."""


def refuse(server: Server) -> None:
    server.program.kill()


def freeze(server: Server) -> None:
    server.program.freeze()


def measure(go_away: Callable[[Server], None], *, used_before: bool) -> list[float]:
    with a_run() as run:
        if used_before:
            run.breaker.call(succeed)
        go_away(run.server)
        return run.delays()


def main() -> None:
    present = mean(measure(stays, used_before=True))
    print(f"\n{CALLS:,} guarded calls, one in {FAILING} fails; the store answers: {present:.3f} ms per call\n")
    print(f"{'':46}{'added':>10}{'longest':>12}")
    for name, go_away in {"refused": refuse, "frozen": freeze}.items():
        for used_before in (True, False):
            delays = measure(go_away, used_before=used_before)
            added = mean(delays) - present
            since = "in mid-run" if used_before else "before its first use"
            met = verdict(met=added <= TARGETS[name])
            print(f"store {name + ', ' + since:40}{added:7.3f} ms{max(delays):9.1f} ms   {TARGETS[name]:.0f} ms: {met}")


if __name__ == "__main__":
    main()
