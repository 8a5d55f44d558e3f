"""``Holding``: tasks that are over their worker's own limit wait in the worker where a slot is free in a moment.

A way through the deferred queue costs more than a short call takes. So a worker keeps as many tasks as it runs in
:data:`HOLD_FOR` seconds, outside the prefetch window, where they are in no other task's way; the others are deferred,
and are resumed as those that it holds grow fewer. What it holds is not acknowledged.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.worker import seams

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.compensation import Compensation
    from resilient_tasks.worker.request import GatedRequest

#: Seconds of work that are held; a task that has waited twice as long is deferred: its breaker's calls hang.
HOLD_FOR = 2.0
#: Most tasks of one breaker that are held.
MOST_HELD = 1000
#: Tasks that are held per slot before any call has returned.
HELD_AT_FIRST = 10
#: Seconds between two looks at what is held.
LOOK_INTERVAL = 0.5


class Holding:
    """What one worker holds, by breaker."""

    def __init__(self, compensation: Compensation) -> None:
        self._compensation = compensation
        self._held: dict[str, deque[tuple[GatedRequest, float]]] = {}
        self._consumer: Any = None
        self._is_looking = False

    def start(self, consumer: Any) -> None:
        """Hold nothing of a former connection: the broker delivers it again."""
        self._held.clear()
        self._consumer, self._is_looking = consumer, False

    def hold(self, request: GatedRequest, breaker: Dependency) -> bool:
        """Keep a request until one of a breaker's runs ends; False: there are enough."""
        has_waited = time.monotonic() - request.held_since if request.held_since else 0.0
        if has_waited > 2 * HOLD_FOR or (not has_waited and self.room(breaker) < 1):
            return False
        held = self._held.setdefault(breaker.name, deque())
        if request.held_since:  # another one has been quicker
            held.appendleft((request, request.held_since))
        else:
            request.held_since = time.monotonic()
            held.append((request, request.held_since))
        self._consumer.qos.increment_eventually()
        if not self._is_looking:
            self._is_looking = True
            self._consumer.timer.call_after(LOOK_INTERVAL, self._look)
        return True

    def room(self, breaker: Dependency) -> int:
        """Return how many more tasks of a breaker are held at most; 0 if it has no limit of this kind."""
        limit, usual = breaker.policy.max_concurrency_per_worker, self._compensation.usual(breaker.name)
        if limit is None:
            return 0
        most = HELD_AT_FIRST * limit if usual is None else max(limit, int(limit * HOLD_FOR / max(usual, 0.001)))
        return min(MOST_HELD, most) - len(self._held.get(breaker.name, ()))

    def wants_more(self, breaker: Dependency) -> bool:
        """Whether so few tasks of a breaker are held that deferred ones should be resumed."""
        return self.room(breaker) > len(self._held.get(breaker.name, ()))

    def release(self, breaker: str) -> None:
        """Let the next request go on: a run has ended."""
        held = self._held.get(breaker)
        if not held or not seams.is_running(self._consumer):
            return
        try:
            request, _ = held.popleft()
        except IndexError:  # another thread has taken it
            return
        self._consumer.qos.decrement_eventually()
        seams.submit(self._consumer, request)

    def _look(self) -> None:
        """Put aside what has waited for too long, or what its breaker refuses by now."""
        if not seams.is_running(self._consumer):
            return
        for breaker, held in list(self._held.items()):
            for request, since in list(held):
                self._look_at(breaker, request, since)
        self._held = {breaker: held for breaker, held in self._held.items() if held}
        self._is_looking = bool(self._held)
        if self._is_looking:
            self._consumer.timer.call_after(LOOK_INTERVAL, self._look)

    def _look_at(self, breaker: str, request: GatedRequest, since: float) -> None:
        refusing, is_over = request.refusing, request.deferred or request.revoked()
        if refusing is None and not is_over and time.monotonic() - since <= 2 * HOLD_FOR:
            return
        try:
            self._held[breaker].remove((request, since))
        except ValueError:  # another thread has taken it
            return
        self._consumer.qos.decrement_eventually()
        if not is_over:
            refusal = BreakerOpenError(breaker, AT_CAPACITY, 0.0) if refusing is None else refusing.refuse()
            seams.task_ready(request)
            request.put_aside(refusal.breaker, str(refusal))
