"""What the history costs: the server's time for one batch of outcomes, with and without it.

A worker's process sends at most ten batches a second for a breaker however many tasks it runs, and does nothing else
for the history while all goes well, so that this is the whole cost of events and metrics on a guarded task that does
nothing. Rounds alternate, so that a busy machine slows both alike; the time is the server's own, by INFO commandstats.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import redis

from resilient_tasks.core.model import Calls, Outcome
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.redis import RedisStore
from resilient_tasks.store.reports import BATCH_INTERVAL
from resilient_tasks.store.scripts import Script
from workers.processes import start_valkey

ROUNDS, BATCHES = 15, 200
TASK = 1.0e-3  # seconds of a worker's process that a task takes that does nothing, at the very least
TARGET = 0.01


def without_history() -> Script:
    """Return the script that records outcomes, with a history that writes nothing."""
    in_its_place = "\n  type("  # which does nothing either
    return Script(Script.load("record").text.replace("\n  save_history(", in_its_place))


def seconds_per_batch(client: redis.Redis, store: RedisStore, spec: Spec, epoch: int) -> float:
    """Return the server's time for one batch."""
    client.config_resetstat()
    for _ in range(BATCHES):
        store.record(spec, Evidence(epoch, (Calls(Outcome.SUCCESS, 30),)))
    return float(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]) / 1e6


def main() -> None:
    spec = Spec("payments")
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        try:
            with redis.Redis.from_url(server.url()) as client:
                usual, forgetful = (RedisStore(server.url(), namespace=name) for name in ("usual", "forgetful"))
                forgetful._scripts._scripts["record"] = without_history()  # noqa: SLF001 - there is no such setting
                costs: dict[RedisStore, list[float]] = {usual: [], forgetful: []}
                for _ in range(ROUNDS):
                    for store, measured in costs.items():
                        epoch = store.record(spec, Evidence(0, (Calls(Outcome.SUCCESS, 1),))).snapshot.epoch
                        measured.append(seconds_per_batch(client, store, spec, epoch))
        finally:
            server.stop()
    with_it, without = median(costs[usual]), median(costs[forgetful])
    print(f"\nThe server's time for one batch of outcomes (median of {ROUNDS} rounds of {BATCHES})\n")
    print(f"{'with the history':24}{with_it * 1e6:8.1f} µs\n{'without':24}{without * 1e6:8.1f} µs")
    share = (with_it - without) / (BATCH_INTERVAL / TASK) / TASK
    print(f"\nadded to a guarded task that does nothing: {share:.4%}; target <= {TARGET:.0%}")


if __name__ == "__main__":
    main()
