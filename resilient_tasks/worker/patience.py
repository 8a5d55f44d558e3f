"""Writing to something that may be away without ever waiting long for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger("resilient_tasks")


class PatientWriter:
    """Runs writes one after the other in a thread and waits for each, but only so long.

    A result backend that is away blocks for seconds (its own retries). While a write hangs, others are
    skipped, not queued, unless ``even_late``: a state written late could overtake the task's real result.

    Args:
        name: of what is written to, for the log.
        patience: longest time in seconds to wait for one write.
        even_late: better late than never.
    """

    def __init__(self, name: str, patience: float, *, even_late: bool = False) -> None:
        self._name = name
        self._patience = patience
        self._even_late = even_late
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._hanging: _Job | None = None

    def write(self, action: Callable[[], Any]) -> bool:
        """Run ``action``; True if it was done in time, False if it was skipped, still runs or comes late."""
        hangs = self._hanging is not None and not self._hanging.done.is_set()
        if hangs and not self._even_late:
            return False
        self._ensure_thread()
        job = _Job(action, self._name)
        self._jobs.put(job)
        if job.done.wait(0 if hangs else self._patience):
            return True
        job.wanted = self._even_late
        self._hanging = job
        return False

    def _ensure_thread(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="resilient-tasks-writer", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            self._jobs.get().run()


class _Job:
    """One write; unwanted once its writer has given up on it."""

    def __init__(self, action: Callable[[], Any], target: str) -> None:
        self._action = action
        self._target = target
        self.wanted = True
        self.done = threading.Event()

    def run(self) -> None:
        try:
            if self.wanted:
                self._action()
        except Exception as exc:  # noqa: BLE001 - whatever it raises, a deferral goes on without it
            logger.warning("a deferral goes on without the %s: %s", self._target, type(exc).__name__)
        finally:
            self.done.set()
