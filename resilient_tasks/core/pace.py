"""How fast deferred tasks return: slowly at first, faster while it goes well.

A batch is what is resumed in one tick, in portions spread over the tick. As long as nothing has failed in a recovery,
it doubles six times per tick: four portions each, so that a dependency with little room is overrun by no more than a
quarter of what it has just borne. Once calls fail, the batch halves, goes back quickly to nearly where it was, and
grows slowly from there: a healing dependency bears more each second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from resilient_tasks.core.model import Snapshot
from resilient_tasks.policy import BreakerPolicy

LARGEST_BATCH = 10_000
#: Per tick interval: how often the batch doubles while nothing has failed, and how many portions it is released in.
DOUBLINGS, PORTIONS = 6, 24
#: Share of a batch that may fail before that shows a dependency at its limit.
TOLERATED = 0.01
#: Shares of the batch at which calls failed last: from where on to creep, how fast, and where to creep no longer.
NEAR, CREEP, FORGOTTEN = 0.9, 0.02, 2.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a breaker's deferred tasks are being resumed; kept in the store.

    ``outstanding`` counts resumed tasks that no worker has taken up yet.
    """

    batch: int = 0
    failures_seen: int = 0  # Snapshot.total_failures when the batch was decided
    outstanding: int = 0
    decided_at: float = 0.0  # Snapshot.now when the batch was decided
    too_large: int = 0  # the batch at which calls failed last; 0: none in this recovery
    released_at: float = 0.0  # Snapshot.now when the last portion was decided


def next_pace(
    pace: Pace, snapshot: Snapshot, policy: BreakerPolicy, *, outstanding: int, interval: float
) -> tuple[Pace, int]:
    """Return the pace to keep, and how many tasks to resume now, for a breaker that admits calls and has some waiting.

    Call it at least every ``interval`` seconds, and ``PORTIONS`` times as often for small portions. The first one is
    ``trial_calls``, the ceiling ``resume_rate``; ``outstanding`` resumed tasks are not taken up yet.
    """
    now, begins = snapshot.now, pace.batch == 0 or pace.decided_at < snapshot.since
    if begins:
        pace = Pace(policy.trial_calls, snapshot.total_failures, decided_at=now, released_at=now - interval)
    else:
        pace = _following(pace, snapshot, outstanding, interval)
    rate = pace.batch / interval
    if policy.resume_rate is not None:
        pace = replace(pace, batch=min(pace.batch, math.ceil(policy.resume_rate * interval)))
        rate = min(rate, policy.resume_rate)
    due = _due(rate, max(pace.released_at, now - 2 * interval), now)
    room = max(policy.trial_calls, pace.batch // DOUBLINGS, due) - outstanding
    return replace(pace, released_at=now), max(0, min(due, room, pace.batch - outstanding))


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


def _following(pace: Pace, snapshot: Snapshot, outstanding: int, interval: float) -> Pace:
    """Return the pace with the batch that follows, if it is time for one."""
    ticks, is_clean = (snapshot.now - pace.decided_at) / interval, pace.too_large == 0
    # while nothing has failed, one failure by chance is no sign
    tolerated = TOLERATED * pace.batch if not is_clean else 1 + TOLERATED * pace.batch / DOUBLINGS
    failed = snapshot.total_failures - pace.failures_seen > tolerated
    is_time = ticks > (1 / DOUBLINGS if is_clean else 1) - 0.5 / PORTIONS
    if not (is_time or (failed and is_clean)):
        return pace
    batch, too_large = pace.batch, pace.too_large
    if failed and is_clean:
        # while it doubled, a tick has released no more than a third of the batch reached
        batch = max(1, batch // DOUBLINGS)
        too_large = 2 * batch
    elif failed:
        batch, too_large = max(1, batch // 2), batch
    elif 2 * DOUBLINGS * outstanding <= batch:  # a larger one would only wait in the queue, where it delays other tasks
        batch = min(batch + (batch if is_clean else _growth(batch, too_large)), LARGEST_BATCH)
    return replace(
        pace, batch=batch, failures_seen=snapshot.total_failures, too_large=too_large, decided_at=snapshot.now
    )


def _growth(batch: int, too_large: int) -> int:
    """Return by how much a batch may grow in one tick, once calls have failed."""
    growth, near = math.ceil(2 * math.sqrt(batch)), math.ceil(NEAR * too_large)
    if batch < near:
        return min(max(growth, batch // 2), near - batch)
    return growth if batch >= FORGOTTEN * too_large else min(growth, max(1, int(CREEP * batch)))


def _due(rate: float, start: float, end: float) -> int:
    """Return how many instants of a steady ``rate`` lie between two times; over many ticks no fraction is lost."""
    return math.floor(rate * end) - math.floor(rate * start)
