"""Writing ``DEFERRED`` to the result backend without ever waiting long for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger("resilient_tasks")

DEFERRED = "DEFERRED"
PATIENCE = 0.25  # seconds a deferral may wait for the result backend


class PatientWriter:
    """Runs writes one after the other in a thread and waits for each, but only so long.

    A result backend that is away blocks for seconds (its own retries). While a write hangs, further
    ones are skipped, not queued: a DEFERRED written late could overtake the task's real result.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._jobs: SimpleQueue[tuple[Callable[[], Any], threading.Event]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending: threading.Event | None = None
        self._lock = threading.Lock()

    def write(self, job: Callable[[], Any]) -> bool:
        """Run ``job``; True if it was done in time, False if it was skipped, failed or still runs."""
        with self._lock:
            if self._pending is not None and not self._pending.is_set():
                return False
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="resilient-tasks-results", daemon=True)
                self._thread.start()
            done = self._pending = threading.Event()
            self._jobs.put((job, done))
        return done.wait(self._patience)

    def _work(self) -> None:
        while True:
            job, done = self._jobs.get()
            try:
                job()
            except Exception as exc:  # noqa: BLE001 - whatever the backend raises, a deferral goes on without it
                logger.warning("result backend did not take %s: %s", DEFERRED, type(exc).__name__)
            finally:
                done.set()
