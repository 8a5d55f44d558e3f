"""How long an idle worker takes to begin a task, beside plain Celery's: 1, 3 and 10 queues, priorities 0 and 6.

Two workers on one Redis broker, one of an app with the library and one without, each with queues of its own. Tasks are
sent to both in turn, each to a queue at random after a pause of random length; its body notes how long ago it was sent.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import redis
from celery import Celery
from kombu import Connection

from benchmarks._rig import TIMEOUT, percentile, verdict
from resilient_tasks import Resilience
from workers.processes import start_valkey, start_worker

WITH, WITHOUT = "library", "plain Celery"
QUEUES = (1, 3, 10)
PRIORITIES = (0, 6)
TASKS = 100  # of each worker in each case
PAUSE = (0.02, 0.12)  # seconds, from and to
LIMIT = 1.2  # of plain Celery's, median and 95 %

BROKER = os.environ.get("BENCH_BROKER", "redis://")
SIDE = redis.Redis.from_url(BROKER)
DELAYS = "delays"  # list on the broker's server, seconds

app = Celery("latency", broker=BROKER, set_as_current=False)
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True, task_ignore_result=True)
if os.environ.get("BENCH_WORKER") == WITH:
    resilience = Resilience(app)


@app.task(name="note")
def note(sent_at: float) -> None:
    """Note how long ago the task was sent."""
    SIDE.rpush(DELAYS, time.time() - sent_at)


def delay(server: redis.Redis, connection: Connection, queue: str, priority: int) -> float:
    """Send one task and return how long it took to begin."""
    server.delete(DELAYS)
    note.apply_async((time.time(),), queue=queue, priority=priority, connection=connection)
    popped: Any = server.blpop([DELAYS], timeout=TIMEOUT)
    return float(popped[1])


def measure(url: str, directory: Path, count: int) -> None:
    """Compare two workers of ``count`` queues each."""
    server = redis.Redis.from_url(url)
    workers = []
    queues = {kind: [f"{kind.split()[0]}-{count}-{number}" for number in range(count)] for kind in (WITH, WITHOUT)}
    for kind, names in queues.items():
        env = {"BENCH_BROKER": url, "RESILIENT_TASKS_STORE_URL": url, "BENCH_WORKER": kind}
        workers.append(start_worker("benchmarks.latency", name=names[0], directory=directory, env=env, queues=names))
    try:
        for worker in workers:
            worker.wait_until_ready()
        with Connection(url) as connection:
            for priority in PRIORITIES:
                delays: dict[str, list[float]] = {kind: [] for kind in queues}
                for _, kind in product(range(TASKS), queues):
                    time.sleep(random.uniform(*PAUSE))
                    delays[kind].append(delay(server, connection, random.choice(queues[kind]), priority))
                report(count, priority, delays)
    finally:
        for worker in workers:
            worker.stop()


def report(count: int, priority: int, delays: dict[str, list[float]]) -> None:
    line, met = f"{count:2} queues, priority {priority}:", True
    for what, of in (("median", median), ("95 %", lambda values: percentile(values, 0.95))):
        ours, plain = of(delays[WITH]), of(delays[WITHOUT])
        met &= ours <= LIMIT * plain
        line += f"   {what} {ours * 1000:6.1f} / {plain * 1000:6.1f} ms = {ours / plain:5.2f}"
    print(f"{line}   <= {LIMIT}: {verdict(met=met)}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory), name="broker")
        try:
            print("\nFrom sending a task until an idle worker begins it: with the library / plain Celery\n")
            for count in QUEUES:
                measure(server.url(), Path(directory), count)
        finally:
            server.stop()
        print(f"\nload average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
