"""The sliding window of one breaker: outcomes of its calls, summed up in aligned buckets.

A bucket covers a tenth of the window and counts for as long as its latest call is inside the
window. So every call counts for at least the window's length, and for at most 1.1 times as long.
Times are integer milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from resilient_tasks.core.model import Outcome

_BUCKETS = 10
_SLOTS = _BUCKETS + 1  # the oldest bucket may still count when a new one begins


class Totals(NamedTuple):
    """Sums of outcomes; ``calls`` includes the failures and the slow ones."""

    calls: int = 0
    failures: int = 0
    slow: int = 0

    def plus(self, outcome: Outcome, count: int) -> Totals:
        """Return the sums after ``count`` more calls with this outcome (not IGNORED)."""
        return Totals(
            self.calls + count,
            self.failures + (count if outcome is Outcome.FAILURE else 0),
            self.slow + (count if outcome is Outcome.SLOW else 0),
        )


@dataclass(slots=True)
class _Bucket:
    index: int
    totals: Totals
    latest: int


@dataclass(slots=True)
class Window:
    """Buckets by slot; a slot is used again by the bucket eleven later."""

    _slots: dict[int, _Bucket] = field(default_factory=dict)

    def add(self, outcome: Outcome, count: int, *, now: int, length: int) -> None:
        """Count ``count`` calls at ``now`` in a window of ``length`` milliseconds."""
        width = -(-length // _BUCKETS)
        index = now // width
        bucket = self._slots.get(index % _SLOTS)
        if bucket is None or bucket.index != index:
            bucket = self._slots[index % _SLOTS] = _Bucket(index, Totals(), now)
        bucket.totals = bucket.totals.plus(outcome, count)
        bucket.latest = now

    def totals(self, *, now: int, length: int) -> Totals:
        """Sum up the buckets that still count at ``now``."""
        # The upper bound forgets buckets "from the future" after the clock was set back by a lot.
        live = [b.totals for b in self._slots.values() if now - length < b.latest <= now + length]
        return Totals(sum(t.calls for t in live), sum(t.failures for t in live), sum(t.slow for t in live))

    def clear(self) -> None:
        """Forget everything."""
        self._slots.clear()
