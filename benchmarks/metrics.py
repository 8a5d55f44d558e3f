"""What telling costs: a scrape of a thousand breakers, with the store there and frozen; and what tasks pay for it.

Tasks are the guarded ones of ``benchmarks.throughput``, with a receiver on every signal and a webhook; rounds in which
an exporter is scraped four times a second, far more often than usual, alternate with rounds in which it is not.
The target of a scrape is one of processor time, because the time on the wall is the machine's affair.
"""

from __future__ import annotations

import threading
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from celery import Celery
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks._rig import Rig, Round, confidence, rig, verdict
from resilient_tasks import Resilience
from resilient_tasks.core.model import Verb
from resilient_tasks.monitor import tracing
from resilient_tasks.prometheus import register
from workers.processes import start_valkey

BREAKERS = 1_000
SCRAPES = 15
PAUSE = 1.0  # seconds between two of them
LONGEST_SCRAPE = 0.15  # seconds
TASKS = 300  # per round
PAIRS = 10
LARGEST_SHARE = 0.01
SCRAPE_PAUSE = 0.25  # seconds, while tasks run


def scrapes_of_many() -> None:
    """Scrape a fleet of a thousand breakers, then with its store frozen."""
    with TemporaryDirectory() as directory:
        store = start_valkey(Path(directory))
        app = Celery("bench", broker="memory://", set_as_current=False)
        resilience = Resilience(app, store_url=store.url())
        breakers = [resilience.breaker(f"breaker-{number}") for number in range(BREAKERS)]
        for breaker in breakers:
            resilience.fleet.command(breaker.spec, Verb.RESET, "", "")
        registry = CollectorRegistry()
        register(app, registry)
        time.sleep(PAUSE)
        for title in "store there", "store frozen":
            seconds, computing, text = [], [], b""
            for _ in range(SCRAPES):
                started, began = time.perf_counter(), time.thread_time()
                text = generate_latest(registry)
                computing.append(time.thread_time() - began)
                seconds.append(time.perf_counter() - started)
                time.sleep(PAUSE)
            up = b"\ncelery_breaker_up 1.0\n" in text
            own, wall = median(computing), median(seconds)
            print(f"{title}: {own * 1e3:.0f} ms of processor time, {wall * 1e3:.0f} ms on the wall;", end=" ")
            print(f"{len(text.splitlines())} lines, up {up:d};", end=" ")
            print(f"target {LONGEST_SCRAPE * 1e3:.0f} ms:", verdict(met=own <= LONGEST_SCRAPE))
            store.program.freeze()
        store.program.thaw()
        resilience.fleet.close()
        store.stop()


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


def rounds(bench: Rig) -> Iterator[tuple[Round, Round]]:
    """Yield pairs of rounds: nobody asks, and somebody does."""
    template = bench.template(bench.project.guarded, TASKS)
    worker = bench.worker()
    bench.go(template, worker)
    for _ in range(PAIRS):
        quiet = bench.go(template, worker)
        with scraped(bench):
            yield quiet, bench.go(template, worker)


def cost_on_tasks() -> None:
    """Compare the processor time of guarded tasks."""
    with rig(BENCH_USUAL="0", BENCH_RECEIVERS="1", RESILIENT_TASKS_WEBHOOK_URL="http://127.0.0.1:9/") as bench:
        pairs = list(rounds(bench))
        payments = bench.project.payments
        calls = 100_000
        span = timeit.timeit(lambda: tracing.tell_run([payments], ""), number=calls) / calls
    used = [tuple((one.main + one.pool) / TASKS for one in pair) for pair in pairs]
    shares = [watched / quiet - 1 for quiet, watched in used]
    low, high = confidence(shares)
    task = median(quiet for quiet, _ in used)
    print(f"\na guarded task that does nothing takes {task * 1e6:.0f} µs of the worker's processor time;")
    print(f"telling its span, where nobody traces, {span * 1e6:.2f} µs of them, {span / task:.2%};")
    print(
        f"while an exporter is scraped {median(shares):+.2%}, with 95 % confidence {low:+.2%} to {high:+.2%};", end=" "
    )
    decided = low > LARGEST_SHARE or high <= LARGEST_SHARE
    print(f"target <= {LARGEST_SHARE:.0%}:", verdict(met=high <= LARGEST_SHARE) if decided else "too noisy to decide")


def main() -> None:
    scrapes_of_many()
    cost_on_tasks()


if __name__ == "__main__":
    main()
