"""How fast a worker puts refused tasks aside, and how fast a tick moves them back.

The breaker is isolated while its tasks are queued; the same worker also runs a task that does nothing, so
that the two speeds can be compared. Deferring must be the faster one, or a backlog of refused tasks would
hold up the others on the same queue.
"""

from __future__ import annotations

import time
from statistics import median
from types import SimpleNamespace
from typing import Any

from benchmarks._rig import PATIENCE, Rig, State, rig, verdict, wait_until
from resilient_tasks.core.pace import Pace
from resilient_tasks.worker.resume import Resumer
from resilient_tasks.worker.runtime import runtime_of

TASKS = 2_000
ROUNDS = 3


def measure(bench: Rig) -> tuple[list[float], list[float]]:
    """Return runs per second and deferrals per second, of alternating rounds."""
    plain, guarded = (bench.template(task, TASKS) for task in (bench.project.plain, bench.project.guarded))
    worker = bench.worker()
    bench.set_state(State.FORCED_OPEN)
    runs, deferrals = [], []
    for number in range(1, ROUNDS + 1):
        runs.append(TASKS / bench.go(plain, worker).seconds)
        deferrals.append(TASKS / bench.go(guarded, worker).seconds)
        assert bench.deferred() == number * TASKS, "a task was lost or doubled"
    return runs, deferrals


def seconds_of_resuming(bench: Rig) -> tuple[int, float]:
    """Return how many tasks one tick resumes when its pace allows for all, and how long that takes."""
    bench.stop_workers()
    bench.set_state(State.CLOSED)
    breaker, runtime = bench.project.payments, runtime_of(bench.project.app)
    store = runtime.fleet.store
    waiting, snapshot = bench.deferred(), breaker.snapshot()
    store.save_pace(breaker.name, Pace(waiting, snapshot.total_failures, 0, snapshot.now))
    worker: Any = SimpleNamespace(event_dispatcher=None, hostname="bench")
    resumer = Resumer(runtime, worker)
    started = time.perf_counter()
    resumer.resume(breaker, snapshot)
    seconds = time.perf_counter() - started
    resumer.close()
    assert bench.deferred() == 0 and bench.broker.llen("celery") == waiting, "a task was lost or doubled"
    return waiting, seconds


def report(setting: str, runs: list[float], deferrals: list[float]) -> None:
    ratio = median(own / other for own, other in zip(deferrals, runs, strict=True))
    print(f"\n{ROUNDS} rounds of {TASKS} tasks, one worker, prefork with two processes; {setting}\n")
    print(f"runs of a task that does nothing {median(runs):8.0f} /s")
    print(f"deferrals                        {median(deferrals):8.0f} /s   {ratio:.2f} times as fast")
    print(f"target: faster than runs: {verdict(met=ratio > 1)}")


def main() -> None:
    with rig(BENCH_USUAL="1") as bench:
        report("results, events and log lines on", *measure(bench))
        wait_until(lambda: not bench.broker.hlen("unacked"), timeout=PATIENCE, what="the worker to be idle")
        count, seconds = seconds_of_resuming(bench)
        print(f"\none tick moved {count} waiting tasks back in {seconds:.2f} s: {count / seconds:.0f} /s")


if __name__ == "__main__":
    main()
