"""What the other tasks of two workers notice of dependencies that hang, and what the protection costs a healthy burst.

Half of 60 tasks a second call a dependency, the others are healthy. After a while its calls begin to hang. Shown are
the healthy tasks' rate over the first 12 s against that before, and how long the breaker takes to open, under the
README's policy with ``slow_call_duration=1``. Then bursts of guarded tasks through one worker: with compensation and
without, and with ``max_concurrency_per_worker`` one less than its slots against that share of the unlimited rate.

``python -m benchmarks.hanging [isolation] [bursts]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import cycle
from statistics import median

from benchmarks._rig import QUEUE, Rig, State, rig, verdict, wait_until

RATE = 60  # tasks per second, half of them healthy
BEFORE, DURING = 10.0, 12.0  # seconds
WORKERS = 2
BURST = 2000  # tasks
ROUNDS = 5
TIMEOUT = 120.0  # seconds
CASES = [
    (pool, concurrency, hang, dependencies)
    for pool in ("prefork", "threads")
    for concurrency in (2, 4)
    for hang in (2.0, 30.0)
    for dependencies in (("sick",), ("sick", "ailing"))
]


def send(bench: Rig, dependencies: Sequence[str], seconds: float) -> tuple[float, float]:
    """Send tasks for a while; return when it began and when the breaker opened, seconds since 1970."""
    project = bench.project
    calls = cycle({"sick": project.ask_sick, "ailing": project.ask_ailing}[name] for name in dependencies)
    started, opened = time.time(), 0.0
    for turn in range(int(seconds * RATE)):
        (project.work if turn % 2 else next(calls)).delay()
        if not opened and project.sick.state is State.OPEN:
            opened = time.time()
        time.sleep(max(0.0, started + turn / RATE - time.time()))
    return started, opened


def isolation(bench: Rig, pool: str, concurrency: int, hang: float, dependencies: tuple[str, ...]) -> None:
    """Measure one case and print a line."""
    project, side = bench.project, bench.broker
    for database in (side, bench.results, bench.store):
        database.flushdb()
    project.resilience.fleet.view.refresh()
    for _ in range(WORKERS):
        bench.worker(concurrency=concurrency, pool=pool)
    began, _ = send(bench, dependencies, BEFORE)
    for dependency in dependencies:
        side.set(project.HANGS_FOR + dependency, hang)
    hung, opened = send(bench, dependencies, DURING)
    finished = [float(at) for at in side.lrange(project.FINISHED, 0, -1)]
    before = min(sum(began + 2 <= at < hung for at in finished) / (BEFORE - 2), RATE / 2)  # more: it catches up
    during = sum(hung <= at < hung + DURING for at in finished) / DURING
    ratio, target = during / before, 0.95 if len(dependencies) == 1 else 0.9
    in_time = bool(opened) and opened - hung <= 6
    print(
        f"{pool:8} -c {concurrency}  {hang:4g} s  {len(dependencies)} hang{'s' if len(dependencies) == 1 else ' '}"
        f"  healthy {during:5.1f}/s of {before:5.1f}/s = {ratio:.2f} ({verdict(met=ratio >= target)} {target:g})"
        f"  OPEN after {f'{opened - hung:.1f} s' if opened else 'never'} ({verdict(met=in_time)} 6 s)",
        flush=True,
    )
    bench.stop_workers(at_once=True)


def burst(bench: Rig, concurrency: int, env: dict[str, str]) -> float:
    """Return how many guarded tasks per second one worker runs."""
    for database in (bench.broker, bench.results, bench.store):
        database.flushdb()
    for _ in range(BURST):
        bench.project.ask_sick.delay()
    bench.broker.rename(QUEUE, "prepared")
    bench.worker(concurrency=concurrency, env=env)
    started = time.perf_counter()
    bench.broker.rename("prepared", QUEUE)
    deferred = "resilient.deferred.sick"
    wait_until(
        lambda: not (bench.broker.llen(QUEUE) or bench.broker.hlen("unacked") or bench.broker.llen(deferred)),
        timeout=TIMEOUT,
        what="the burst to end",
    )
    seconds = time.perf_counter() - started
    bench.stop_workers(at_once=True)
    return BURST / seconds


def bursts(bench: Rig) -> None:
    """Compare bursts and print the ratios."""
    for concurrency in (2, 4):
        settings = {
            "off": {"RESILIENT_TASKS_SPARE_SLOTS": "0", "RESILIENT_TASKS_LATE_AFTER": "3600"},
            "on": {},
            "limited": {"BENCH_PER_WORKER": str(concurrency - 1)},
        }
        rates: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(ROUNDS):
            for name, env in settings.items():
                rates[name].append(burst(bench, concurrency, env))
        on = median(on / off for on, off in zip(rates["on"], rates["off"], strict=True))
        share = (concurrency - 1) / concurrency
        limited = median(one / (free * share) for one, free in zip(rates["limited"], rates["on"], strict=True))
        print(
            f"burst of {BURST}, -c {concurrency}: {median(rates['on']):.0f}/s with compensation,"
            f" {on:.3f} of {median(rates['off']):.0f}/s without ({verdict(met=on >= 0.99)} 0.99);"
            f" max_concurrency_per_worker={concurrency - 1}: {median(rates['limited']):.0f}/s,"
            f" {limited:.2f} of {share:g} of it ({verdict(met=limited >= 0.85)} 0.85)",
            flush=True,
        )


def main() -> None:
    wanted = sys.argv[1:]
    with rig() as bench:
        if "isolation" in wanted or not wanted:
            for case in CASES:
                isolation(bench, *case)
        if "bursts" in wanted or not wanted:
            bursts(bench)


if __name__ == "__main__":
    main()
