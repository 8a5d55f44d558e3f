"""Deferred tasks of one breaker, as ``LocalStore`` keeps them: since when they wait, until when they may."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from resilient_tasks.core.pace import Pace


class Times:
    """Ids with a time each, and the earliest of them at once."""

    def __init__(self) -> None:
        self._time_of: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []  # may hold outdated entries

    def __len__(self) -> int:
        return len(self._time_of)

    def __contains__(self, key: object) -> bool:
        return key in self._time_of

    def put(self, key: str, at: int) -> None:
        """Set the time of ``key``."""
        self._time_of[key] = at
        heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._time_of) + 100:
            self._heap = [(time, key) for key, time in self._time_of.items()]
            heapify(self._heap)

    def discard(self, key: str) -> None:
        """Forget ``key``, if it is known."""
        self._time_of.pop(key, None)

    def earliest(self) -> tuple[int, str] | None:
        """Return the earliest time and its key, None if there is none."""
        while self._heap and self._time_of.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0] if self._heap else None

    def earliest_time(self) -> int | None:
        """Return the earliest time, None if there is none."""
        earliest = self.earliest()
        return earliest and earliest[0]


@dataclass(slots=True)
class Waiting:
    """A breaker's deferred tasks and how fast they are resumed."""

    deferred: Times = field(default_factory=Times)
    deadlines: Times = field(default_factory=Times)
    pace: Pace = field(default_factory=Pace)
