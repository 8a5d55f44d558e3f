"""How fast deferred tasks return: slowly at first, faster while it goes well.

A slow start in the manner of TCP: a tick resumes one batch, the batch doubles while the dependency
answers and the workers keep up, and halves when calls fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resilient_tasks.core.model import Snapshot
from resilient_tasks.policy import BreakerPolicy

LARGEST_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a breaker's deferred tasks are being resumed; kept in the store between ticks.

    ``outstanding`` counts resumed tasks that no worker has taken up yet.
    """

    batch: int = 0
    failures_seen: int = 0  # Snapshot.total_failures when the batch was decided
    outstanding: int = 0
    decided_at: float = 0.0  # Snapshot.now when the batch was decided


def next_pace(
    pace: Pace, snapshot: Snapshot, policy: BreakerPolicy, *, outstanding: int, interval: float
) -> tuple[Pace, int]:
    """Decide one tick: the pace to keep, and how many tasks to resume now.

    Call it once per tick for a breaker that admits calls and has tasks waiting.

    Args:
        pace: what the previous tick kept.
        snapshot: the breaker now.
        policy: gives ``trial_calls``, the first batch, and ``resume_rate``, the ceiling in tasks per second.
        outstanding: resumed tasks that no worker has taken up yet, by the caller's best knowledge.
        interval: time between ticks, s.
    """
    begins = pace.batch == 0 or pace.decided_at < snapshot.since
    batch = policy.trial_calls if begins else _following(pace, snapshot, outstanding)
    count = batch - outstanding
    if policy.resume_rate is not None:
        batch = min(batch, math.ceil(policy.resume_rate * interval))
        earliest = snapshot.now - (interval if begins else 2 * interval)
        count = min(batch - outstanding, _due(policy.resume_rate, max(pace.decided_at, earliest), snapshot.now))
    kept = Pace(batch, snapshot.total_failures, pace.outstanding, snapshot.now)
    return kept, max(0, count)


def _following(pace: Pace, snapshot: Snapshot, outstanding: int) -> int:
    """Return the batch after ``pace.batch``."""
    if snapshot.total_failures > pace.failures_seen:
        return max(1, pace.batch // 2)
    if 2 * outstanding > pace.batch:
        return pace.batch  # a larger one would only wait in the queue, where it delays other tasks
    return min(2 * pace.batch, LARGEST_BATCH)


def _due(rate: float, start: float, end: float) -> int:
    """Return how many instants of a steady ``rate`` lie between two times; over many ticks no fraction is lost."""
    return math.floor(rate * end) - math.floor(rate * start)
