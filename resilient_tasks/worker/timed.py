"""``TimedWriter``: writes to something that may be away, without ever waiting long for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger("resilient_tasks")


@dataclass(slots=True, eq=False)
class _Job:
    action: Callable[[], Any]
    wanted: bool = True
    done: threading.Event = field(default_factory=threading.Event)


class TimedWriter:
    """Runs writes one after the other in a thread and waits for each, but only so long.

    A result backend that is away blocks for seconds (its own retries). While a write hangs, others are
    skipped, not queued, unless ``even_late``: a state written late could overtake the task's real result.

    Args:
        name: of what is written to, for the log.
        timeout: longest time in seconds to wait for one write.
        even_late: better late than never.
        expected: errors that are logged without their traceback.
    """

    def __init__(
        self, name: str, timeout: float, *, even_late: bool = False, expected: type[Exception] = Exception
    ) -> None:
        self._name, self._timeout, self._even_late, self._expected = name, timeout, even_late, expected
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._hanging: _Job | None = None

    def write(self, action: Callable[[], Any]) -> bool:
        """Run ``action``; True if it was done in time, False if it was skipped, still runs or comes late."""
        hangs = self._hanging is not None and not self._hanging.done.is_set()
        if hangs and not self._even_late:
            return False
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="resilient-tasks-writer", daemon=True)
                self._thread.start()
        job = _Job(action)
        self._jobs.put(job)
        if job.done.wait(0 if hangs else self._timeout):
            return True
        job.wanted = self._even_late
        self._hanging = job
        return False

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job.wanted:
                    job.action()
            except Exception as exc:
                is_bug, what = not isinstance(exc, self._expected), "a task goes on without the %s: %s"
                logger.warning(what, self._name, type(exc).__name__, exc_info=is_bug)
            finally:
                job.done.set()
