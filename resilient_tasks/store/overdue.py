"""``Overdue``: tells of calls that have passed their time while they still run.

Whoever begins a call has it watched; one thread per process sleeps until the first may be overdue. It is woken
for a call only when it would otherwise sleep too long, so that watching a quick call costs next to nothing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from resilient_tasks.store.forking import renew_after_fork

logger = logging.getLogger(__name__)

_SHORTEST_SLEEP = 0.02  # seconds; many calls that begin one after the other are looked at together


class Watch:
    """One call that is watched until it ends.

    Attributes:
        told: it has been overdue, and that was told.
    """

    __slots__ = ("overdue_at", "tell", "told")

    def __init__(self, overdue_at: float, tell: Callable[[], object]) -> None:
        self.overdue_at = overdue_at
        self.tell = tell
        self.told = False


class Overdue:
    """Watches the calls of this process.

    Args:
        clock: monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start empty: the calls that the parent watches are not ours."""
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._watches: set[Watch] = set()
        self._wakes_at = math.inf

    def begin(self, seconds: float, tell: Callable[[], object]) -> Watch:
        """Watch a call that begins now.

        Args:
            seconds: after which it is overdue.
            tell: called then, once, by the watching thread; it does no I/O.
        """
        watch = Watch(self._clock() + seconds, tell)
        with self._condition:
            self._watches.add(watch)
            if watch.overdue_at < self._wakes_at:
                self._wakes_at = watch.overdue_at
                self._wake()
        return watch

    def end(self, watch: Watch) -> bool:
        """Watch a call no longer; return whether it was overdue, and has been told of."""
        with self._condition:
            self._watches.discard(watch)
            return watch.told

    def _wake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="resilient-tasks-overdue", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def _run(self) -> None:
        condition = self._condition
        while True:
            with condition:
                while self._clock() < self._wakes_at:
                    condition.wait(None if self._wakes_at == math.inf else self._wakes_at - self._clock())
                overdue = self._take_overdue()
            for watch in overdue:
                _tell(watch)

    def _take_overdue(self) -> list[Watch]:
        now = self._clock()
        overdue = [watch for watch in self._watches if watch.overdue_at <= now]
        self._watches.difference_update(overdue)
        for watch in overdue:
            watch.told = True
        first = min((watch.overdue_at for watch in self._watches), default=math.inf)
        self._wakes_at = max(first, now + _SHORTEST_SLEEP)
        return overdue


def _tell(watch: Watch) -> None:
    try:
        watch.tell()
    except Exception:
        logger.exception("an overdue call could not be told of")
