"""How long until the first waiting task finishes, once its dependency is healthy and the open time is over.

One worker and beat, a tick a second. The dependency fails, tasks are deferred, and it is healed while the breaker
has some open time left; so the time runs from the end of the open time. Found out by a probe, and by trials.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks._rig import TIMEOUT, Rig, State, rig, verdict, wait_until

ROUNDS = 10
TASKS = 20
LIMIT = 2.0  # tick intervals
TIME_LEFT = 0.3  # seconds of open time that have to be left at the healing


def one_recovery(bench: Rig, task: Any, breaker: Any) -> float:
    """Return the seconds from the end of the open time until the first task has finished."""
    project = bench.project
    bench.broker.delete(project.FINISHED)
    bench.broker.set(project.ILL, 1)
    for _ in range(TASKS):
        task.delay()
    wait_until(lambda: waiting(bench, breaker) == TASKS, timeout=TIMEOUT, what="all to wait")
    wait_until(lambda: time_left(breaker) > TIME_LEFT, timeout=TIMEOUT, what="an open breaker")
    bench.broker.delete(project.ILL)
    open_until = breaker.snapshot().open_until
    wait_until(lambda: bench.broker.llen(project.FINISHED) == TASKS, timeout=TIMEOUT, what="all to finish")
    return float(min(map(float, bench.broker.lrange(project.FINISHED, 0, -1))) - open_until)


def waiting(bench: Rig, breaker: Any) -> int:
    return int(bench.broker.llen(f"resilient.deferred.{breaker.name}"))


def time_left(breaker: Any) -> float:
    snapshot = breaker.snapshot()
    return float(snapshot.retry_after) if snapshot.state is State.OPEN else 0.0


def main() -> None:
    with rig() as bench:
        bench.worker()
        bench.beat()
        project = bench.project
        print("\nFrom the end of the open time until the first waiting task has finished, ticks of one second\n")
        for what, task, breaker in (
            ("found out by a probe", project.ship, project.probed),
            ("found out by trials", project.charge, project.recovering),
        ):
            times = [one_recovery(bench, task, breaker) for _ in range(ROUNDS)]
            figures = f"median {median(times):4.2f} s   longest {max(times):4.2f} s   of {ROUNDS}"
            print(f"{what:22}{figures}; <= {LIMIT:g} ticks: {verdict(met=max(times) <= LIMIT)}")


if __name__ == "__main__":
    main()
