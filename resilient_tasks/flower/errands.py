"""``Errands``: what may block is done by a thread, so that Flower's event loop never waits."""

from __future__ import annotations

import asyncio
import queue
import threading
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
        threading.Thread(target=self._serve, name=f"resilient-tasks-{where}", daemon=True).start()

    async def run(self, errand: Callable[[], T], *, patience: float) -> T:
        """Return what ``errand`` returns, or raise what it raises.

        Args:
            errand: called in the thread.
            patience: longest wait in seconds; what has not begun by then is not done at all.

        Raises:
            NoAnswerError: it took longer, or too many others wait.
        """
        future: Future[T] = Future()
        try:
            self._waiting.put_nowait((future, errand))
            return await asyncio.wait_for(asyncio.wrap_future(future), patience)
        except (queue.Full, asyncio.TimeoutError):
            raise NoAnswerError(f"the {self._where} did not answer within {patience:g} s") from None

    def _serve(self) -> None:
        while True:
            future, errand = self._waiting.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(errand())
                except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
                    future.set_exception(error)
