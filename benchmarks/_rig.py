"""What the benchmarks with a real worker share: a server, the project, its workers, and statistics.

Messages are published once and kept as a template. A round copies the template to the queue, in one command,
and ends when the queue is empty and every message acknowledged; so the producer takes no part in it.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import psutil
import redis

from resilient_tasks.core.model import State
from workers.processes import Program, Server, Worker, start_beat, start_valkey, start_worker, wait_until

MODULE = "benchmarks._project"
SETTINGS = {
    "bare": "no results, no events, no log line per task",
    "usual": "results, events and log lines on",
}
QUEUE = "celery"
POLL_INTERVAL = 0.002  # seconds; how exactly a round's end is seen
TIMEOUT = 60.0  # seconds
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Round:
    """One run of a template through a worker: seconds in all, CPU seconds of its main process and its pool."""

    seconds: float
    main: float
    pool: float


class Rig:
    """The project on servers of its own: one for broker and results, one for the breakers' state."""

    def __init__(self, broker: Server, store: Server, directory: Path, environment: dict[str, str]) -> None:
        self.environment = environment
        self.broker = redis.Redis.from_url(broker.url(0), decode_responses=True)
        self.results = redis.Redis.from_url(broker.url(1))
        self.store = redis.Redis.from_url(store.url(0), decode_responses=True)
        self.project: ModuleType = importlib.import_module(MODULE)
        logging.getLogger("resilient_tasks").setLevel(logging.ERROR)  # each transition is worth a warning
        self._directory = directory
        self._workers: list[Program] = []
        self._count = itertools.count(1)

    def worker(
        self,
        *,
        concurrency: int = 2,
        own_queue: bool = False,
        env: Mapping[str, str] = NOTHING,
        pool: str = "prefork",
    ) -> Worker:
        """Start a worker and wait until it consumes; a queue of its own has its name."""
        name = f"worker-{next(self._count)}"
        environment = {**self.environment, **env}
        worker = start_worker(
            MODULE,
            name=name,
            directory=self._directory,
            env=environment,
            queues=[name] * own_queue,
            concurrency=concurrency,
            pool=pool,
        )
        self._workers.append(worker)
        return worker.wait_until_ready()

    def beat(self) -> None:
        """Start beat; it is stopped with the workers."""
        self._workers.append(start_beat(MODULE, directory=self._directory, env=self.environment))

    def stop_workers(self, *, at_once: bool = False) -> None:
        """Stop all workers, and beat; ``at_once`` without waiting for what they run."""
        while self._workers:
            program = self._workers.pop()
            program.kill() if at_once else program.stop()

    def template(self, task: Any, count: int) -> str:
        """Keep ``count`` messages of a task under its name. No worker may run."""
        for _ in range(count):
            task.delay()
        self.broker.rename(QUEUE, task.name)
        return str(task.name)

    def go(self, template: str, worker: Worker, queue: str = QUEUE) -> Round:
        """Send a template through a worker."""
        self.results.flushdb()
        before = cpu(worker)
        started = time.perf_counter()
        self.broker.copy(template, queue)
        self.wait_until_done(queue)
        seconds = time.perf_counter() - started
        after = cpu(worker)
        return Round(seconds, after[0] - before[0], after[1] - before[1])

    def wait_until_done(self, queue: str = QUEUE) -> None:
        """Wait until no message is queued or unacknowledged."""
        deadline = time.monotonic() + TIMEOUT
        while self.broker.llen(queue) or self.broker.hlen("unacked"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.broker.llen(queue)} messages are still queued")
            time.sleep(POLL_INTERVAL)

    def set_state(self, state: State) -> None:
        """Isolate or reset the breaker and let every worker know."""
        breaker = self.project.payments
        breaker.isolate(reason="benchmark") if state is State.FORCED_OPEN else breaker.reset(reason="benchmark")
        time.sleep(1.0)  # twice as long as a lost message takes to be made up for

    def deferred(self) -> int:
        """Number of waiting tasks."""
        return int(self.broker.llen("resilient.deferred.payments"))


def cpu(worker: Worker) -> tuple[float, float]:
    """Return the CPU seconds that a worker's main process and its pool have used."""
    main = psutil.Process(worker.pid)
    used = [sum(process.cpu_times()[:2]) for process in (main, *main.children())]
    return used[0], sum(used[1:])


@contextmanager
def rig(**environment: str) -> Iterator[Rig]:
    """Start the servers; stop them, and all workers, at the end."""
    with tempfile.TemporaryDirectory() as directory:
        servers = [start_valkey(Path(directory), name=name) for name in ("broker", "store")]
        broker, store = servers
        urls = {"BENCH_BROKER": broker.url(0), "BENCH_BACKEND": broker.url(1)}
        environment = {**urls, "RESILIENT_TASKS_STORE_URL": store.url(0), **environment}
        os.environ.update(environment)
        bench = Rig(broker, store, Path(directory), environment)
        try:
            yield bench
        finally:
            bench.stop_workers()
            bench.project.resilience.fleet.close()
            for server in servers:
                server.stop()


def in_each_setting(module: str, measure: Callable[[Rig, str], None]) -> None:
    """Call ``measure`` for bare and usual tasks, or for those named on the command line.

    Each in a process of its own, because the project reads its setting when it is imported.
    """
    wanted = [name for name in sys.argv[1:] if name in SETTINGS]
    if len(wanted) == 1:
        with rig(BENCH_USUAL=str(int(wanted[0] == "usual"))) as bench:
            measure(bench, SETTINGS[wanted[0]])
        return
    for name in SETTINGS:
        subprocess.run([sys.executable, "-m", module, name], check=True)


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median, by resampling."""
    draw = random.Random(1)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` of all do not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def verdict(*, met: bool) -> str:
    """Say whether a target is met."""
    return "met" if met else "MISSED"


__all__ = [
    "TIMEOUT",
    "Rig",
    "Round",
    "State",
    "confidence",
    "in_each_setting",
    "percentile",
    "rig",
    "verdict",
    "wait_until",
]
