"""``Compensation``: a dependency that hangs does not take a worker from the tasks of all others.

A breaker of which a call is late is *suspect* in this worker: it gets all pool slots but one, and its other tasks
are deferred. While late calls hold every slot, the pool grows by a spare one. In healthy times this costs one dict
entry per call, and two looks a second at those that run.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resilient_tasks.core.model import State, parent_of
from resilient_tasks.core.outage import SPARE_SLOTS, SUSPECTED
from resilient_tasks.monitor.events import BREAKER_SUSPECT, SLOT_ADDED, SLOT_REMOVED
from resilient_tasks.worker import seams

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Seconds between two looks at the running calls, at least.
SHORTEST_INTERVAL = 0.02
#: Seconds for which a spare slot is kept after late calls have freed the others: adding it again costs a fork.
LINGER = 5.0
#: Seconds after which a pool that has refused to grow is asked again.
REFUSED_FOR = 60.0
#: Seconds over which the usual duration of a breaker's calls is learned.
LEARNING = 300.0
#: Times ``late_after`` that a call takes, at least, to be late, however long its breaker's calls usually take.
MOST_LATE = 10
#: Calls after which quicker ones no longer count for more.
FIRST_CALLS = 50
#: Suspect breakers that are remembered; keyed breakers may be many, and some are never called again.
MOST_SUSPECTS = 1000

_UNLIMITED = frozenset({State.DISABLED, State.SHADOW})


class _Call:
    """A run in the pool, for the breakers that answer for it; not started while it waits for a process."""

    __slots__ = ("breakers", "started")

    def __init__(self, breakers: Sequence[Dependency]) -> None:
        self.breakers = breakers
        self.started: float | None = None


class Compensation:
    """The guarded calls that one worker has in flight, its suspect breakers and its spare slots."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._calls: dict[object, _Call] = {}
        self._suspects: dict[str, float] = {}  # since when, monotonic
        self._usual: dict[str, tuple[float, float, int]] = {}  # seconds that calls take, learned when, from how many
        self._consumer: Any = None
        self._timer: Any = None
        self._late_after = self._interval = runtime.settings.late_after
        self._most_spare = runtime.settings.spare_slots
        self._queues_inside = False
        self.spare_slots = 0
        self._size = 0
        self._calm_since = math.inf
        self._grow_at = -math.inf

    # --- the worker's consumer --------------------------------------------------------------------

    def start(self, consumer: Any) -> None:
        """Begin to look at the running calls, or go on with a consumer that has reconnected."""
        self.stop()
        is_first, self._consumer = self._consumer is None, consumer
        self._queues_inside = seams.queues_inside(consumer.pool)
        self._size = consumer.pool.num_processes
        breakers = self._runtime.breakers.values()
        limits = [breaker.policy.slow_call_duration or math.inf for breaker in breakers]
        self._interval = min([self._late_after, *limits])
        if is_first and breakers and self._most_spare and not seams.can_grow(consumer.pool):
            logger.warning(
                "the %s pool cannot add a slot: a guarded call that hangs holds up all tasks of this worker",
                seams.pool_name(consumer.pool),
            )
        if seams.discards_unaccepted(consumer.pool):
            for key in [key for key, call in list(self._calls.items()) if call.started is None]:
                self._calls.pop(key, None)
        self._schedule(self._interval)

    def stop(self) -> None:
        """Look no more until a consumer has connected again."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    # --- calls ------------------------------------------------------------------------------------

    def begin(self, key: object, breakers: Sequence[Dependency]) -> None:
        """Note that a run was submitted to the pool; ``key`` stands for it."""
        self._calls[key] = _Call(breakers)

    def accept(self, key: object) -> Dependency | None:
        """Note that a run starts; the breaker that is over its share, if the pool has queued it until now."""
        call = self._calls.get(key)
        if call is None:
            return None
        if not self._queues_inside:
            call.started = time.monotonic()
            return None
        with self._lock:
            limiting = self.limiting(call.breakers)
            if limiting is None:
                call.started = time.monotonic()
            return limiting

    def end(self, key: object) -> None:
        """Note that a run has ended."""
        call = self._calls.pop(key, None)
        if call is None or call.started is None:
            return
        now = time.monotonic()
        for breaker in call.breakers:
            self._learn(breaker, now - call.started, now)
            if breaker.name in self._suspects and now - call.started <= self._limit(breaker):
                self._clear(breaker, now)

    def limiting(self, guards: Sequence[Dependency]) -> Dependency | None:
        """Return the suspect breaker that has its share of the slots already; None if a task may run."""
        if not self._suspects:
            return None
        parents = {parent_of(breaker.name) for breaker in guards}
        running = [call for call in list(self._calls.values()) if call.started is not None or not self._queues_inside]
        answering = (breaker for breaker in guards if breaker.name not in parents)
        return next((breaker for breaker in answering if self._is_over(breaker, running)), None)

    def wait(self, breaker: Dependency) -> float:
        """Return for how many seconds a task over a breaker's share is deferred: as long as it is suspect already."""
        family = _family(breaker.name)
        since = (at for name, at in list(self._suspects.items()) if _family(name) == family)
        suspect_for = time.monotonic() - min(since, default=math.inf)
        return max(self._late_after, min(suspect_for, breaker.policy.open_duration))

    def usual(self, name: str) -> float | None:
        """Return how many seconds a breaker's calls usually take in this worker; None before any has returned."""
        seconds, _, calls = self._usual.get(_family(name), (0.0, 0.0, 0))
        return seconds if calls else None

    def is_suspect(self, name: str) -> bool:
        """Whether a breaker is suspect in this worker."""
        return name in self._suspects

    def _is_over(self, breaker: Dependency, running: Sequence[_Call]) -> bool:
        """Whether a breaker may have no more calls in flight here.

        All suspect breakers share the slots but one, so that several cannot take them all. One with no call in
        flight may have one, or it could never return in time. A child is judged with its parent's other children: of
        400 that hang none is suspect before its first call, and together they leave one slot, spare ones included.
        """
        if breaker.standing.snapshot.state in _UNLIMITED:
            return False
        suspects, slots, family = self._suspects, self._slots, _family(breaker.name)
        if breaker.name in suspects and any(_is_for(call, breaker.name) for call in running):
            suspect_calls = sum(any(one.name in suspects for one in call.breakers) for call in running)
            return suspect_calls >= max(1, slots - 1)
        if all(_family(name) != family for name in list(suspects)):
            return False
        siblings = sum(any(_family(one.name) == family for one in call.breakers) for call in running)
        return siblings >= max(1, slots + self._most_spare - 1)

    @property
    def _slots(self) -> int:
        """Pool slots without the spare ones."""
        return int(self._consumer.pool.num_processes) - self.spare_slots

    def _limit(self, breaker: Dependency) -> float:
        """Seconds after which a call is late.

        ``late_after``; where calls usually take longer, twice as long as they do, but at most :data:`MOST_LATE` times
        ``late_after``: a worker may have known nothing but an outage. Never more than ``slow_call_duration``.
        """
        usual = min(2 * (self.usual(breaker.name) or 0.0), MOST_LATE * self._late_after)
        return min(max(self._late_after, usual), breaker.policy.slow_call_duration or math.inf)

    def _learn(self, breaker: Dependency, seconds: float, now: float) -> None:
        """Move what is usual towards one call by the share of :data:`LEARNING` since the last.

        The first calls of a process are slow; quicker ones after them count for more. Slower ones may be an outage.
        """
        family = _family(breaker.name)
        usual, at, calls = self._usual.get(family, (seconds, now, 0))
        calls = min(calls + 1, FIRST_CALLS)
        weight = 1 / calls if seconds < usual and calls < FIRST_CALLS else min(1.0, (now - at) / LEARNING)
        self._usual[family] = usual + (seconds - usual) * weight, now, calls

    # --- suspicion --------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find late calls, and let the pool have as many slots as it needs; in the consumer's event loop."""
        now = time.monotonic()
        next_at, late, blamed = now + self._interval, 0, Counter[str]()
        for call in list(self._calls.values()):
            if call.started is None:
                continue
            is_late = False
            for breaker in call.breakers:
                late_at = call.started + self._limit(breaker)
                if now > late_at:
                    is_late = True
                    blamed[breaker.name] += 1
                    self._suspect(breaker.name, now)
                else:
                    next_at = min(next_at, late_at)
            late += is_late
        if seams.is_running(self._consumer):
            self._fit_pool(late, now, blamed)
            self._schedule(max(SHORTEST_INTERVAL, next_at - now))

    def _schedule(self, seconds: float) -> None:
        self._timer = self._consumer.timer.call_after(seconds, self._look)

    def _suspect(self, name: str, now: float) -> None:
        if name in self._suspects:
            return
        if len(self._suspects) >= MOST_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]
        self._suspects[name] = now
        logger.warning("breaker %s is suspect in this worker: a call is late", name, extra={"breaker": name})
        self._runtime.fleet.reporter.tally(name, SUSPECTED)
        self._send(BREAKER_SUSPECT, breaker=name)

    def _clear(self, breaker: Dependency, now: float) -> None:
        """A call has returned in time: the breaker is suspect no longer, unless others of its calls still hang."""
        limit = self._limit(breaker)
        calls = list(self._calls.values())
        if not any(_is_for(call, breaker.name) and now - (call.started or now) > limit for call in calls):
            self._suspects.pop(breaker.name, None)
            what = "breaker %s is no longer suspect in this worker"
            logger.info(what, breaker.name, extra={"breaker": breaker.name})

    # --- spare slots ------------------------------------------------------------------------------

    def _fit_pool(self, late: int, now: float, blamed: Counter[str]) -> None:
        size = int(self._consumer.pool.num_processes)
        self.spare_slots = max(0, self.spare_slots - max(0, self._size - size))  # removed by an operator or autoscale
        self._size = size
        if late >= max(1, size):
            self._calm_since = math.inf
            is_growing = size < seams.autoscale_maximum(self._consumer)
            if self.spare_slots < self._most_spare and not is_growing and now >= self._grow_at:
                self._add_slot(now, blamed)
        elif self.spare_slots and late < self._slots:
            self._calm_since = min(self._calm_since, now)
            if now - self._calm_since >= LINGER and seams.remove_slot(self._consumer.pool):
                self._resized(-1, SLOT_REMOVED, "late calls have returned")
        else:
            self._calm_since = math.inf

    def _add_slot(self, now: float, blamed: Counter[str]) -> None:
        pool = self._consumer.pool
        if not seams.can_grow(pool):
            return
        try:
            seams.add_slot(pool)
        except (OSError, MemoryError, RuntimeError, NotImplementedError) as exc:
            logger.warning("the %s pool has refused to grow: %s", seams.pool_name(pool), exc)
            self._grow_at = now + REFUSED_FOR
            return
        name, calls = blamed.most_common(1)[0]
        self._runtime.fleet.reporter.tally(name, SPARE_SLOTS)
        self._resized(1, SLOT_ADDED, f"late calls hold all others, {calls} of them of breaker {name}")

    def _resized(self, change: int, event: str, why: str) -> None:
        self.spare_slots += change
        self._size = int(self._consumer.pool.num_processes)
        seams.change_prefetch(self._consumer, change)
        what = "spare slot %s, the pool has %d: %s"
        logger.warning(what, "added" if change > 0 else "removed", self._size, why, extra={"event": event})
        self._send(event, slots=self._size, spare=self.spare_slots, reason=why)

    def _send(self, event: str, **fields: object) -> None:
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is not None:
            dispatcher.send(event, **fields)


def _family(name: str) -> str:
    return parent_of(name) or name


def _is_for(call: _Call, name: str) -> bool:
    return any(breaker.name == name for breaker in call.breakers)
