"""What is said of the end of an outage while its tasks drain, beside what then comes.

Two workers and beat, a tick a second; a few thousand tasks wait for a breaker that an operator holds open, and closes.
The first drain has no former one to learn from, the second has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks._rig import TIMEOUT, Rig, rig, verdict, wait_until

TASKS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
FACTOR = 2.0
EVERY = 1.0  # seconds from one look to the next
SHORTEST = 3.0  # seconds; what is nearer than three ticks is over at any moment


class Look(NamedTuple):
    """What was said at one moment of a drain, and what came: seconds."""

    after: float
    said: float | None
    came: float

    @property
    def is_right(self) -> bool:
        """Whether it was said within the factor."""
        return self.said is not None and 1 / FACTOR <= self.said / self.came <= FACTOR


def one_drain(bench: Rig) -> list[Look]:
    """Let the tasks wait, close the breaker and look on."""
    breaker, charge = bench.project.recovering, bench.project.charge
    breaker.isolate(reason="benchmark")
    time.sleep(EVERY)  # every worker receives it
    for _ in range(TASKS):
        charge.delay()
    wait_until(lambda: breaker.snapshot().deferred == TASKS, timeout=10 * TIMEOUT, what="all to wait")
    breaker.reset(reason="benchmark")
    closed = time.monotonic()
    said = list(estimates(bench))
    drained = time.monotonic() - closed
    wait_until(lambda: bench.project.resilience.outages(breaker.name)[0].drained, what="the outage to be over")
    bench.wait_until_done()
    return [Look(at - closed, each, closed + drained - at) for at, each in said]


def estimates(bench: Rig) -> Iterator[tuple[float, float | None]]:
    while (estimate := bench.project.resilience.estimate("recovering")) is not None:
        yield time.monotonic(), estimate.done_in
        time.sleep(EVERY)


def report(what: str, looks: Sequence[Look]) -> None:
    """Print some moments of a drain, and how many of all were right."""
    judged = [look for look in looks if look.said is not None and look.came >= SHORTEST]
    print(f"\n{what}: {looks[-1].after:.0f} s; nothing was said for {judged[0].after:.0f} s")
    for share in (0, 0.25, 0.5, 0.75):
        look = judged[int(share * len(judged))]
        print(f"  after {look.after:4.0f} s   said {look.said:4.0f} s   came {look.came:4.0f} s")
    right = sum(look.is_right for look in judged)
    print(f"  within a factor of {FACTOR:g}: {right} of {len(judged)}; all: {verdict(met=right == len(judged))}")


def main() -> None:
    with rig() as bench:
        for _ in range(2):
            bench.worker()
        bench.beat()
        print(f"{TASKS:,} tasks drain")
        for what in ("the first drain", "the second"):
            report(what, one_drain(bench))


if __name__ == "__main__":
    main()
