"""What healthy tasks notice of a dependency that hangs, on the one worker that they share with its tasks.

Two rounds with the same healthy tasks: first without the others, then with as many that hang until their time limit,
in turn with them. The breaker opens as soon as the first calls are overdue, ``max_concurrency_per_worker`` leaves
half of the pool to the healthy ones until then, and each later trial costs one pool process for its time limit.
"""

from __future__ import annotations

import time

from benchmarks._rig import QUEUE, Rig, rig, verdict, wait_until

CONCURRENCY = 4
TASKS = 3000
TARGET = 0.9
PATIENCE = 300.0  # seconds


def healthy_rate(bench: Rig, *, with_hanging: bool) -> float:
    """Return how many healthy tasks finish per second while as many others hang, or while there are none."""
    project, side = bench.project, bench.broker
    for _ in range(TASKS):
        if with_hanging:
            project.hang.delay()
        project.work.delay()
    side.rename(QUEUE, "prepared")
    side.delete(project.FINISHED)
    worker = bench.worker(concurrency=CONCURRENCY)
    started = time.time()
    side.rename("prepared", QUEUE)
    wait_until(lambda: side.llen(project.FINISHED) == TASKS, timeout=PATIENCE, what="the healthy ones to finish")
    last = max(map(float, side.lrange(project.FINISHED, 0, -1)))
    worker.kill()
    bench.stop_workers()
    return float(TASKS / (last - started))


def main() -> None:
    with rig() as bench:
        alone = healthy_rate(bench, with_hanging=False)
        beside = healthy_rate(bench, with_hanging=True)
        transitions = bench.project.resilience.fleet.history.transitions("sick")
        opened = [told.reason for told in transitions if told.state == "OPEN"]
    print(f"\n{TASKS} healthy tasks of {bench.project.WORKS:g} s on a worker with {CONCURRENCY} pool processes")
    print(f"alone: {alone:.1f} per second; beside {TASKS} that hang: {beside:.1f} per second")
    print(f"ratio {beside / alone:.2f}, target {TARGET:g}: {verdict(met=beside / alone >= TARGET)}")
    print(f"the breaker opened: {', '.join(opened) or 'never'}")


if __name__ == "__main__":
    main()
