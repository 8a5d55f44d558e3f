"""``Host``: the worker's main process, with all that exists only there.

Made after the pool has forked, when the consumer connects; its heart beats until the worker stops.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from resilient_tasks.worker import seams
from resilient_tasks.worker.compensation import Compensation
from resilient_tasks.worker.deferral import Deferral
from resilient_tasks.worker.gate import Gate
from resilient_tasks.worker.heart import Heart
from resilient_tasks.worker.holding import Holding
from resilient_tasks.worker.overflow import Overflow

if TYPE_CHECKING:
    from resilient_tasks.worker.request import GatedRequest
    from resilient_tasks.worker.runtime import Runtime


class Host:
    """Gate, deferral, overflow and heart of one worker.

    Attributes:
        consumer: the worker's consumer, as soon as it has connected.
        pid: id of the main process; pool processes inherit the object and are not it.
        takes_ticks: it consumes the control queue.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.consumer: Any = None
        self.pid = os.getpid()
        self.takes_ticks = False
        self.gate = Gate(runtime)
        self.compensation = Compensation(runtime)
        self.holding = Holding(self.compensation)
        self.deferral = Deferral(runtime)
        self.overflow = Overflow(runtime, self)
        self.heart = Heart(runtime, self.gate, self.deferral, self.overflow, self.holding)

    def attach(self, consumer: Any) -> None:
        """Join the fleet with a consumer that has just connected to the broker, before it takes any task."""
        if self.consumer is consumer:
            return
        self.consumer = consumer
        fleet = self._runtime.fleet
        fleet.view.refresh()  # a worker that joins while a breaker is OPEN obeys at once
        fleet.view.follow()
        self.heart.start(consumer)

    def now(self) -> float:
        """Seconds on the store's clock."""
        return self._runtime.fleet.view.server_now()

    def origin_of(self, request: GatedRequest) -> str:
        """Name of the queue that a request came from.

        A ticket knows best, but only one of the queues that this worker consumes can be true.
        """
        tasks = self.consumer.task_consumer
        if any(request.ticket.origin == queue.name for queue in tasks.queues):
            return request.ticket.origin
        return seams.queue_of(tasks, request.message)

    def close(self) -> None:
        """Leave the fleet at shutdown, with everything told that is still to be told."""
        self.heart.stop()
        self.overflow.close()
        self.deferral.close()
        self._runtime.fleet.close()
