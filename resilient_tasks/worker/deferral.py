"""The four operations on a waiting task: defer, resume, dead-letter, drop.

State and index first, push last: whoever can find the message can also read why it waits.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resilient_tasks.errors import DeferralExpiredError, DeferredQueueFullError, StoreError
from resilient_tasks.worker import seams
from resilient_tasks.worker.patience import PatientWriter
from resilient_tasks.worker.queues import Entry, Move, Queues, open_queues
from resilient_tasks.worker.ticket import Ticket

if TYPE_CHECKING:
    from resilient_tasks.worker.request import GatedRequest
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: State of a task's result while its message waits.
DEFERRED = "DEFERRED"

#: Deferrals that failed on the broker and are held in memory until it is back.
MOST_HELD = 10_000
#: Seconds that one deferral may wait for the store, and for the result backend.
INDEX_PATIENCE = 0.1
STATE_PATIENCE = 0.25


class Deferral:
    """Puts requests aside for the worker's main process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._queues = open_queues(runtime.app, runtime.settings.namespace)
        self._index_writer = PatientWriter("index of deferred tasks", INDEX_PATIENCE)
        self._state_writer = PatientWriter("result backend", STATE_PATIENCE)
        self._held: deque[tuple[GatedRequest, Ticket]] = deque()
        self._retrying = threading.Lock()

    def defer(self, request: GatedRequest, ticket: Ticket, *, limited: bool = True) -> None:
        """Put a request's message aside.

        Args:
            request: whose message.
            ticket: what the message shall say about itself.
            limited: the policy's ``max_deferred`` applies.

        Raises:
            DeferredQueueFullError: the queue is at the policy's ``max_deferred``.
            Exception: whatever the broker raises; the message is where it was.
        """
        self._index_writer.write(lambda: self._index(request.id, ticket))
        if request.store_errors:
            self._state_writer.write(lambda: self._write_state(request, ticket))
        limit = self._runtime.breaker(ticket.breaker).policy.max_deferred if limited else None
        try:
            mine = self._queues.defer(request.message, ticket, owned=not request.acknowledged, limit=limit)
        except DeferredQueueFullError:
            self.forget(ticket.breaker, [request.id])
            raise
        request.acknowledged = True
        if not mine:  # the broker has restored it: its other copy decides
            self.forget(ticket.breaker, [request.id])
        else:
            request.send_event("task-deferred", breaker=ticket.breaker, reason=ticket.reason, since=ticket.since)
            logger.info("Task %s[%s] deferred: %s", request.name, request.id, ticket.reason)

    def defer_or_hold(self, request: GatedRequest, ticket: Ticket, *, limited: bool = True) -> None:
        """Like :meth:`defer`, but keep the request and try again later if the broker cannot take it."""
        try:
            self.defer(request, ticket, limited=limited)
        except DeferredQueueFullError:
            raise
        except Exception as exc:  # noqa: BLE001 - any broker error: the message must not be lost
            logger.warning("Task %s[%s] cannot be deferred yet: %s", request.name, request.id, type(exc).__name__)
            self._hold(request, ticket)

    def _hold(self, request: GatedRequest, ticket: Ticket) -> None:
        if len(self._held) == MOST_HELD:
            lost, _ = self._held.popleft()
            logger.error("Task %s[%s] is no longer held: %d others are", lost.name, lost.id, MOST_HELD)
        self._held.append((request, ticket))

    def retry_held(self) -> None:
        """Try once more to put aside what could not be; stop at the first failure."""
        with self._retrying:
            for _ in range(len(self._held)):
                request, ticket = self._held.popleft()
                held = len(self._held)
                self.defer_or_hold(request, ticket, limited=False)  # it was let in before
                if len(self._held) > held:
                    return

    def forget(self, breaker: str, task_ids: Sequence[str]) -> None:
        """Take tasks off the index, as far as the store can be reached."""
        with suppress(StoreError):
            self._runtime.fleet.store.remove_deferred(breaker, task_ids)

    def _index(self, task_id: str, ticket: Ticket) -> None:
        """Best-effort: the tick's stocktaking finds a message that is missing here."""
        self._runtime.fleet.store.add_deferred(ticket.breaker, task_id, deadline=ticket.deadline or None)

    @staticmethod
    def _write_state(request: GatedRequest, ticket: Ticket) -> None:
        info = {"breaker": ticket.breaker, "since": ticket.since, "reason": ticket.reason}
        request.task.backend.store_result(request.id, info, DEFERRED, request=request.context)

    def close(self) -> None:
        """Give what is held one more chance and close the connection."""
        self.retry_held()
        if self._held:
            logger.error("%d tasks could not be deferred before shutdown", len(self._held))
        self._queues.close()


def resume(entry: Entry, epoch: int, default_queue: str) -> Move:
    """Send a waiting message back to the queue that it came from."""
    return Move(entry, entry.ticket.origin or default_queue, entry.ticket.resume(epoch))


def dead(entry: Entry, queues: Queues, reason: str) -> Move:
    """Send a waiting message to the dead-letter queue."""
    return Move(entry, queues.dead(entry.ticket.breaker), replace(entry.ticket, reason=reason))


def drop(entry: Entry) -> Move:
    """Take a waiting message off the broker for good."""
    return Move(entry, None)


def expired(entry: Entry, now: float) -> DeferralExpiredError | None:
    """Return the error of a task that has waited longer than its ``defer_for``."""
    ticket = entry.ticket
    if not ticket.deadline or now < ticket.deadline:
        return None
    return DeferralExpiredError(ticket.breaker, now - ticket.since, ticket.deadline - ticket.since)


def fail(request: Any, error: Exception) -> None:
    """Give a task that never ran its FAILURE: result, error callbacks, chord, event."""
    request.task.backend.mark_as_failure(request.id, error, request=request.context, store_result=request.store_errors)
    request.send_event("task-failed", exception=repr(error), traceback=None)
    seams.task_ready(request)
