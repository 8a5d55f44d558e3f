"""``BackgroundQueue``: sends events and signals without delaying the caller."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable

from resilient_tasks.store.forking import renew_after_fork

logger = logging.getLogger("resilient_tasks")

MOST_WAITING = 1_000
EXIT_TIMEOUT = 2.0  # seconds that the end of the process may wait for what is left


class BackgroundQueue:
    """Runs actions one after the other in a daemon thread, best-effort: actions beyond its size are dropped.

    Args:
        what: what it sends, a plural noun for the log.
        most_waiting: actions that may wait.
    """

    def __init__(self, what: str, most_waiting: int = MOST_WAITING) -> None:
        self._what = what
        self._most_waiting = most_waiting
        self.after_fork()
        renew_after_fork(self)
        _queues.add(self)

    def after_fork(self) -> None:
        """Start empty: what waited at a fork is the parent's to send."""
        self._actions: queue.Queue[Callable[[], object]] = queue.Queue(self._most_waiting)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._dropped = 0  # since the queue was last empty

    def submit(self, action: Callable[[], object]) -> None:
        """Run ``action`` soon; never blocks, never raises."""
        with self._lock:
            try:
                self._actions.put_nowait(action)
            except queue.Full:
                self._dropped += 1
                if self._dropped == 1:
                    logger.warning("%s are dropped: %d others wait to be sent", self._what, self._most_waiting)
                return
            if self._thread is None or not self._thread.is_alive():
                self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"resilient-tasks-{self._what}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            logger.debug("%s are no longer sent: the process ends", self._what)
        else:
            self._thread = thread

    def _run(self) -> None:
        actions = self._actions
        while True:
            action = actions.get()
            try:
                action()
            except Exception as exc:  # noqa: BLE001 - whatever a broker or a receiver raises
                logger.warning("one of the %s was not sent: %s", self._what, type(exc).__name__)
            finally:
                actions.task_done()
            if self._dropped and actions.empty():
                with self._lock:
                    dropped, self._dropped = self._dropped, 0
                logger.warning("%d %s were dropped", dropped, self._what)

    def finish(self, give_up_at: float) -> None:
        """Wait until everything is sent, at most until ``give_up_at`` on the monotonic clock; log what is not."""
        while self._actions.unfinished_tasks and time.monotonic() < give_up_at:
            time.sleep(0.01)
        if self._actions.unfinished_tasks:
            logger.warning("%s not sent at the end of the process: %d", self._what, self._actions.unfinished_tasks)


_queues: weakref.WeakSet[BackgroundQueue] = weakref.WeakSet()


def finish_all() -> None:
    """Wait a moment for what is left in all queues, before a process ends."""
    give_up_at = time.monotonic() + EXIT_TIMEOUT
    for each in list(_queues):
        each.finish(give_up_at)


atexit.register(finish_all)
