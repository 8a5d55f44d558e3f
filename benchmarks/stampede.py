"""What 5,000 waiting tasks do to a dependency that has just come back and bears little at first.

It serves 10 calls in any one second, 200 after 20 seconds, and refuses what is more. Two workers and beat; the breaker
has opened by itself and finds out by trials that the dependency is back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from benchmarks._rig import Rig, rig, verdict, wait_until

TASKS = 5_000
TIMEOUT = 600.0  # seconds
MOST_FAILURES = 0.01  # share of the calls
MINUTE = 60.0

Call = tuple[float, bool]  # when, and whether it was served


def calls_after_healing(bench: Rig) -> tuple[list[Call], list[float]]:
    """Let all tasks wait, heal the dependency; return the calls, and when the breaker opened after that."""
    project, broker = bench.project, bench.broker
    for _ in range(TASKS):
        project.bill.delay()
    for _ in range(2):
        bench.worker()
    bench.beat()
    waiting = "resilient.deferred.healing"
    wait_until(lambda: broker.llen(waiting) >= TASKS - 3, timeout=TIMEOUT, what="all to wait")
    broker.delete(project.CALLS)
    healed_at = time.time()
    broker.set(project.HEALED_AT, round(healed_at * 1000))
    openings: dict[int, float] = {}

    def done() -> bool:
        snapshot = project.healing.snapshot()
        if snapshot.state == "OPEN" and snapshot.since > healed_at:
            openings[snapshot.epoch] = snapshot.since - healed_at
        return bool(broker.llen(project.FINISHED) >= TASKS)

    wait_until(done, timeout=TIMEOUT, what="all to finish")
    calls = [line.split() for line in broker.lrange(project.CALLS, 0, -1)]
    return [(float(at) - healed_at, served == "1") for at, served in calls], list(openings.values())


def print_seconds(calls: Sequence[Call]) -> None:
    made, failed = Counter(int(at) // 5 for at, _ in calls), Counter(int(at) // 5 for at, served in calls if not served)
    print("\nseconds   calls/s  failed")
    for part in range(max(made) + 1):
        print(f"{5 * part:3} to {5 * part + 5:3}{made[part] / 5:8.0f}{failed[part]:8}")


def main() -> None:
    with rig() as bench:
        calls, openings = calls_after_healing(bench)
    served = sum(served for _, served in calls)
    failed = len(calls) - served
    share = failed / len(calls)
    late = [at for at in openings if at > MINUTE]
    print_seconds(calls)
    print(f"\n{served:,} served in {max(at for at, _ in calls):.0f} s, {failed} failed")
    print(f"failed: {share:.2%} of the calls, target {MOST_FAILURES:.0%}: {verdict(met=share <= MOST_FAILURES)}")
    print(f"openings after the healing: {len(openings)}; after the first minute: {len(late)}, target 0: ", end="")
    print(verdict(met=not late))


if __name__ == "__main__":
    main()
