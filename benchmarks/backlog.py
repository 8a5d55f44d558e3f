"""What a million waiting tasks cost a worker: growth of its main process while they wait and while they are resumed.

The worker defers some tasks itself; their messages, each under an id of its own, are then multiplied on the
server, with an index entry for each. Nothing that a worker does may grow with their number: not its ticks, nor
its reconciling, even when the store has lost the index.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import psutil

from benchmarks._rig import TIMEOUT, Rig, State, rig, verdict, wait_until
from workers.processes import Worker

TASKS = 1_000_000
REALLY_DEFERRED = 2_000
PER_ROUND_TRIP = 5_000
WATCHED = 30.0  # seconds of each phase: three stocktakings
MOST = 5.0  # MB
INTERVAL = 0.1  # seconds between two looks at the process
QUEUE = "resilient.deferred.payments"
INDEX = "resilient:{payments}:deferred"


def multiply(bench: Rig, count: int) -> None:
    """Put ``count`` more messages like the one that waits longest into the deferred queue, and into the index."""
    text = str(bench.broker.lindex(QUEUE, -1))
    original = json.loads(text)["headers"]["id"]
    now = int(time.time() * 1000)
    for _ in range(0, count, PER_ROUND_TRIP):
        ids = [str(uuid4()) for _ in range(PER_ROUND_TRIP)]
        bench.broker.lpush(QUEUE, *(text.replace(original, task_id) for task_id in ids))
        bench.store.zadd(INDEX, dict.fromkeys(ids, now))


@contextmanager
def watching(worker: Worker) -> Iterator[Callable[[], float]]:
    """Give a function that returns the most memory, in MB, that the worker's main process has had by now."""
    process, stopped = psutil.Process(worker.pid), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not stopped.wait(INTERVAL):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(seen) / 1e6
    finally:
        stopped.set()
        watcher.join()


def most_in_a_while(worker: Worker) -> float:
    with watching(worker) as most:
        time.sleep(WATCHED)
        return most()


def main() -> None:
    with rig() as bench:
        guarded = bench.template(bench.project.guarded, REALLY_DEFERRED)
        worker = bench.worker()
        for _ in range(2):  # the first round costs what any first round does
            bench.set_state(State.FORCED_OPEN)
            bench.go(guarded, worker)
            bench.store.delete(INDEX)
            wait_until(lambda: bench.store.exists(INDEX), timeout=TIMEOUT, what="reconciling")
            bench.set_state(State.CLOSED)
            wait_until(lambda: not bench.deferred(), timeout=TIMEOUT, what="all to be resumed")
            bench.wait_until_done()
        bench.set_state(State.FORCED_OPEN)
        bench.go(guarded, worker)
        before = psutil.Process(worker.pid).memory_info().rss / 1e6
        multiply(bench, TASKS - REALLY_DEFERRED)
        size = bench.broker.info("memory")["used_memory"] / 1e6
        waiting = bench.deferred()
        print(f"\n{waiting:,} tasks wait, {size:.0f} MB on the broker; the main process has {before:.1f} MB\n")
        grown = {"while they wait": most_in_a_while(worker) - before}
        bench.store.delete(INDEX)
        grown["after the store has lost the index"] = most_in_a_while(worker) - before
        bench.set_state(State.CLOSED)
        grown["while they are resumed"] = most_in_a_while(worker) - before
        for phase, growth in grown.items():
            print(f"{phase:36}{growth:+6.1f} MB")
        resumed = waiting - bench.deferred()
        print(f"\n{resumed:,} were resumed in {WATCHED:.0f} s")
        print(f"target {MOST:.0f} MB: {verdict(met=max(grown.values()) <= MOST)}")


if __name__ == "__main__":
    main()
