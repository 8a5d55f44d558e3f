"""``Mailer``: sends what is worth sending, but not worth waiting for."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable

from resilient_tasks.store.forking import renew_after_fork

logger = logging.getLogger("resilient_tasks")

MOST_WAITING = 1_000
EXIT_PATIENCE = 2.0  # seconds that the end of the process may wait for the last letters


class Mailer:
    """Runs actions one after the other in a daemon thread, best-effort: what is too much is dropped."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)
        atexit.register(self._finish)

    def after_fork(self) -> None:
        """Start empty: what waited at a fork is the parent's to send."""
        self._letters: queue.Queue[Callable[[], object]] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def post(self, action: Callable[[], object]) -> None:
        """Run ``action`` soon; never blocks, never raises."""
        try:
            self._letters.put_nowait(action)
        except queue.Full:
            logger.warning("an event was dropped: %d others wait to be sent", MOST_WAITING)
            return
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._deliver, name="resilient-tasks-mailer", daemon=True)
                self._thread.start()

    def _deliver(self) -> None:
        letters = self._letters
        while True:
            action = letters.get()
            try:
                action()
            except Exception as exc:  # noqa: BLE001 - whatever the broker raises
                logger.warning("an event was not sent: %s", type(exc).__name__)
            finally:
                letters.task_done()

    def _finish(self) -> None:
        deadline = time.monotonic() + EXIT_PATIENCE
        while self._letters.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)
