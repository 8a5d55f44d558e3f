"""``Errands``: what may block is done by a thread, so that Flower's event loop never waits."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_MOST_WAITING = 1_000


class NoAnswerError(Exception):
    """Store or broker did not answer in time. What had begun may still come about."""


class Errands:
    """Runs functions one after the other in one daemon thread, which keeps nobody from exiting.

    Args:
        where: who is asked, for error messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._waiting: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue(_MOST_WAITING)
        self._busy_since: float | None = None
        threading.Thread(target=self._serve, name=f"resilient-tasks-{where}", daemon=True).start()

    async def run(self, errand: Callable[[], T], *, patience: float) -> T:
        """Return what ``errand`` returns, or raise what it raises.

        Args:
            errand: called in the thread.
            patience: longest wait in seconds; what has not begun by then is not done at all.

        Raises:
            NoAnswerError: it took longer, or what somebody else has asked for already takes longer; then at once.
        """
        self._check_answers(patience)
        future: Future[T] = Future()
        try:
            self._waiting.put_nowait((future, errand))
            return await asyncio.wait_for(asyncio.wrap_future(future), patience)
        except (queue.Full, asyncio.TimeoutError):
            raise NoAnswerError(f"the {self._where} did not answer within {patience:g} s") from None

    def _check_answers(self, patience: float) -> None:
        busy_since = self._busy_since
        if busy_since is not None and (busy_for := time.monotonic() - busy_since) > patience:
            raise NoAnswerError(f"the {self._where} has not answered for {busy_for:.0f} s")

    def _serve(self) -> None:
        while True:
            self._busy_since = None
            future, errand = self._waiting.get()
            self._busy_since = time.monotonic()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(errand())
                except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
                    future.set_exception(error)
