"""The four operations on a waiting task: defer, resume, dead-letter, drop.

State and index first, push last: whoever can find the message can also read why it waits.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery.exceptions import TaskRevokedError
from celery.states import PENDING

from resilient_tasks.core.memory import MemoryLimit
from resilient_tasks.errors import DeferralExpiredError, DeferredQueueFullError, ResilienceError, StoreError
from resilient_tasks.monitor.events import TASK_DEFERRED, TASK_RESUMED
from resilient_tasks.worker import seams
from resilient_tasks.worker.broker import open_queues
from resilient_tasks.worker.events import EventSender
from resilient_tasks.worker.intake import UNDECODABLE
from resilient_tasks.worker.memory import MemoryGuard
from resilient_tasks.worker.patience import PatientWriter
from resilient_tasks.worker.queues import Choose, Entry, Move, Queues
from resilient_tasks.worker.request import GatedRequest
from resilient_tasks.worker.revokes import revoked_among
from resilient_tasks.worker.ticket import Ticket

if TYPE_CHECKING:
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: State of a task's result while its message waits.
DEFERRED = "DEFERRED"

#: Deferrals that failed on the broker and are held in memory until it is back.
MOST_HELD = 10_000
#: Waiting tasks that are looked at in one go.
PAGE = 500
#: Seconds that one deferral may wait for the store, and for the result backend.
INDEX_PATIENCE = 0.1
STATE_PATIENCE = 0.25


class Deferral:
    """Puts requests aside for the worker's main process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._queues = open_queues(runtime.app, runtime.settings.namespace)
        self._memory = MemoryGuard(
            MemoryLimit.parse(runtime.settings.store_memory_limit),
            {"broker": self._queues.memory, "store": lambda: runtime.fleet.ledger.memory()},  # noqa: PLW0108 - it may change
        )
        self._index_writer = PatientWriter("index of deferred tasks", INDEX_PATIENCE, even_late=True)
        self._state_writer = PatientWriter("result backend", STATE_PATIENCE)
        self._held: deque[tuple[GatedRequest, Ticket]] = deque()
        self._retrying = threading.Lock()

    def defer(self, request: GatedRequest, ticket: Ticket, *, limited: bool = True) -> None:
        """Put a request's message aside: to wait, or for good if its ticket says that the task is dead.

        Args:
            request: whose message.
            ticket: what the message shall say about itself.
            limited: ``max_deferred`` and the memory limit apply.

        Raises:
            DeferredQueueFullError: the queue is at the policy's ``max_deferred``, or a server at its memory limit.
            Exception: whatever the broker raises; the message is where it was.
        """
        if ticket.died_at:
            self._dead_letter(request, ticket)
        else:
            self._defer(request, ticket, limited=limited)

    def _dead_letter(self, request: GatedRequest, ticket: Ticket) -> None:
        self._queues.defer(request.message, ticket, owned=not request.acknowledged, limit=None)
        request.acknowledged = True
        logger.warning("Task %s[%s] is dead-lettered: %s", request.name, request.id, ticket.reason)

    def _defer(self, request: GatedRequest, ticket: Ticket, *, limited: bool) -> None:
        memory_limit = self._memory.exceeded() if limited else None
        if memory_limit is not None:
            raise DeferredQueueFullError(ticket.breaker, memory_limit=memory_limit)
        self._index_writer.write(lambda: self._index(request.id, ticket))
        info = {"breaker": ticket.breaker, "since": ticket.since, "reason": ticket.reason}
        self._write_state(request, DEFERRED, info)
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
            request.send_event(TASK_DEFERRED, breaker=ticket.breaker, reason=ticket.reason, since=ticket.since)
            logger.info("Task %s[%s] deferred: %s", request.name, request.id, ticket.reason)

    def keep_apart(self, message: Any, reason: str) -> None:
        """Move a delivered message that is no task's to the dead letters.

        Raises:
            Exception: whatever the broker raises; the message is where it was.
        """
        ticket = Ticket(breaker=UNDECODABLE, origin=(message.delivery_info or {}).get("routing_key") or "")
        ticket = ticket.die(self._runtime.fleet.view.server_now(), reason)
        self._queues.defer(message, ticket, owned=True, limit=None)

    def has_room(self, breaker: str) -> bool:
        """Whether one more task of a breaker may be deferred."""
        limit = self._runtime.breaker(breaker).policy.max_deferred
        waiting = 0 if limit is None else self._queues.size(self._queues.deferred(breaker))
        return self._memory.exceeded() is None and (limit is None or waiting < limit)

    def put_back(self, request: GatedRequest, queue: str, ticket: Ticket) -> None:
        """Put a request's message back to its queue, as the next to be taken where the broker can do that.

        Raises:
            Exception: whatever the broker raises; the message is where it was.
        """
        self._write_state(request, PENDING)
        request.send_event(TASK_RESUMED, exception="no room to defer", traceback=None)
        self._queues.put_back(request.message, queue, ticket, owned=not request.acknowledged)
        request.acknowledged = True

    def defer_or_hold(self, request: GatedRequest, ticket: Ticket, *, limited: bool = True) -> None:
        """Like :meth:`defer`, but keep the request and try again later if the broker cannot take it."""
        if self._held and limited:  # the broker was away a moment ago: do not wait for it once per task
            self._hold(request, ticket)
            return
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
            self._runtime.fleet.ledger.remove_deferred(breaker, task_ids)

    def _index(self, task_id: str, ticket: Ticket) -> None:
        """Best-effort: the tick's stocktaking finds a message that is missing here."""
        self._runtime.fleet.ledger.add_deferred(ticket.breaker, task_id, deadline=ticket.ends_at)

    def _write_state(self, request: GatedRequest, state: str, info: dict[str, Any] | None = None) -> None:
        def write() -> None:
            request.task.backend.store_result(request.id, info, state, request=request.context)

        if not request.ignore_result:  # a state that no result ever replaces
            self._state_writer.write(write)

    def close(self) -> None:
        """Give what is held one more chance and close the connection."""
        self.retry_held()
        if self._held:
            logger.error("%d tasks could not be deferred before shutdown", len(self._held))
        self._queues.close()


class DeferredTasks:
    """The tick's, and an operator's, hands on the tasks that wait: resume, dead-letter, drop.

    Args:
        runtime: the app's runtime.
        consumer: the worker's consumer, for its name and its event dispatcher.
        queues: the broker's queues; ``None``: on connections of its own.
    """

    def __init__(self, runtime: Runtime, consumer: Any, queues: Queues | None = None) -> None:
        self._runtime = runtime
        self._consumer = consumer
        self._events = EventSender(runtime.app, consumer)
        self.queues = queues or open_queues(runtime.app, runtime.settings.namespace)

    def count(self, breaker: str) -> int:
        """Return the number of messages that wait on the broker."""
        return self.queues.size(self.queues.deferred(breaker))

    def sift(self, breaker: str, choose: Choose, *, start: int = 0) -> list[Move]:
        """Offer the oldest waiting tasks, but for the first ``start``, to ``choose`` and make its moves.

        The index first: a resumed task may be deferred again before this returns.
        """
        ledger = self._runtime.fleet.ledger
        planned: list[Move] = []

        def plan(entries: Sequence[Entry]) -> Sequence[Move]:
            planned.extend(choose(entries))
            ledger.remove_deferred(breaker, [move.entry.task_id for move in planned])
            return planned

        made: list[Move] = []
        try:
            made = self.queues.sift(breaker, PAGE, plan, start=start)
        finally:
            done = {id(move.entry): move for move in made}
            for move in planned:
                if id(move.entry) not in done:
                    ledger.add_deferred(breaker, move.entry.task_id, deadline=move.entry.ticket.ends_at)
                elif move.queue != done[id(move.entry)].queue:
                    self._settle(move.entry, ResilienceError(f"the queue {move.queue} that it came from is gone"))
        return made

    def sift_pages(self, breaker: str, choose: Choose, *, enough: Callable[[], bool]) -> Iterator[list[Move]]:
        """Go on with :meth:`sift` until that is ``enough`` or nothing is left; yield what each page has moved."""
        start, offered = 0, PAGE  # a page may hold less: messages are of any size

        def look(entries: Sequence[Entry]) -> Sequence[Move]:
            nonlocal offered
            offered = len(entries)
            return choose(entries)

        while offered and not enough():
            moves = self.sift(breaker, look, start=start)
            start += offered - len(moves)
            yield moves

    def resume(self, entries: Sequence[Entry], epoch: int, why: str) -> list[Move]:
        """Send tasks back to the queues that they came from.

        Drops those that were revoked meanwhile, and dead-letters those that would not run.
        """
        revoked = revoked_among(entries, self._runtime.fleet.ledger)
        moves = [
            self.drop(entry, "revoked") if entry.task_id in revoked else self._resume(entry, epoch, why)
            for entry in entries
        ]
        return [move for move in moves if move is not None]

    def _resume(self, entry: Entry, epoch: int, why: str) -> Move | None:
        now = self._runtime.fleet.view.server_now()
        error = ended(entry, now) or entry.unreadable()
        if error is not None:
            return self.dead_letter(entry, error)
        self._events.send(TASK_RESUMED, uuid=entry.task_id, exception=why, traceback=None)
        return Move(entry, self._runtime.origin(entry.ticket), entry.ticket.resume(epoch, now))

    def dead_letter(self, entry: Entry, error: Exception) -> Move | None:
        """End a task that must wait no longer, and keep its message in the dead-letter queue.

        Returns:
            None if its result cannot be written now: it goes on waiting, and a later tick tries again.
        """
        if not self._settle(entry, error):
            return None
        logger.warning("Task %s[%s] is dead-lettered: %s", entry.task_name, entry.task_id, error)
        ticket = entry.ticket.die(self._runtime.fleet.view.server_now(), str(error))
        return Move(entry, self.queues.dead(ticket.breaker), ticket)

    def drop(self, entry: Entry, reason: str) -> Move | None:
        """Give a task that shall never run REVOKED as its result, and drop its message.

        Returns:
            None if its result cannot be written now, as above.
        """
        if not self._settle(entry, TaskRevokedError(reason)):
            return None
        logger.info("Task %s[%s] was %s while it waited", entry.task_name, entry.task_id, reason)
        return Move(entry, None)

    def _settle(self, entry: Entry, error: Exception) -> bool:
        """Write the result of a task that waits no longer; False if that is impossible now."""
        try:
            if isinstance(error, TaskRevokedError):
                self._revoke(entry, str(error))
            else:
                self._fail(entry, error)
        except Exception as exc:  # noqa: BLE001 - whatever a result backend raises
            reason = type(exc).__name__
            logger.warning("Task %s[%s] cannot end yet (%s): %s", entry.task_name, entry.task_id, error, reason)
            return False
        return True

    def _fail(self, entry: Entry, error: Exception) -> None:
        request = self._request(entry)
        if request is not None:
            request.fail(error)
        else:
            self._runtime.app.backend.mark_as_failure(entry.task_id, error)
            self._events.send("task-failed", uuid=entry.task_id, exception=repr(error), traceback=None)

    def _revoke(self, entry: Entry, reason: str) -> None:
        request = self._request(entry)
        if request is not None:
            seams.announce_revoked(request, reason, expired=reason == "expired")
        else:
            self._runtime.app.backend.mark_as_revoked(entry.task_id, reason)

    def _request(self, entry: Entry) -> GatedRequest | None:
        """Return the request that a worker would make of a message; None if it could not."""
        app = self._runtime.app
        try:
            return GatedRequest(
                entry.message,
                app=app,
                task=app.tasks[entry.task_name],
                hostname=self._consumer.hostname,
                eventer=self._events.dispatcher(),
                **seams.parts_of(entry.message),
            )
        except Exception as exc:  # noqa: BLE001 - whatever a stranger wrote into the message
            logger.warning("Task %s[%s] is no task of this app: %r", entry.task_name, entry.task_id, exc)
            return None

    def close(self) -> None:
        """Close connections."""
        self.queues.close()
        self._events.close()


def ended(entry: Entry, now: float) -> DeferralExpiredError | TaskRevokedError | None:
    """Return the error of a task that has waited longer than its ``defer_for``, or past its ``expires``."""
    ticket = entry.ticket
    if ticket.ends_at is None or now < ticket.ends_at:
        return None
    if ticket.ends_at == ticket.expires:
        return TaskRevokedError("expired")
    return DeferralExpiredError(ticket.breaker, now - ticket.since, ticket.deadline - ticket.since)
