"""The sliding window of one breaker: outcomes of its calls, summed up in aligned buckets, and who has voted.

A bucket covers a tenth of the window and counts for as long as its latest call is inside the
window. So every call counts for at least the window's length, and for at most 1.1 times as long.
Times are integer milliseconds.

A bucket remembers the first hundred tasks that have blamed the dependency in it, and how: by their votes the machine
tells different tasks from one task again and again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from resilient_tasks.core.model import Calls, Outcome

_BUCKETS = 10
_SLOTS = _BUCKETS + 1  # the oldest bucket may still count when a new one begins
MOST_VOTERS = 100  # remembered per bucket


class Totals(NamedTuple):
    """Sums of outcomes; ``calls`` includes the failures and the slow ones, ``slow`` no failures.

    ``tasks`` is the number of different tasks that have failed or were slow.
    """

    calls: int = 0
    failures: int = 0
    slow: int = 0
    tasks: int = 0

    def plus(self, calls: Calls) -> Totals:
        """Return the sums after more calls (not IGNORED); with a voter, calls of a task that has been counted."""
        failed = calls.number if calls.outcome is Outcome.FAILURE else 0
        slow = calls.number if calls.outcome in (Outcome.SLOW, Outcome.OVERDUE) else 0
        return Totals(
            self.calls + calls.number,
            self.failures + failed,
            self.slow + slow,
            self.tasks + (0 if calls.voter else failed + slow),
        )

    def failed_after_all(self) -> Totals:
        """Return the sums when a call that was slow has failed in the end."""
        return self._replace(failures=self.failures + 1, slow=self.slow - 1)


@dataclass(slots=True)
class _Bucket:
    index: int
    totals: Totals
    latest: int
    votes: dict[str, Outcome] = field(default_factory=dict)  # by voter


class Vote(NamedTuple):
    """How a task has blamed the dependency last, in the bucket that remembers it."""

    voter: str
    bucket: _Bucket

    @property
    def outcome(self) -> Outcome:
        """FAILURE, SLOW or OVERDUE."""
        return self.bucket.votes[self.voter]

    def becomes(self, outcome: Outcome) -> None:
        """Remember another one."""
        self.bucket.votes[self.voter] = outcome

    def becomes_failure(self) -> None:
        """Count the slow call that it told of as a failure."""
        self.becomes(Outcome.FAILURE)
        self.bucket.totals = self.bucket.totals.failed_after_all()


@dataclass(slots=True)
class Window:
    """Buckets by slot; a slot is used again by the bucket eleven later."""

    _slots: dict[int, _Bucket] = field(default_factory=dict)

    def add(self, calls: Calls, *, now: int, length: int) -> None:
        """Count calls at ``now`` in a window of ``length`` milliseconds."""
        bucket = self._bucket(now, length)
        bucket.totals = bucket.totals.plus(calls)
        bucket.latest = now

    def remember(self, calls: Calls, *, now: int, length: int) -> None:
        """Remember how a task votes with calls that are about to be counted at ``now``."""
        bucket = self._bucket(now, length)
        if calls.voter in bucket.votes or len(bucket.votes) < MOST_VOTERS:
            bucket.votes[calls.voter] = calls.outcome

    def _bucket(self, now: int, length: int) -> _Bucket:
        width = -(-length // _BUCKETS)
        index = now // width
        bucket = self._slots.get(index % _SLOTS)
        if bucket is None or bucket.index != index:
            bucket = self._slots[index % _SLOTS] = _Bucket(index, Totals(), now)
        return bucket

    def vote(self, voter: str, *, now: int, length: int) -> Vote | None:
        """Return the latest vote of a task that counts at ``now``; None if it has none."""
        buckets = [bucket for bucket in self._live(now, length) if voter in bucket.votes]
        return Vote(voter, max(buckets, key=lambda bucket: bucket.index)) if buckets else None

    def totals(self, *, now: int, length: int) -> Totals:
        """Sum up the buckets that still count at ``now``."""
        live = [bucket.totals for bucket in self._live(now, length)]
        return Totals(*map(sum, zip(*live, strict=True)))

    def _live(self, now: int, length: int) -> list[_Bucket]:
        # The upper bound forgets buckets "from the future" after the clock was set back by a lot.
        return [bucket for bucket in self._slots.values() if now - length < bucket.latest <= now + length]

    def clear(self) -> None:
        """Forget everything."""
        self._slots.clear()
