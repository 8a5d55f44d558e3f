"""``Compensation``: a dependency that hangs does not take a worker from the tasks of all others.

A breaker of which a call is late is *suspect* in this worker: it gets all pool slots but one, and its other tasks
are deferred. While late calls hold every slot, the pool grows by a spare one. In healthy times this costs one dict
entry per call, and two looks a second at those that run.

``Holding`` keeps tasks over their worker's own limit until a run ends. ``Overflow`` blocks queues whose tasks can
neither run nor be deferred.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resilient_tasks.core.model import State, parent_of
from resilient_tasks.core.outage import SPARE_SLOTS, SUSPECTED
from resilient_tasks.dependency import Dependency
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.monitor.events import BREAKER_SUSPECT, QUEUE_BLOCKED, QUEUE_UNBLOCKED, SLOT_ADDED, SLOT_REMOVED
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.request import GatedRequest

if TYPE_CHECKING:
    from resilient_tasks.worker.context import Runtime
    from resilient_tasks.worker.deferral import Deferral

logger = logging.getLogger("resilient_tasks")

#: Seconds between two looks at the running calls, at least.
SHORTEST_INTERVAL = 0.02
#: Seconds for which a spare slot is kept after late calls have freed the others: adding it again costs a fork.
LINGER = 5.0
#: Seconds after which a pool that has refused to grow is asked again.
REFUSED_FOR = 60.0
#: Seconds over which the usual duration of a breaker's calls is learned.
LEARNING = 300.0
#: A call is late after so many times ``late_after`` at the latest, however long its breaker's calls usually take.
MOST_LATE = 10
#: Calls after which quicker ones no longer count for more.
FIRST_CALLS = 50
#: Suspect breakers that are remembered; keyed breakers may be many, and some are never called again.
MOST_SUSPECTS = 1000

_UNLIMITED = frozenset({State.DISABLED, State.SHADOW})


@dataclass(slots=True)
class _Call:
    """A run in the pool, for the breakers that answer for it."""

    breakers: Sequence[Dependency]
    started: float | None = None  # None while it waits for a process

    def is_of(self, breaker: Dependency) -> bool:
        """Whether a breaker answers for it; a child that was idle for long may be another object by now."""
        return any(each.name == breaker.name for each in self.breakers)


class Compensation:
    """The guarded calls that one worker has in flight, its suspect breakers and its spare slots."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._calls: dict[object, _Call] = {}
        self.suspects: dict[str, float] = {}  # since when, monotonic
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

    def start(self, consumer: Any) -> None:
        """Begin to look at the running calls, or go on with a consumer that has reconnected."""
        self.stop()
        is_first, self._consumer, pool = self._consumer is None, consumer, consumer.pool
        self._queues_inside = celery_internals.queues_inside(pool)
        self._size = pool.num_processes
        breakers = self._runtime.breakers.values()
        self._interval = min([self._late_after, *(breaker.slow_after for breaker in breakers)])
        if is_first and breakers and self._most_spare and not celery_internals.can_grow(pool):
            what = "the %s pool cannot add a slot: a guarded call that hangs holds up all tasks of this worker"
            logger.warning(what, celery_internals.pool_name(pool))
        self._schedule(self._interval)

    def stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    # --- calls ------------------------------------------------------------------------------------

    def begin(self, key: object, breakers: Sequence[Dependency]) -> None:
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
        """Note that a run has ended; one in time clears its breakers, unless others of their calls are late still."""
        call = self._calls.pop(key, None)
        if call is None or call.started is None:
            return
        now = time.monotonic()
        for breaker in call.breakers:
            self._learn(breaker, now - call.started, now)
            if breaker.name in self.suspects and now - call.started <= self._limit(breaker):
                limit, others = self._limit(breaker), list(self._calls.values())
                if not any(now - (each.started or now) > limit for each in others if each.is_of(breaker)):
                    self.suspects.pop(breaker.name, None)
                    what = "breaker %s is no longer suspect in this worker"
                    logger.info(what, breaker.name, extra={"breaker": breaker.name})

    def unaccepted(self) -> list[Any]:
        """Return the runs that no process or thread has accepted yet."""
        return [key for key, call in list(self._calls.items()) if call.started is None]

    def limiting(self, breakers: Sequence[Dependency]) -> Dependency | None:
        """Return the suspect breaker that has its share of the slots already; None if a task may run."""
        if not self.suspects or self._runtime.fleet.store.is_unavailable:  # what is deferred could not be resumed
            return None
        running = [call for call in list(self._calls.values()) if call.started is not None or not self._queues_inside]
        return next((breaker for breaker in breakers if self._is_over(breaker, running)), None)

    def wait(self, breaker: Dependency) -> float:
        """Return for how many seconds a task over a breaker's share is deferred: as long as it is suspect already."""
        parent = breaker.root
        since = (at for name, at in list(self.suspects.items()) if _parent_or_own(name) == parent)
        suspect_for = time.monotonic() - min(since, default=math.inf)
        return max(self._late_after, min(suspect_for, breaker.policy.open_duration))

    def usual(self, name: str) -> float | None:
        """Return how many seconds a breaker's calls usually take in this worker; None before any has returned."""
        seconds, _, calls = self._usual.get(_parent_or_own(name), (0.0, 0.0, 0))
        return seconds if calls else None

    def _is_over(self, breaker: Dependency, running: Sequence[_Call]) -> bool:
        """Whether a breaker may have no more calls in flight here.

        All suspect breakers share the slots but one, so that several cannot take them all. One with no call in
        flight may have one, or it could never return in time. A child is judged with its parent's other children: of
        400 that hang none is suspect before its first call, and together they leave one slot, spare ones included.
        """
        if breaker.cached_state.snapshot.state in _UNLIMITED:
            return False
        suspects, slots, parent = self.suspects, self._slots, breaker.root
        if breaker.name in suspects and any(call.is_of(breaker) for call in running):
            suspect_calls = sum(any(each.name in suspects for each in call.breakers) for call in running)
            return suspect_calls >= max(1, slots - 1)
        if all(_parent_or_own(name) != parent for name in list(suspects)):
            return False
        siblings = sum(any(each.root == parent for each in call.breakers) for call in running)
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
        return min(max(self._late_after, usual), breaker.slow_after)

    def _learn(self, breaker: Dependency, seconds: float, now: float) -> None:
        """Move what is usual towards one call by the share of :data:`LEARNING` since the last.

        The first calls of a process are slow; quicker ones after them count for more. Slower ones may be an outage.
        """
        parent = breaker.root
        usual, at, calls = self._usual.get(parent, (seconds, now, 0))
        calls = min(calls + 1, FIRST_CALLS)
        weight = 1 / calls if seconds < usual and calls < FIRST_CALLS else min(1.0, (now - at) / LEARNING)
        self._usual[parent] = usual + (seconds - usual) * weight, now, calls

    # --- suspicion --------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find late calls, and let the pool have as many slots as it needs; in the consumer's event loop."""
        now = time.monotonic()
        next_at, late, late_for = now + self._interval, 0, Counter[str]()
        for call in list(self._calls.values()):
            if call.started is None:
                continue
            late_at = {breaker.name: call.started + self._limit(breaker) for breaker in call.breakers}
            overdue = [name for name, at in late_at.items() if now > at]
            for name in overdue:
                self._suspect(name, now)
            late_for.update(overdue)
            late += bool(overdue)
            next_at = min([next_at, *(at for at in late_at.values() if now <= at)])
        if celery_internals.is_running(self._consumer):
            self._fit_pool(late, now, late_for)
            self._schedule(max(SHORTEST_INTERVAL, next_at - now))

    def _schedule(self, seconds: float) -> None:
        self._timer = self._consumer.timer.call_after(seconds, self._look)

    def _suspect(self, name: str, now: float) -> None:
        if name in self.suspects:
            return
        if len(self.suspects) >= MOST_SUSPECTS:
            del self.suspects[next(iter(self.suspects))]
        self.suspects[name] = now
        logger.warning("breaker %s is suspect in this worker: a call is late", name, extra={"breaker": name})
        self._runtime.fleet.reporter.tally(name, SUSPECTED)
        _send_event(self._consumer, BREAKER_SUSPECT, breaker=name)

    # --- spare slots ------------------------------------------------------------------------------

    def _fit_pool(self, late: int, now: float, late_for: Counter[str]) -> None:
        size = int(self._consumer.pool.num_processes)
        self.spare_slots = max(0, self.spare_slots - max(0, self._size - size))  # removed by an operator or autoscale
        self._size = size
        if late >= max(1, size):
            self._calm_since = math.inf
            is_growing = size < celery_internals.autoscale_maximum(self._consumer)
            if self.spare_slots < self._most_spare and not is_growing and now >= self._grow_at:
                self._add_slot(now, late_for)
        elif self.spare_slots and late < self._slots:
            self._calm_since = min(self._calm_since, now)
            if now - self._calm_since >= LINGER and celery_internals.remove_slot(self._consumer.pool):
                self._resized(-1, SLOT_REMOVED, "late calls have returned")
        else:
            self._calm_since = math.inf

    def _add_slot(self, now: float, late_for: Counter[str]) -> None:
        pool = self._consumer.pool
        if not celery_internals.can_grow(pool):
            return
        try:
            celery_internals.add_slot(pool)
        except (OSError, MemoryError, RuntimeError, NotImplementedError) as exc:
            logger.warning("the %s pool has refused to grow: %s", celery_internals.pool_name(pool), exc)
            self._grow_at = now + REFUSED_FOR
            return
        name, calls = late_for.most_common(1)[0]
        self._runtime.fleet.reporter.tally(name, SPARE_SLOTS)
        self._resized(1, SLOT_ADDED, f"late calls hold all others, {calls} of them of breaker {name}")

    def _resized(self, change: int, event: str, why: str) -> None:
        self.spare_slots += change
        self._size = int(self._consumer.pool.num_processes)
        celery_internals.change_prefetch(self._consumer, change)
        what = "spare slot %s, the pool has %d: %s"
        logger.warning(what, "added" if change > 0 else "removed", self._size, why, extra={"event": event})
        _send_event(self._consumer, event, slots=self._size, spare=self.spare_slots, reason=why)


def _parent_or_own(name: str) -> str:
    return parent_of(name) or name


def _send_event(consumer: Any, event: str, **fields: object) -> None:
    if consumer.event_dispatcher is not None:
        consumer.event_dispatcher.send(event, **fields)


#: Seconds of work that are held.
HOLD_FOR = 2.0
#: Seconds after which a task that is held is deferred: its breaker's calls hang.
HELD_AT_MOST = 4.0
#: Most tasks of one breaker that are held.
MOST_HELD = 1000
#: Tasks that are held per slot before any call has returned.
HELD_AT_FIRST = 10
#: Seconds between two checks of what is held.
HELD_INTERVAL = 0.5


class Holding:
    """What one worker holds, by breaker."""

    def __init__(self, compensation: Compensation, defer: Callable[[GatedRequest, BreakerOpenError], None]) -> None:
        self._compensation, self._defer = compensation, defer
        self.held: dict[str, deque[GatedRequest]] = {}
        self._consumer: Any = None
        self._is_looking = False

    def start(self, consumer: Any) -> None:
        """Hold nothing of a former connection: the broker delivers it again."""
        self.held.clear()
        self._consumer, self._is_looking = consumer, False

    def hold(self, request: GatedRequest, breaker: Dependency) -> bool:
        """Keep a request until one of a breaker's runs ends; False: there are enough."""
        if _held_too_long(request) or (not request.held_since and self.room(breaker) < 1):
            return False
        held = self.held.setdefault(breaker.name, deque())
        if request.held_since:  # another one has been quicker
            held.appendleft(request)
        else:
            request.held_since = time.monotonic()
            held.append(request)
        self._consumer.qos.increment_eventually()
        if not self._is_looking:
            self._is_looking = True
            self._consumer.timer.call_after(HELD_INTERVAL, self._look)
        return True

    def room(self, breaker: Dependency) -> int:
        """Return how many more tasks of a breaker are held at most; 0 if it has no limit of this kind."""
        limit, usual = breaker.policy.max_concurrency_per_worker, self._compensation.usual(breaker.name)
        if limit is None:
            return 0
        most = HELD_AT_FIRST * limit if usual is None else max(limit, int(limit * HOLD_FOR / max(usual, 0.001)))
        return min(MOST_HELD, most) - len(self.held.get(breaker.name, ()))

    def wants_more(self, breaker: Dependency) -> bool:
        """Whether so few tasks of a breaker are held that deferred ones should be resumed."""
        return self.room(breaker) > len(self.held.get(breaker.name, ()))

    def release(self, breaker: str) -> None:
        """Let the next request go on: a run has ended."""
        held = self.held.get(breaker)
        if not held or not celery_internals.is_running(self._consumer):
            return
        try:
            request = held.popleft()
        except IndexError:  # another thread has taken it
            return
        self._consumer.qos.decrement_eventually()
        celery_internals.submit(self._consumer, request)

    def _look(self) -> None:
        """Defer what has waited for too long, or what its breaker refuses by now."""
        if not celery_internals.is_running(self._consumer):
            return
        for breaker, held in list(self.held.items()):
            for request in list(held):
                self._look_at(breaker, request)
        self.held = {breaker: held for breaker, held in self.held.items() if held}
        self._is_looking = bool(self.held)
        if self._is_looking:
            self._consumer.timer.call_after(HELD_INTERVAL, self._look)

    def _look_at(self, breaker: str, request: GatedRequest) -> None:
        refusing, is_over = request.pipeline.refusing(request), request.deferred or request.revoked()
        if refusing is None and not is_over and not _held_too_long(request):
            return
        try:
            self.held[breaker].remove(request)
        except ValueError:  # another thread has taken it
            return
        self._consumer.qos.decrement_eventually()
        if not is_over:
            refusal = BreakerOpenError(breaker, AT_CAPACITY, 0.0) if refusing is None else refusing.refuse()
            self._defer(request, refusal)


def _held_too_long(request: GatedRequest) -> bool:
    return request.held_since > 0 and time.monotonic() - request.held_since > HELD_AT_MOST


#: Seconds between two checks whether blocked queues may be consumed again.
BLOCKED_INTERVAL = 1.0


class Overflow:
    """Blocks and unblocks the queues of one worker. Touches its consumer in the consumer's own event loop only."""

    def __init__(self, deferral: Deferral, is_stuck: Callable[[str], bool]) -> None:
        self._deferral, self._is_stuck = deferral, is_stuck
        self._returning: deque[tuple[GatedRequest, str, Envelope]] = deque()  # on their way back to their queues
        self._blocked: dict[str, tuple[str, set[str]]] = {}  # queue -> consumer's tag, breakers without room
        self._look_at = float("-inf")
        self.consumer: Any = None

    def start(self, consumer: Any) -> None:
        """Go on with a consumer that has connected, or reconnected, and consumes all queues."""
        self.consumer = consumer
        self._blocked.clear()

    def requeue(self, request: GatedRequest, envelope: Envelope, queue: str, breaker: str) -> None:
        """Requeue a message and block its queue, for want of room for tasks of ``breaker``; from any thread, soon."""
        self._returning.append((request, queue, envelope))
        self.consumer.call_soon(self._block, queue, breaker)

    def look(self) -> None:
        """Have the event loop see to what is blocked or could not be requeued; from any thread."""
        if (self._blocked or self._returning) and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + BLOCKED_INTERVAL
            self.consumer.call_soon(self._unblock)

    def close(self) -> None:
        """Requeue what still has to be; at shutdown, when the event loop has ended."""
        self._return_all()
        if self._returning:
            logger.error("%d tasks could not be requeued before shutdown", len(self._returning))

    # --- in the event loop ------------------------------------------------------------------------

    def _block(self, queue: str, breaker: str) -> None:
        if queue not in self._blocked:
            task_consumer = self.consumer.task_consumer
            tag = task_consumer and celery_internals.pause_queue(task_consumer, queue)
            if tag:
                self._blocked[queue] = tag, set()
                logger.warning("queue %s is blocked: its tasks can neither run nor be deferred", queue)
                _send_event(self.consumer, QUEUE_BLOCKED, queue=queue)
        if queue in self._blocked:
            self._blocked[queue][1].add(breaker)
            for request in celery_internals.reserved_requests():  # what this worker holds and its gate would refuse
                is_refused = isinstance(request, GatedRequest) and request.is_refused
                if is_refused and request.pipeline.origin_of(request) == queue:
                    request.withdraw()
                    self._returning.append((request, queue, request.envelope))
        self._return_all()

    def _return_all(self) -> None:
        """Requeue messages, the newest first, so that the oldest is the next to be taken."""
        items = [self._returning.popleft() for _ in range(len(self._returning))]
        items.sort(key=lambda item: item[0].arrival)
        try:
            while items:
                self._deferral.requeue(*items[-1])
                items.pop()
        except self._deferral.errors as exc:
            logger.warning("%d tasks cannot be requeued yet: %s", len(items), type(exc).__name__)
        finally:
            self._returning.extend(items)

    def _unblock(self) -> None:
        """Requeue what still has to be, and consume those queues again whose tasks may go on."""
        self._return_all()
        for queue, (tag, breakers) in list(self._blocked.items()):
            if any(map(self._is_stuck, breakers)):
                continue
            del self._blocked[queue]
            if celery_internals.unpause_queue(self.consumer.task_consumer, queue, tag):  # else cancelled by hand
                logger.warning("queue %s is consumed again", queue)
            _send_event(self.consumer, QUEUE_UNBLOCKED, queue=queue)
