"""How long until every process of every worker refuses, once a breaker has opened.

Two workers with two pool processes each; a thread in each of the six processes looks at the breaker every 2 ms
and notes when it begins to refuse. The time runs from the moment before ``isolate()`` is called, so it includes
the store's decision. Then the same with the announcement lost: the subscriptions are cut just before.
"""

from __future__ import annotations

import time

from benchmarks._rig import TIMEOUT, Rig, percentile, rig, verdict, wait_until

WORKERS = 2
PROCESSES = WORKERS * (1 + 2)  # each a main process and two of its pool
TRANSITIONS = 60
TRANSITIONS_LOST = 50
LIMIT, LIMIT_LOST = 0.1, 1.0  # seconds, of the 99th percentile


def subscribers(bench: Rig) -> int:
    return len(bench.store.client_list(_type="pubsub"))


def one_transition(bench: Rig, *, lost: bool) -> list[float]:
    """Open the breaker and return the delay of each process, in seconds."""
    breaker, refusals = bench.project.payments, bench.project.REFUSALS
    bench.broker.delete(refusals)
    if lost:
        bench.store.client_kill_filter(_type="pubsub")
    opened_at = time.time()
    breaker.isolate(reason="benchmark")
    wait_until(lambda: bench.broker.llen(refusals) == PROCESSES, timeout=TIMEOUT, what="everybody to refuse")
    notes = [note.split() for note in bench.broker.lrange(refusals, 0, -1)]
    assert len({pid for pid, _ in notes}) == PROCESSES, "a process noted two refusals"
    breaker.reset(reason="benchmark")
    return [float(at) - opened_at for _, at in notes]


def measure(bench: Rig, transitions: int, *, lost: bool) -> list[float]:
    delays = []
    for _ in range(transitions):
        wait_until(lambda: subscribers(bench) == WORKERS, timeout=TIMEOUT, what="everybody to subscribe")
        time.sleep(0.05)  # for the reset to be seen: a process that missed it would not begin to refuse again
        delays += one_transition(bench, lost=lost)
    return delays


def report(what: str, delays: list[float], limit: float) -> None:
    p99 = percentile(delays, 0.99)
    figures = (
        f"p50 {percentile(delays, 0.5) * 1000:5.0f} ms   p99 {p99 * 1000:5.0f} ms   max {max(delays) * 1000:5.0f} ms"
    )
    print(f"{what:22}{figures}   of {len(delays)}; p99 <= {limit * 1000:.0f} ms: {verdict(met=p99 <= limit)}")


def main() -> None:
    with rig(BENCH_WATCH="1") as bench:
        for _ in range(WORKERS):
            bench.worker()
        bench.project.payments.reset(reason="benchmark")
        bench.project.resilience.fleet.view.stop()  # this process only gives orders
        print(f"\nFrom opening a breaker until a process refuses: {WORKERS} workers, {PROCESSES} processes\n")
        report("announced", measure(bench, TRANSITIONS, lost=False), LIMIT)
        report("announcement lost", measure(bench, TRANSITIONS_LOST, lost=True), LIMIT_LOST)


if __name__ == "__main__":
    main()
