"""``Tallies``: what this process counts for the history, added up here and sent about once a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from resilient_tasks.core.counts import Tally
from resilient_tasks.errors import StoreError
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.history import History
from resilient_tasks.store.keys import may_be_in_a_key

INTERVAL = 1.0  # seconds from the first count until it is sent, and between two tries
MOST_NAMES = (
    40  # causes, or sources of fallbacks, of one breaker; one too many counts as "other": they are other people's
)


class Tallies:
    """Counts of one process. However long the store is away, they take no more room than kinds of counts.

    Args:
        history: where counts are sent; None: nothing is counted.
        clock: monotonic clock in seconds.

    Attributes:
        due_at: on the clock, when to send; None while there is nothing to send.
    """

    def __init__(self, history: History | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = history
        self._clock = clock
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start empty: what was counted before a fork is the parent's to send."""
        self._lock = threading.Lock()
        self._counted: dict[str, Tally] = {}
        self._names: dict[str, set[str]] = {}  # kinds with a name, by breaker
        self.due_at: float | None = None

    def add(self, name: str, kind: str, count: int = 1, *, peak: tuple[str, float] | None = None) -> bool:
        """Count something about a breaker; from any thread, without I/O.

        Args:
            name: of the breaker.
            kind: of the count, from :mod:`resilient_tasks.core.counts`.
            count: how many.
            peak: kind and seconds of which an outage keeps the highest.

        Returns:
            Whether this is the first count since they were sent: :attr:`due_at` is now set. What no breaker can
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
            tally.counts[self._bounded(name, kind)] += count
            if peak is not None:
                tally.peaks[peak[0]] = max(tally.peaks.get(peak[0], 0), round(peak[1] * 1000))
            begins = self.due_at is None
            if begins:
                self.due_at = self._clock() + INTERVAL
            return begins

    def _bounded(self, name: str, kind: str) -> str:
        prefix, separator, _ = kind.partition(":")
        names = self._names.setdefault(name, set()) if separator else set()
        if not separator or kind in names:
            return kind
        if len(names) >= MOST_NAMES:
            return f"{prefix}:other"
        names.add(kind)
        return kind

    def hasten(self) -> None:
        """Have it sent as soon as possible, if there is anything to send."""
        if self.due_at is not None:
            self.due_at = self._clock()

    def send(self) -> None:
        """Send all that was counted.

        Raises:
            StoreError: the store is away; what was not confirmed is sent again, and may then count twice.
        """
        with self._lock:
            counted, self._counted, self.due_at = self._counted, {}, None
        if self._history is None or not counted:
            return
        try:
            self._history.tally(counted)
        except StoreError:
            with self._lock:
                for name, tally in self._counted.items():
                    tally.merge(counted.get(name, Tally()))
                self._counted = {**counted, **self._counted}
                self.due_at = self._clock() + INTERVAL
            raise
