"""How long a backlog takes from CLOSED to its last task, against the same tasks queued plainly on the same worker.

300 tasks that take 5 ms each, then 20,000 that do nothing (``bare 200000``: so many). They are deferred once, and put
back with their index before each round. One worker with two pool processes, no beat; nothing fails.
"""

from __future__ import annotations

import sys
import time
from statistics import median

from benchmarks._rig import Rig, State, in_each_setting, verdict, wait_until

BACKLOG, FEW, ROUNDS = 20_000, 300, 3
LEAST, LONGEST = 0.9, 3.0  # of the speed of a plain queue; seconds
TIMEOUT = 150.0
QUEUE, INDEX, KEPT = "resilient.deferred.payments", "resilient:{payments}:deferred", "kept"


def seconds_from_closed(bench: Rig) -> float:
    """Put the kept backlog back, close the breaker, and wait for the end of all tasks."""
    bench.set_state(State.FORCED_OPEN)
    bench.store.copy(KEPT, INDEX)
    bench.broker.copy(KEPT, QUEUE)
    time.sleep(1.0)  # until every process knows that some wait
    started = time.perf_counter()
    bench.project.payments.reset(reason="benchmark")
    wait_until(lambda: not bench.deferred(), timeout=TIMEOUT, what="all to be resumed")
    bench.wait_until_done()
    return time.perf_counter() - started


def keep(bench: Rig, template: str) -> None:
    """Defer a template's tasks once, and keep their messages and their index."""
    worker = bench.worker()
    bench.set_state(State.FORCED_OPEN)
    bench.go(template, worker)
    for server, key in ((bench.broker, QUEUE), (bench.store, INDEX)):
        server.delete(KEPT)
        server.rename(key, KEPT)
    bench.stop_workers()


def measure(bench: Rig, setting: str) -> None:
    project = bench.project
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    backlog = numbers[0] if numbers else BACKLOG
    templates = {name: bench.template(task, n) for name, task, n in (
        ("few", project.brief, FEW), ("all", project.guarded, backlog),
    )}  # fmt: skip
    print(f"\n{ROUNDS} rounds, one worker, prefork with two processes; {setting}\n")
    for name, template in templates.items():
        keep(bench, template)
        worker, drains, plain = bench.worker(), [], []
        for _ in range(ROUNDS):
            drains.append(seconds_from_closed(bench))
            plain.append(bench.go(template, worker).seconds)
        bench.stop_workers()
        ratio = median(queued / drained for queued, drained in zip(plain, drains, strict=True))
        met = ratio >= LEAST if name == "all" else max(drains) <= LONGEST
        print(f"{name:4} queued plainly {median(plain):6.2f} s   from CLOSED {median(drains):6.2f} s, at most "
              f"{max(drains):.2f} s   {ratio:.2f} times as fast   {verdict(met=met)}")  # fmt: skip


if __name__ == "__main__":
    in_each_setting("benchmarks.draining", measure)
