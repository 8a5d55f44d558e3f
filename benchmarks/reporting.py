"""What all reporting costs a guarded task that does nothing: events, metrics, traces, receivers, an exporter.

A worker for each way of reporting, on a queue of its own; the same messages go to all of them in turn, one round after
the other. Two workers report nothing: how they differ is the error of measurement. Compared are the worker's
processor time, the lower quartile of all rounds, because other jobs only add to it, and, with workers of their own,
how many functions its processes call, which does not depend on other jobs. The history cannot be switched off:
``benchmarks.history`` measures it.
"""

from __future__ import annotations

import random
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks._rig import Rig, percentile, rig, verdict
from resilient_tasks.monitor import tracing
from resilient_tasks.prometheus import register
from workers.processes import Worker

TASKS = 150  # per round and worker: short rounds, so that those of one turn meet the same noise
ROUNDS = 60
COUNTING_ROUNDS = 12
LARGEST_SHARE = 0.01
CALLS = 10_000
SCRAPE_PAUSE = 0.25  # seconds; far more often than usual

NOTHING = "nothing"
OURS = {"BENCH_RECEIVERS": "1"}
REPORTED: Mapping[str, Mapping[str, str]] = {
    NOTHING: {},
    "nothing, another worker": {},
    "receivers, scrapes": OURS,
    "the same, Celery's events, OpenTelemetry": {**OURS, "BENCH_EVENTS": "1", "BENCH_TRACED": "1"},
}
Used = Mapping[str, float]  # by a task in one round, by what is reported of it


@contextmanager
def scraped(bench: Rig) -> Iterator[None]:
    """Scrape while in the context."""
    registry, stopped = CollectorRegistry(), threading.Event()
    register(bench.project.app, registry)

    def scrape() -> None:
        while not stopped.wait(SCRAPE_PAUSE):
            generate_latest(registry)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def processor_time(worker: Worker) -> float:
    """Return the seconds that all threads of a worker have computed, to the nanosecond."""
    main = psutil.Process(worker.pid)
    threads = (thread for process in (main, *main.children()) for thread in Path(f"/proc/{process.pid}/task").iterdir())
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def function_calls(bench: Rig, worker: Worker) -> float:
    """Return how many functions a worker's processes have called, as they last wrote."""
    time.sleep(3 * bench.project.WRITE_INTERVAL)
    main = psutil.Process(worker.pid)
    written = bench.broker.hmget(bench.project.FUNCTION_CALLS, [str(each.pid) for each in (main, *main.children())])
    return float(sum(int(calls or 0) for calls in written))


def one_round(bench: Rig, workers: Mapping[str, Worker], first: int, used_by: Callable[[Worker], float]) -> Used:
    """Return what a task uses, by what is reported of it."""
    names = [*workers][first:] + [*workers][:first]
    used = {}
    for name in names:
        worker = workers[name]
        before = used_by(worker)
        with scraped(bench) if REPORTED[name] else nullcontext():
            bench.go(bench.project.guarded.name, worker, worker.name)
        used[name] = (used_by(worker) - before) / TASKS
    return used


def measure(bench: Rig, count: int, used_by: Callable[[Worker], float], **environment: str) -> list[Used]:
    """Return what tasks use in so many rounds, each time on workers of their own."""
    workers = {
        name: bench.worker(concurrency=1, own_queue=True, env={**reported, **environment})
        for name, reported in REPORTED.items()
    }
    one_round(bench, workers, 0, used_by)
    rounds = [one_round(bench, workers, number % len(workers), used_by) for number in range(count)]
    bench.stop_workers()
    return rounds


def lower_quartile(name: str, rounds: Sequence[Used]) -> float:
    """Return what a task uses while few others disturb it."""
    return percentile([used[name] for used in rounds], 0.25)


def added(name: str, rounds: Sequence[Used]) -> float:
    """Return what one way of reporting adds to that, as a share."""
    return lower_quartile(name, rounds) / lower_quartile(NOTHING, rounds) - 1


def report(name: str, timed: Sequence[Used], counted: Sequence[Used]) -> None:
    """Print what one way of reporting costs beside reporting nothing."""
    draw = random.Random(1)
    shares = sorted(added(name, draw.choices(timed, k=len(timed))) for _ in range(2000))
    between = f"({shares[50]:+.1%} to {shares[-51]:+.1%})"
    seconds = f"{lower_quartile(name, timed) * 1e6:6.0f} µs {added(name, timed):+7.1%} {between}"
    calls = f"{lower_quartile(name, counted):8.0f} {added(name, counted):+8.2%}"
    met = verdict(met=added(name, counted) <= LARGEST_SHARE) if REPORTED[name] is OURS else "-"
    print(f"{name:42}{seconds:46}{calls}   <= {LARGEST_SHARE:.0%}: {met}")


def main() -> None:
    with rig(BENCH_USUAL="0") as bench:
        bench.template(bench.project.guarded, TASKS)
        counted = measure(bench, COUNTING_ROUNDS, lambda worker: function_calls(bench, worker), BENCH_COUNT="1")
        timed = measure(bench, ROUNDS, processor_time)
        payments = bench.project.payments
        span = (
            min(
                timeit.repeat(
                    partial(tracing.record_run, lambda: {payments.name: payments.state}, ""), number=CALLS, repeat=10
                )
            )
            / CALLS
        )
    print(f"\n{'reported of a guarded no-op task':42}{'processor time (95 % confidence)':46}function calls\n")
    for name in REPORTED:
        report(name, timed, counted)
    share = span / lower_quartile(NOTHING, timed)
    print(f"\nannotating the task's span, without tracing: {span * 1e6:.2f} µs, {share:.2%}")


if __name__ == "__main__":
    main()
