"""What all telling costs a guarded task that does nothing: events, metrics, traces, a webhook, receivers, an exporter.

A worker for each way of telling, on a queue of its own; the same messages go to all of them in turn, in one round after
the other. Two workers tell nothing: how they differ is how much this machine can tell apart. What is compared is
processor time of the worker, because time on the wall is the machine's affair, and of that the lower quartile of all
rounds, because other jobs only ever add to it. The history cannot be switched off: ``benchmarks.history`` measures it.
"""

from __future__ import annotations

import random
import threading
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil

from benchmarks._rig import Rig, percentile, rig, verdict
from resilient_tasks.monitor import tracing
from resilient_tasks.monitor.exposition import Exposition
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.subjects import read_subjects
from workers.processes import Worker

TASKS = 150  # per round and worker: short rounds, so that those of one turn meet the same noise
ROUNDS = 60
LARGEST_SHARE = 0.01
CALLS = 10_000
SCRAPE_PAUSE = 0.25  # seconds; far more often than usual

NOTHING = "nothing"
OURS = {"BENCH_RECEIVERS": "1", "RESILIENT_TASKS_WEBHOOK_URL": "http://127.0.0.1:9/"}
TOLD = {
    NOTHING: {},
    "nothing, another worker": {},
    "webhook, receivers, scrapes": OURS,
    "the same, Celery's events, OpenTelemetry": {**OURS, "BENCH_EVENTS": "1", "BENCH_TRACED": "1"},
}


@contextmanager
def scraped(bench: Rig) -> Iterator[None]:
    """Scrape while in the context."""
    runtime, stopped = runtime_of(bench.project.app), threading.Event()
    exposition = Exposition(lambda: read_subjects(runtime))

    def scrape() -> None:
        while not stopped.wait(SCRAPE_PAUSE):
            exposition.text()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def cpu(worker: Worker) -> float:
    """Return the seconds that all threads of a worker have computed, to the nanosecond."""
    main = psutil.Process(worker.pid)
    threads = (thread for process in (main, *main.children()) for thread in Path(f"/proc/{process.pid}/task").iterdir())
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def one_round(bench: Rig, template: str, workers: dict[str, Worker], first: int) -> dict[str, float]:
    """Return the processor time of a task by what is told of it, seconds."""
    names = [*workers][first:] + [*workers][:first]
    used = {}
    for name in names:
        worker = workers[name]
        before = cpu(worker)
        with scraped(bench) if TOLD[name] else nullcontext():
            bench.go(template, worker, worker.name)
        used[name] = (cpu(worker) - before) / TASKS
    return used


def lower_quartile(name: str, rounds: Sequence[dict[str, float]]) -> float:
    """Return what a task takes while few others disturb it, seconds."""
    return percentile([used[name] for used in rounds], 0.25)


def added(name: str, rounds: Sequence[dict[str, float]]) -> float:
    """Return what one way of telling adds to that, as a share."""
    return lower_quartile(name, rounds) / lower_quartile(NOTHING, rounds) - 1


def report(name: str, rounds: list[dict[str, float]]) -> None:
    """Print what one way of telling costs beside telling nothing."""
    draw = random.Random(1)
    shares = sorted(added(name, draw.choices(rounds, k=len(rounds))) for _ in range(2000))
    low, high = shares[50], shares[-51]
    task = lower_quartile(name, rounds)
    print(f"{name:42}{task * 1e6:7.0f} µs {added(name, rounds):+8.2%}   ({low:+.2%} to {high:+.2%})", end="")
    if TOLD[name] is OURS:
        decided = low > LARGEST_SHARE or high <= LARGEST_SHARE
        print(f"   <= {LARGEST_SHARE:.0%}:", verdict(met=high <= LARGEST_SHARE) if decided else "too noisy to decide")
    else:
        print()


def main() -> None:
    with rig(BENCH_USUAL="0") as bench:
        template = bench.template(bench.project.guarded, TASKS)
        workers = {
            name: bench.worker(concurrency=1, queue=f"worker-{number}", env=environment)
            for number, (name, environment) in enumerate(TOLD.items(), 1)
        }
        one_round(bench, template, workers, 0)
        rounds = [one_round(bench, template, workers, number % len(workers)) for number in range(ROUNDS)]
        payments = bench.project.payments
        span = min(timeit.repeat(lambda: tracing.tell_run([payments], ""), number=CALLS, repeat=10)) / CALLS
    print(f"\n{'told of a guarded no-op task':42}{'processor time':>10}   added   (95 % confidence)\n")
    for name in TOLD:
        report(name, rounds)
    share = span / lower_quartile(NOTHING, rounds)
    print(f"\ntelling the task's span, where nobody traces: {span * 1e6:.2f} µs, {share:.2%}")


if __name__ == "__main__":
    main()
