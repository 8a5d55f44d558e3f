"""``Readings``: a fresh reading of all breakers at hand, for scrapes that must not wait for the store.

A thread reads when somebody asks, and goes on for a while, so that a fleet too large to be read within a scrape's
patience is told of as it was a few seconds ago. When nobody asks any more it leaves the store alone, and who asks
after that waits longer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from resilient_tasks.errors import StoreError
from resilient_tasks.monitor.metrics import READ_DURATION, UP, VIEW_AGE
from resilient_tasks.store.forking import renew_after_fork

logger = logging.getLogger("resilient_tasks")

T = TypeVar("T")

PATIENCE = 0.1  # seconds that a scrape may wait for a reading made for it
PATIENCE_AT_FIRST = 2.0  # the same where there is none of late
FRESH = 0.25  # seconds for which a reading counts as made just now: a collection may ask once per metric
REFRESH = 5.0  # seconds between two readings that nobody has asked for
OLD = 2 * REFRESH  # seconds after which a reading is not of late
INTEREST = 300.0  # seconds after which somebody who has asked is taken to be gone


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """All breakers as the store knew them at one instant.

    Args:
        content: what was made of them; None if the store did not answer.
        answered_at: when the store last answered, on the monotonic clock; None if it never has.
        took: seconds that the reading took.
    """

    content: T | None = None
    answered_at: float | None = None
    took: float = 0.0

    @property
    def up(self) -> bool:
        """Whether the store has answered."""
        return self.content is not None

    @property
    def age(self) -> float:
        """Seconds since the store last answered; infinite if it never has."""
        return float("inf") if self.answered_at is None else max(0.0, time.monotonic() - self.answered_at)

    def health(self) -> dict[str, float]:
        """Return what metrics tell of the reading itself."""
        return {UP: float(self.up), VIEW_AGE: self.age, READ_DURATION: self.took}


class Readings(Generic[T]):
    """Reads in a thread of its own; whoever asks gets the latest reading at once, or nearly so.

    Args:
        read: reads all breakers from the store, and makes of them what is asked for; may raise ``StoreError``.
        patience: longest time in seconds for which :meth:`latest` waits for a reading of its own where there is one
            of late; 0: it never waits.
    """

    def __init__(self, read: Callable[[], T], patience: float = PATIENCE) -> None:
        self._read = read
        self._patience = patience
        self._latest: Reading[T] = Reading()
        self._trouble: type[Exception] | None = None
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Read in a thread of the child's own."""
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked = self._served = 0
        self._interest_ends = 0.0
        self._made_at = float("-inf")

    def begin(self) -> None:
        """Read for whoever will ask next."""
        with self._condition:
            self._ask()

    def latest(self) -> Reading[T]:
        """Return a reading made just now if that takes no longer than ``patience``, else the one before."""
        with self._condition:
            age = time.monotonic() - self._made_at
            if age < FRESH:
                return self._latest
            mine = self._ask()
            patience = self._patience and max(self._patience, PATIENCE_AT_FIRST if age > OLD else 0)
            if self._latest.took <= patience:
                self._condition.wait_for(lambda: self._served >= mine, patience)
            return self._latest

    def _ask(self) -> int:
        """Have the thread read; return the number of this wish."""
        self._asked += 1
        self._interest_ends = time.monotonic() + INTEREST
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="resilient-tasks-readings", daemon=True)
            self._thread.start()
        self._condition.notify_all()
        return self._asked

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._asked > self._served, self._pause())
                asked = self._asked
            reading = self._make()
            with self._condition:
                self._latest, self._served, self._made_at = reading, asked, time.monotonic()
                self._condition.notify_all()

    def _pause(self) -> float | None:
        return REFRESH if time.monotonic() < self._interest_ends else None

    def _make(self) -> Reading[T]:
        began = time.monotonic()
        try:
            content = self._read()
        except Exception as error:  # noqa: BLE001 - whatever it is, the next reading may succeed
            self._tell(error)
            return replace(self._latest, content=None, took=time.monotonic() - began)
        self._trouble = None
        return Reading(content, answered_at=began, took=time.monotonic() - began)

    def _tell(self, error: Exception) -> None:
        """Log what went wrong, once while it lasts; a store that is away is told by the metrics themselves."""
        if type(error) is not self._trouble:
            level = logging.WARNING if isinstance(error, StoreError) else logging.ERROR
            logger.log(level, "metrics cannot be read: %s", error, exc_info=level == logging.ERROR)
        self._trouble = type(error)
