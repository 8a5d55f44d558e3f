"""``Denials``: queues of ours that the broker refuses a worker, and tasks that cannot be deferred for that reason.

Such a task stays unacknowledged, beside the prefetch window, so that other tasks go on. It goes back to its queue once
its breaker would admit it, or is deferred once the rights are there (``docs/permissions.md``). Where no window can be
widened (quorum queues, ``worker_eta_task_limit``) it goes to the end of its queue a moment later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from resilient_tasks.worker.deferral import Deferral, Step
    from resilient_tasks.worker.request import GatedRequest
    from resilient_tasks.worker.runtime import Runtime
    from resilient_tasks.worker.ticket import Ticket

logger = logging.getLogger("resilient_tasks")

#: Seconds between two checks whether what was refused is granted by now.
CHECK_INTERVAL = 10.0
#: Held tasks that are looked at in one go, four times per tick interval.
_AT_ONCE = 100


class _Held(NamedTuple):
    """A task that cannot be deferred; ``beside``: it takes no place in the prefetch window."""

    request: GatedRequest
    ticket: Ticket
    queue: str
    again: Step
    beside: bool

    @property
    def may_run(self) -> bool:
        """Whether the task's breakers would admit it by now; a dead one never runs again."""
        request, ticket, host = self.request, self.ticket, self.request.host
        if ticket.died_at or ticket.not_before > host.now():
            return False
        return host.gate.refusing(request.guards, request.ticket, request.id) is None


class Denials:
    """What the broker refuses one worker.

    Attributes:
        reasons: by queue, in the broker's words.
    """

    def __init__(self, runtime: Runtime, deferral: Deferral) -> None:
        self._runtime = runtime
        self._deferral = deferral
        self.reasons: dict[str, str] = {}
        self._held: deque[_Held] = deque()
        self._check_at = float("-inf")
        self._has_checked = False

    def add(self, refused: Mapping[str, Exception]) -> None:
        """Note which queues the broker refuses, and how; each is logged once."""
        new = [queue for queue in refused if queue not in self.reasons]
        if new:
            what = "tasks cannot be deferred, the broker refuses %s (rights: docs/permissions.md): %s"
            logger.error(what, ", ".join(new), refused[new[0]])
        self.reasons.update({queue: str(error) for queue, error in refused.items()})

    def hold(self, request: GatedRequest, ticket: Ticket, queue: str, again: Step) -> None:
        """Keep a task that cannot be put into a queue, without a place in the prefetch window."""
        self._held.append(_Held(request, ticket, queue, again, request.leave_window()))

    def look(self) -> None:
        """Check rights, and let those held go that may; called by the maintenance thread, does little each time."""
        if time.monotonic() >= self._check_at:
            self._check()
            self._check_at = time.monotonic() + CHECK_INTERVAL
        going: list[_Held] = []
        for _ in range(min(len(self._held), _AT_ONCE)):
            held = self._held.popleft()
            if held.queue not in self.reasons:
                held.request.enter_window()
                self._deferral.attempt(held.request, held.again)
            elif held.may_run or (not held.beside and not held.ticket.died_at):
                going.append(held)
            else:
                self._held.append(held)
        if going:
            going[0].request.host.consumer.call_soon(self._return, going)

    def _check(self) -> None:
        """At first look at the queues of all breakers that are defined, then at those that were refused."""
        queues, names = self._deferral.queues, list(self.reasons)
        if not self._has_checked:
            names = [place(name) for name in self._runtime.breakers for place in (queues.deferred, queues.dead)]
        refused: dict[str, Exception] = {}
        try:
            for queue in names:
                error = queues.check(queue)
                if error is not None:
                    refused[queue] = error
                elif self.reasons.pop(queue, None):
                    logger.info("the broker refuses %s no more", queue)
            self._has_checked = True
        except queues.errors as error:
            logger.debug("rights on the broker cannot be checked now: %s", type(error).__name__)
        self.add(refused)

    def _return(self, going: list[_Held]) -> None:
        """Put tasks back to their queues, in the event loop."""
        for held in going:
            request, ticket = held.request, held.ticket
            has_failed = ticket.attempted_at > request.ticket.attempted_at
            header = ticket if has_failed else request.ticket
            try:
                self._deferral.put_back(request, ticket.origin, header, first=held.beside)
            except self._deferral.errors as error:
                what = "Task %s[%s] cannot be put back yet: %s"
                logger.debug(what, request.name, request.id, error, extra=request.log_fields)
                self._held.append(held)
            else:
                held.request.enter_window()
