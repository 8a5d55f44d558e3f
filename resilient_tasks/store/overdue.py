"""``Overdue``: reports calls that have passed their time while they still run, again each time that they pass it.

One thread per process sleeps until the first call may be overdue. It is woken for a call only when it would otherwise
sleep too long, so that watching a quick call costs next to nothing.
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
        reports: how often it has been reported.
    """

    __slots__ = ("at", "report", "reports", "seconds")

    def __init__(self, at: float, seconds: float, report: Callable[[], object]) -> None:
        self.at, self.seconds, self.report = at, seconds, report
        self.reports = 0


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
        self._watches: dict[Watch, None] = {}
        self._wakes_at = math.inf

    def begin(self, seconds: float, report: Callable[[], object], *, once: bool = False) -> Watch:
        """Watch a call that begins now.

        Args:
            seconds: after which it is overdue, and then again.
            report: called each time by the watching thread; it does no I/O.
            once: call it the first time only.
        """
        watch = Watch(self._clock() + seconds, math.inf if once else seconds, report)
        self._watches[watch] = None
        if watch.at < self._wakes_at:  # read without the lock: the thread sets it before it looks at what is watched
            self._wake(watch.at)
        return watch

    def end(self, watch: Watch) -> bool:
        """Watch a call no longer; return whether it has been reported."""
        self._watches.pop(watch, None)
        if watch.reports or self._clock() < watch.at:
            return watch.reports > 0
        with self._condition:  # the thread may be at it
            return watch.reports > 0

    def _wake(self, at: float) -> None:
        with self._condition:
            self._wakes_at = min(self._wakes_at, at)
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
                _report(watch)

    def _take_overdue(self) -> list[Watch]:
        self._wakes_at = math.inf
        now = self._clock()
        watches = list(self._watches)
        overdue = [watch for watch in watches if watch.at <= now and watch in self._watches]
        for watch in overdue:
            watch.reports += 1
            watch.at = max(watch.at, now - watch.seconds) + watch.seconds  # a process that was frozen does not make up
        if watches:
            self._wakes_at = max(min(watch.at for watch in watches), now + _SHORTEST_SLEEP)
        return overdue


def _report(watch: Watch) -> None:
    try:
        watch.report()
    except Exception:
        logger.exception("an overdue call could not be reported")


#: Of this process.
overdue = Overdue()
