"""How fast a worker defers refused tasks, and how fast a tick moves them back.

The breaker is isolated while its tasks are queued; the same worker also runs a task that does nothing, so
that the two speeds can be compared: a backlog of refused tasks should hold up others on its queue no longer than
if it ran.
"""

from __future__ import annotations

import time
from statistics import median
from types import SimpleNamespace
from typing import Any

from benchmarks._rig import Rig, State, in_each_setting
from resilient_tasks.core.pace import Pace
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.maintenance import Tick

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
    waiting, snapshot = bench.deferred(), breaker.snapshot()
    runtime.fleet.ledger.save_pace(breaker.name, Pace(waiting, snapshot.total_failures, 0, snapshot.now))
    worker: Any = SimpleNamespace(event_dispatcher=None, hostname="bench")
    tick = Tick(runtime, worker, wake=lambda: None)
    started = time.perf_counter()
    assert tick.run(), "another process held the lease"
    seconds = time.perf_counter() - started
    tick.close()
    assert (bench.deferred(), bench.broker.llen("celery")) == (0, waiting), "a task was lost or doubled"
    return waiting, seconds


def report(setting: str, runs: list[float], deferrals: list[float]) -> None:
    ratio = median(own / other for own, other in zip(deferrals, runs, strict=True))
    print(f"\n{ROUNDS} rounds of {TASKS} tasks, one worker, prefork with two processes; {setting}\n")
    print(f"runs of a task that does nothing {median(runs):8.0f} /s")
    print(f"deferrals                        {median(deferrals):8.0f} /s   {ratio:.2f} times as fast")


def compare(bench: Rig, setting: str) -> None:
    report(setting, *measure(bench))
    count, seconds = seconds_of_resuming(bench)
    print(f"one tick moved {count} waiting tasks back in {seconds:.2f} s: {count / seconds:.0f} /s")


def main() -> None:
    in_each_setting("benchmarks.deferring", compare)


if __name__ == "__main__":
    main()
