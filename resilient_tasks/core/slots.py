"""Slots: leased rights to be one of the calls in flight, of which a breaker with a limit has only so many.

A slot is taken for one call, renewed while it runs, and freed at its end; that of a dead process runs out. Tasks that
find none wait in the deferred queue.

The limit may be adaptive: every success adds one while at least half of it is used, every failure or overrun takes
a tenth. After the first of these a limit's worth of successes adds one, or a small limit would mostly be exceeded.

Times are integer milliseconds on the store's clock. ``store/lua/lib/slots.lua`` has the same functions: change the two
together, a property test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from resilient_tasks.core.model import Outcome


@dataclass(slots=True)
class Slots:
    """The slots of one breaker, and its adaptive limit."""

    leases: dict[str, int] = field(default_factory=dict)  # who holds a slot -> lease's end
    learned: int = 0  # the adaptive limit; 0 before anything was learned
    credit: int = 0  # successes since the adaptive limit last changed
    backed_off: bool = False  # it has been exceeded once

    def in_flight(self, now: int) -> int:
        """Return the number of slots that are held."""
        return sum(end > now for end in self.leases.values())

    def take(self, holder: str, lease: int, *, now: int) -> None:
        """Give ``holder`` a slot."""
        end = max(self._end(holder), now + lease)
        self.leases = {other: other_end for other, other_end in self.leases.items() if other_end > now}
        self.leases[holder] = end

    def holds(self, holder: str, now: int) -> bool:
        """Return whether ``holder`` has a slot."""
        return self._end(holder) > now

    def give_up(self, holder: str) -> None:
        """Free a slot, if it is held."""
        self.leases.pop(holder, None)

    def _end(self, holder: str) -> int:
        return self.leases.get(holder, 0)

    def size(self, least: int, most: int) -> int:
        """Return the limit: ``most``, or if ``least`` is given the adaptive one between the two."""
        return min(max(self.learned, least), most) if least else most

    def learn(self, outcome: Outcome, count: int, *, now: int, least: int, most: int) -> None:
        """Adapt the limit to ``count`` equal outcomes of calls."""
        limit = self.size(least, most)
        if outcome is not Outcome.SUCCESS:
            self.learned, self.backed_off, self.credit = _shrunk(limit, count, least), True, 0
        elif 2 * self.in_flight(now) >= limit:
            self._grow(limit, count, most)

    def _grow(self, limit: int, count: int, most: int) -> None:
        if not self.backed_off:
            self.learned = min(limit + count, most)
            return
        self.credit += count
        while self.credit >= limit and limit < most:
            self.credit -= limit
            limit += 1
        self.learned, self.credit = limit, min(self.credit, limit)


def _shrunk(limit: int, count: int, least: int) -> int:
    while count > 0 and limit > least:
        limit, count = max(least, limit * 9 // 10), count - 1
    return limit
