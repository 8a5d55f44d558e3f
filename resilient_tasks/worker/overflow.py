"""``Overflow``: queues that this worker leaves alone, because what they hold can neither run nor be deferred.

A task for which there is no room, and whose breaker says ``overflow="block"``, goes back to the end of its
queue from which tasks are taken, and the worker stops consuming that queue: the backlog stays where it is, in
order, and other queues go on at full speed. Once there is room again, or the breaker no longer refuses
everything, the queue is consumed again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from resilient_tasks.monitor.events import QUEUE_BLOCKED, QUEUE_UNBLOCKED
from resilient_tasks.worker import seams
from resilient_tasks.worker.envelope import Ticket
from resilient_tasks.worker.request import GatedRequest

if TYPE_CHECKING:
    from resilient_tasks.worker.host import Host
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Seconds between two looks whether blocked queues may be consumed again.
LOOK_INTERVAL = 1.0


class _Return(NamedTuple):
    """A message on its way back to its queue."""

    request: GatedRequest
    queue: str
    ticket: Ticket


@dataclass(slots=True)
class _Blocked:
    """A queue that is not consumed: by which consumer, under which tag, and for want of room for which breakers."""

    task_consumer: Any
    tag: str
    breakers: set[str] = field(default_factory=set)


class Overflow:
    """Blocks and unblocks the queues of one worker. Touches its consumer in the consumer's own event loop only."""

    def __init__(self, runtime: Runtime, host: Host) -> None:
        self._runtime = runtime
        self._host = host
        self._returning: deque[_Return] = deque()
        self._blocked: dict[str, _Blocked] = {}
        self._look_at = float("-inf")

    def put_back(self, request: GatedRequest, ticket: Ticket, queue: str, breaker: str) -> None:
        """Put a request's message back and block its queue; from any thread, done soon.

        Args:
            request: whose message.
            ticket: what the message shall say about itself.
            queue: where it came from.
            breaker: for whose tasks there is no room.
        """
        self._returning.append(_Return(request, queue, ticket))
        self._host.consumer.call_soon(self._block, queue, breaker)

    def look(self) -> None:
        """Have the event loop see to what is blocked or could not be put back; from any thread."""
        if (self._blocked or self._returning) and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_INTERVAL
            self._host.consumer.call_soon(self._unblock_what_may_go_on)

    def close(self) -> None:
        """Put back what still has to be; at shutdown, when the event loop has ended."""
        self._return_all()
        if self._returning:
            logger.error("%d tasks could not be put back before shutdown", len(self._returning))

    # --- in the event loop ------------------------------------------------------------------------

    def _block(self, queue: str, breaker: str) -> None:
        self._forget_former_consumer()
        blocked = self._blocked.get(queue) or self._pause(queue)
        if blocked is not None:
            blocked.breakers.add(breaker)
            self._returning.extend(self._prefetched(queue))
        self._return_all()

    def _pause(self, queue: str) -> _Blocked | None:
        task_consumer = self._host.consumer.task_consumer
        tag = task_consumer and seams.pause_queue(task_consumer, queue)
        if not tag:
            return None
        blocked = self._blocked[queue] = _Blocked(task_consumer, tag)
        logger.warning("queue %s is blocked: its tasks can neither run nor be deferred", queue)
        self._tell(QUEUE_BLOCKED, queue)
        return blocked

    def _prefetched(self, queue: str) -> Iterator[_Return]:
        """Take the other messages of a queue that this worker holds and its gate would refuse."""
        for request in seams.reserved_requests():
            if not isinstance(request, GatedRequest) or not request.awaits_pool or not request.is_refused:
                continue
            if self._host.origin_of(request) == queue:
                request.withdraw()
                yield _Return(request, queue, request.ticket)

    def _return_all(self) -> None:
        """Put messages back, the newest first, so that the oldest is the next to be taken."""
        items = [self._returning.popleft() for _ in range(len(self._returning))]
        items.sort(key=lambda item: item.request.arrival)
        try:
            while items:
                self._host.deferral.put_back(*items[-1])
                items.pop()
        except self._host.deferral.errors as exc:
            logger.warning("%d tasks cannot be put back yet: %s", len(items), type(exc).__name__)
        finally:
            self._returning.extend(items)

    def _unblock_what_may_go_on(self) -> None:
        self._return_all()
        self._forget_former_consumer()
        for queue, blocked in list(self._blocked.items()):
            if not any(self._is_stuck(breaker) for breaker in blocked.breakers):
                self._unblock(queue)

    def _forget_former_consumer(self) -> None:
        """Drop what was blocked on a connection that was lost: the new one consumes all queues."""
        for queue, blocked in list(self._blocked.items()):
            if blocked.task_consumer is not self._host.consumer.task_consumer:
                del self._blocked[queue]

    def _is_stuck(self, breaker: str) -> bool:
        return self._host.gate.refuses_all(self._runtime.breaker(breaker)) and not self._host.deferral.has_room(breaker)

    def _unblock(self, queue: str) -> None:
        blocked = self._blocked.pop(queue)
        if seams.unpause_queue(blocked.task_consumer, queue, blocked.tag):  # else an operator has cancelled it
            logger.warning("queue %s is consumed again", queue)
        self._tell(QUEUE_UNBLOCKED, queue)

    def _tell(self, event: str, queue: str) -> None:
        dispatcher = self._host.consumer.event_dispatcher
        if dispatcher is not None:
            dispatcher.send(event, queue=queue)
