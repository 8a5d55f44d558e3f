"""``Follower``: the thread that keeps a process's view of all breakers fresh."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Store

if TYPE_CHECKING:
    from resilient_tasks.store.view import View

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.5  # seconds between two reads of all states, and before a failed read is tried again


class Follower:
    """Hears of changes, and reads all states twice a second, which makes up for lost messages.

    Args:
        store: where changes are heard.
        view: what is kept fresh.
    """

    def __init__(self, store: Store, view: View) -> None:
        self._store = store
        self._view = view
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    @property
    def has_begun(self) -> bool:
        """Whether it was ever started."""
        return self._thread is not None

    def start(self) -> None:
        """Begin to follow, if it does not already; called by one thread at a time."""
        if self._thread is not None and self._thread.is_alive() and not self._stopped.is_set():
            return
        self._stopped = threading.Event()
        thread = threading.Thread(target=self._follow, name="resilient-tasks-view", daemon=True)
        with suppress(RuntimeError):  # the interpreter is shutting down: there is no future to follow
            thread.start()
            self._thread = thread

    def stop(self, timeout: float) -> None:
        """Stop, waiting at most ``timeout`` seconds for the thread."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _follow(self) -> None:
        stopped = self._stopped
        while not stopped.is_set():
            try:
                self._hear_changes(stopped)
            except StoreError as error:
                logger.debug("the view is stale: %s", error)
            except Exception:
                if not stopped.is_set():  # else the connection was closed under our feet
                    logger.exception("the view could not be refreshed; trying again")
            stopped.wait(POLL_INTERVAL)

    def _hear_changes(self, stopped: threading.Event) -> None:
        self._view.refresh()
        read_at = time.monotonic()
        for snapshot in self._store.changes(timeout=POLL_INTERVAL):
            if snapshot is not None:
                self._view.update(snapshot)
            if stopped.is_set():
                return
            if time.monotonic() >= read_at + POLL_INTERVAL:
                self._view.refresh()
                read_at = time.monotonic()
