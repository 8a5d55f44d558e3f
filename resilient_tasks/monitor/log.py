"""Structured fields of log lines, and a limit on lines that repeat."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable


def about(task_id: str, task: str, breaker: str = "") -> dict[str, str]:
    """Return the structured fields of a line about a task, which may wait for a breaker, for ``extra=``."""
    fields = {"task_id": task_id, "task": task}
    return {**fields, "breaker": breaker} if breaker else fields


class Throttle:
    """Lets ``most`` lines of a kind pass in each interval, in seconds, and counts the others; for several threads."""

    def __init__(self, most: int, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._interval, self._clock = most, interval, clock
        self._lock = threading.Lock()
        self._began: dict[str, float] = {}
        self._seen: Counter[str] = Counter()

    def admits(self, kind: str) -> bool:
        with self._lock:
            self._began.setdefault(kind, self._clock())
            self._seen[kind] += 1
            return self._seen[kind] <= self._most

    def take_suppressed(self, *, early: bool = False) -> dict[str, int]:
        """End the intervals that are over, or all; return how many lines of each kind did not pass in them, if any."""
        with self._lock:
            over = [kind for kind, began in self._began.items() if early or self._clock() >= began + self._interval]
            for kind in over:
                del self._began[kind]
            seen = {kind: self._seen.pop(kind) for kind in over}
        return {kind: count - self._most for kind, count in seen.items() if count > self._most}
