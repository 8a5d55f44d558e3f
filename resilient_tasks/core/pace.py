"""How fast deferred tasks return: slowly at first, faster while it goes well.

A tick resumes one batch. While the dependency answers and the workers keep up, the batch grows with the square of
time: never by so much at once that a dependency with little room to spare is overrun. When calls fail, it halves,
goes back quickly to nearly where it was, and feels its way from there: a healing dependency bears more each second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from resilient_tasks.core.model import Snapshot
from resilient_tasks.policy import BreakerPolicy

LARGEST_BATCH = 10_000
#: Share of a batch that may fail before that shows a dependency at its limit.
TOLERATED = 0.01
#: Shares of the batch at which calls failed last: from where on to creep, how fast, and where that batch is forgotten.
NEAR, CREEP, FORGOTTEN = 0.9, 0.02, 2.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a breaker's deferred tasks are being resumed; kept in the store between ticks.

    ``outstanding`` counts resumed tasks that no worker has taken up yet.
    """

    batch: int = 0
    failures_seen: int = 0  # Snapshot.total_failures when the batch was decided
    outstanding: int = 0
    decided_at: float = 0.0  # Snapshot.now when the batch was decided
    too_large: int = 0  # the batch at which calls failed last; 0: none in this recovery


def next_pace(
    pace: Pace, snapshot: Snapshot, policy: BreakerPolicy, *, outstanding: int, interval: float
) -> tuple[Pace, int]:
    """Decide one tick: the pace to keep, and how many tasks to resume now.

    Call it once per tick, every ``interval`` seconds, for a breaker that admits calls and has tasks waiting. The first
    batch is ``trial_calls``, the ceiling ``resume_rate``; ``outstanding`` resumed tasks are not taken up yet.
    """
    begins = pace.batch == 0 or pace.decided_at < snapshot.since
    batch, too_large = (policy.trial_calls, 0) if begins else _following(pace, snapshot, outstanding)
    count = batch - outstanding
    if policy.resume_rate is not None:
        batch = min(batch, math.ceil(policy.resume_rate * interval))
        earliest = snapshot.now - (interval if begins else 2 * interval)
        count = min(batch - outstanding, _due(policy.resume_rate, max(pace.decided_at, earliest), snapshot.now))
    kept = Pace(batch, snapshot.total_failures, pace.outstanding, snapshot.now, too_large)
    return kept, max(0, count)


def refill_count(
    pace: Pace, snapshot: Snapshot, policy: BreakerPolicy, *, free: int, interval: float
) -> tuple[Pace, int]:
    """Decide how many tasks to resume into free slots: as many as those, within ``resume_rate``.

    Call it whenever a slot has become free, for a breaker that limits calls in flight.
    """
    if policy.resume_rate is None:
        return pace, free
    due = _due(policy.resume_rate, max(pace.decided_at, snapshot.now - 2 * interval), snapshot.now)
    return replace(pace, decided_at=snapshot.now), min(free, due)


def _following(pace: Pace, snapshot: Snapshot, outstanding: int) -> tuple[int, int]:
    """Return the batch after ``pace.batch``, and the batch that is known to be too large."""
    if snapshot.total_failures - pace.failures_seen > TOLERATED * pace.batch:
        return max(1, pace.batch // 2), pace.batch
    too_large = pace.too_large if pace.batch < FORGOTTEN * pace.too_large else 0
    if 2 * outstanding > pace.batch:
        return pace.batch, too_large  # a larger one would only wait in the queue, where it delays other tasks
    return min(pace.batch + _growth(pace.batch, too_large), LARGEST_BATCH), too_large


def _growth(batch: int, too_large: int) -> int:
    """Return by how much a batch may grow in one tick."""
    growth, near = math.ceil(2 * math.sqrt(batch)), math.ceil(NEAR * too_large)
    if not too_large:
        return growth
    if batch < near:
        return min(max(growth, batch // 2), near - batch)
    return min(growth, max(1, int(CREEP * batch)))


def _due(rate: float, start: float, end: float) -> int:
    """Return how many instants of a steady ``rate`` lie between two times; over many ticks no fraction is lost."""
    return math.floor(rate * end) - math.floor(rate * start)
