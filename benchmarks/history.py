"""What the history costs while all goes well: one batch of counts, which each process sends once a second.

The server's time is its own, by INFO commandstats, the process's is its processor time. That is the whole cost of
counters and reports on guarded tasks that succeed: their outcomes are added up in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import redis

from resilient_tasks.core.model import Outcome
from resilient_tasks.core.outage import Tally
from resilient_tasks.store.redis import RedisStore
from resilient_tasks.store.reporter import TALLY_INTERVAL
from workers.processes import start_valkey

ROUNDS, BATCHES = 15, 200
TARGET = 0.01  # of a process's time


def measure(client: redis.Redis, store: RedisStore) -> tuple[float, float]:
    """Return the seconds that one batch takes the server, and this process."""
    client.config_resetstat()
    began = time.process_time()
    for _ in range(BATCHES):
        store.history.tally({"payments": Tally(Counter({Outcome.SUCCESS.value: 1000}))}, time.time())
    used = time.process_time() - began
    commands = client.info("commandstats")
    ours = [each["usec"] for name, each in commands.items() if not name.startswith(("cmdstat_config", "cmdstat_info"))]
    return sum(ours) / BATCHES / 1e6, used / BATCHES


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        store = RedisStore(server.url(), namespace="bench")
        try:
            with redis.Redis.from_url(server.url()) as client:
                rounds = [measure(client, store) for _ in range(ROUNDS)]
        finally:
            store.close()
            server.stop()
    of_server, of_process = (median(each) for each in zip(*rounds, strict=True))
    print(f"\nOne batch of counts (median of {ROUNDS} rounds of {BATCHES})\n")
    print(f"{'the server':24}{of_server * 1e6:8.1f} µs\n{'the process':24}{of_process * 1e6:8.1f} µs")
    print(f"\nof a process's time: {of_process / TALLY_INTERVAL:.4%}; target <= {TARGET:.0%}")


if __name__ == "__main__":
    main()
