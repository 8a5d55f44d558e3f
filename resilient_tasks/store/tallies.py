"""``Tallies``: what this process counts for the history, added up here and told about once a second."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from resilient_tasks.errors import StoreError
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.history import History
from resilient_tasks.store.keys import may_be_in_a_key

TELLING = 1.0  # seconds from the first count to the next telling, and between two tries


@dataclass(slots=True)
class Tally:
    """What was counted about one breaker: sums and peaks by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)


class Tallies:
    """Counts of one process. However long the store is away, they take no more room than kinds of counts.

    Args:
        history: what is told; None: nobody, and nothing is counted.
        clock: monotonic clock in seconds.

    Attributes:
        due_at: on the clock, when to tell; None while there is nothing to tell.
    """

    def __init__(self, history: History | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = history
        self._clock = clock
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start empty: what was counted before a fork is the parent's to tell."""
        self._lock = threading.Lock()
        self._teller = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._counted: dict[str, Tally] = {}
        self._untold: dict[str, Tally] = {}  # sent already, without an answer: sent again under the same number
        self._number = 0
        self.due_at: float | None = None

    def add(self, name: str, kind: str, count: int = 1, *, peak: tuple[str, float] | None = None) -> bool:
        """Count something about a breaker; from any thread, without I/O.

        Args:
            name: of the breaker.
            kind: of the count, from :mod:`resilient_tasks.core.counts`.
            count: how many.
            peak: kind and seconds of which an outage keeps the highest.

        Returns:
            Whether this is the first count since the last telling: :attr:`due_at` is now set. What no breaker can
            be called, as in an error of a user's own making, is not counted.
        """
        if self._history is None:
            return False
        with self._lock:
            tally = self._counted.get(name)
            if tally is None:
                if not may_be_in_a_key(name):
                    return False
                tally = self._counted[name] = Tally()
            tally.counts[kind] += count
            if peak is not None:
                tally.peaks[peak[0]] = max(tally.peaks.get(peak[0], 0), round(peak[1] * 1000))
            begins = self.due_at is None
            if begins:
                self.due_at = self._clock() + TELLING
            return begins

    def hasten(self) -> None:
        """Have it told as soon as possible, if there is anything to tell."""
        if self.due_at is not None:
            self.due_at = self._clock()

    def tell(self) -> None:
        """Tell all that was counted; what the store does not confirm is told again, and counted once.

        Raises:
            StoreError: the store is away; the next telling makes up for it.
        """
        while self._history is not None and (batch := self._next_batch()):
            try:
                self._history.tally(self._teller, self._number, batch)
            except StoreError:
                self.due_at = self._clock() + TELLING
                raise
            self._untold = {}

    def _next_batch(self) -> dict[str, Tally]:
        with self._lock:
            if not self._untold:
                self._untold, self._counted = self._counted, {}
                self._number = max(self._number + 1, time.time_ns() // 1_000_000)
                self.due_at = None
            return self._untold
