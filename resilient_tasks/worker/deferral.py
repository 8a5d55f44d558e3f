"""``Deferral``: a worker's requests are deferred or dead-lettered.

State and index first, push last: a process that finds the message can also read why it waits.

Where the broker refuses a queue of ours (:class:`Denials`) the task stays unacknowledged, beside the prefetch window,
so that other tasks go on. It is requeued once its breaker would admit it, or deferred once the rights are there
(``docs/permissions.md``). Where no window can be widened (quorum queues, ``worker_eta_task_limit``) it goes to the end
of its queue a moment later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from celery.states import PENDING

from resilient_tasks import signals
from resilient_tasks.core import outage as counts
from resilient_tasks.core.memory import Memory, MemoryLimit
from resilient_tasks.core.model import parent_of
from resilient_tasks.errors import DeferredQueueFullError, StoreError
from resilient_tasks.monitor.events import TASK_DEFERRED, TASK_RESUMED, Throttle
from resilient_tasks.store.background import TimedWriter
from resilient_tasks.worker.broker_queues import open_queues
from resilient_tasks.worker.envelope import UNDECODABLE, Envelope, flaw_in_task
from resilient_tasks.worker.queues import Queues
from resilient_tasks.worker.request import GatedRequest

if TYPE_CHECKING:
    from resilient_tasks.worker.context import Runtime

logger = logging.getLogger("resilient_tasks")

#: State of a task's result while its message waits.
DEFERRED = "DEFERRED"

#: Messages that could not be moved and are held, unacknowledged, until they can.
MOST_HELD = 10_000
#: Seconds until a step that failed by a bug is tried again.
RETRY_INTERVAL = 1.0
#: Seconds that one deferral may wait for the store, and for the result backend.
INDEX_TIMEOUT = 0.1
STATE_TIMEOUT = 0.25
#: Deferrals of one breaker that have a log line of their own, in so many seconds; the others are counted.
MOST_LINES = 10
LINES_INTERVAL = 10.0
#: Seconds, and deferrals, between two looks at the memory of the servers.
LOOK_INTERVAL = 0.25
LOOK_EVERY = 100
#: Seconds between two checks whether what was refused is granted by now.
CHECK_INTERVAL = 10.0
#: Tasks held for missing rights that are looked at in one go, four times per tick interval.
_AT_ONCE = 100


class Step(Protocol):
    """What is tried until it succeeds."""

    def __call__(self, *, limited: bool) -> None:
        """Take the step; ``limited``: the limits of deferred queues apply."""


class MemoryGuard:
    """Nothing more is deferred long before a server refuses to store anything.

    A Redis at its ``maxmemory`` refuses publishers and results as well, so waiting tasks must not be what fills it.
    """

    def __init__(
        self,
        limit: MemoryLimit,
        servers: Mapping[str, Callable[[], Memory | None]],
        errors: tuple[type[Exception], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._servers, self._errors, self._clock = limit, servers, errors, clock
        self._look_at = float("-inf")
        self._asked = 0
        self._exceeded: int | None = None

    def exceeded(self) -> int | None:
        """Return the limit in bytes that a server has reached, as far as is known; None: there is room."""
        self._asked += 1
        if self._asked >= LOOK_EVERY or self._clock() >= self._look_at:
            self._look()
            self._asked, self._look_at = 0, self._clock() + LOOK_INTERVAL
        return self._exceeded

    def _look(self) -> None:
        before, self._exceeded = self._exceeded, None
        for name, ask in self._servers.items():
            try:
                memory = ask()
            except self._errors as exc:
                logger.debug("the %s does not report how much memory it uses: %s", name, type(exc).__name__)
                continue
            limit = memory and self._limit.exceeded_by(memory)
            if memory and limit:
                self._exceeded = limit
                if before is None:
                    what = "nothing more is deferred: the %s uses %d bytes of memory, and deferring may fill %d"
                    logger.warning(what, name, memory.used, limit)
                return
        if before is not None:
            logger.warning("tasks are deferred again: the servers are below their memory limit")


def keeps_place(before: Envelope, after: Envelope) -> bool:
    """Whether a task that was resumed, and is refused without having failed, is again the next to be resumed."""
    has_waited = before.attempted_at == after.attempted_at and before.not_before == after.not_before
    return before.resumed > 0 and has_waited


class Deferral:
    """Defers requests for one process, a worker's main process or a producer."""

    def __init__(self, runtime: Runtime, queues: Queues | None = None) -> None:
        self._runtime = runtime
        self.queues = queues or open_queues(runtime.app, runtime.settings.namespace)
        self._memory = MemoryGuard(
            MemoryLimit.parse(runtime.settings.store_memory_limit),
            {"broker": self.queues.memory, "store": lambda: runtime.fleet.ledger.memory()},  # noqa: PLW0108 - it may change
            (*self.errors, StoreError),
        )
        self._index_writer = TimedWriter("index of deferred tasks", INDEX_TIMEOUT, even_late=True, expected=StoreError)
        self._state_writer = TimedWriter("result backend", STATE_TIMEOUT)
        self._held: deque[tuple[GatedRequest, Step]] = deque()
        self.denials = Denials(runtime, self)
        self._retrying = threading.Lock()
        self._broker_away = False
        self._bug: type[Exception] | None = None
        self._retry_at = float("-inf")
        self._lines = Throttle(MOST_LINES, LINES_INTERVAL)

    def defer(self, request: GatedRequest, envelope: Envelope, *, limited: bool = True) -> None:
        """Defer a request's message, or dead-letter it if its envelope says so; ``limited``: the limits apply.

        Raises:
            DeferredQueueFullError: the queue is at the policy's ``max_deferred``, or a server at its memory limit.
            Exception: one of :attr:`errors`; the message is where it was.
        """
        if envelope.died_at:
            self._dead_letter(request, envelope)
        else:
            self._defer(request, envelope, limited=limited)

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the broker raises if it is unavailable, or refuses something."""
        return self.queues.errors

    def defer_if_permitted(self, request: GatedRequest, envelope: Envelope, again: Step, *, limited: bool) -> None:
        """Like :meth:`defer`, but hold the request where the broker refuses the queue, until it takes ``again``."""
        name = envelope.breaker
        queue = self.queues.dead(name) if envelope.died_at else self.queues.deferred(name)
        if queue not in self.denials.reasons:
            try:
                self.defer(request, envelope, limited=limited)
            except self.queues.refusals as exc:
                self.forget(name, [request.id])
                self.denials.add({queue: exc})
            else:
                return
        self.denials.hold(request, envelope, queue, again)

    def _dead_letter(self, request: GatedRequest, envelope: Envelope) -> None:
        dead = self.queues.dead(envelope.breaker)
        self.queues.put(request.message, dead, envelope, owned=not request.acknowledged)
        request.acknowledged = True
        self._runtime.fleet.reporter.tally(envelope.breaker, counts.DEAD)
        what = "Task %s[%s] is dead-lettered: %s"
        logger.warning(what, request.name, request.id, envelope.reason, extra=request.log_fields)

    def _defer(self, request: GatedRequest, envelope: Envelope, *, limited: bool) -> None:
        if limited and (memory_limit := self._memory.exceeded()) is not None:
            raise DeferredQueueFullError(envelope.breaker, memory_limit=memory_limit)
        is_indexed = self._index_writer.begin(lambda: self._index(request.id, envelope))
        info = {"breaker": envelope.breaker, "since": envelope.since, "reason": envelope.reason}
        self._write_state(request, DEFERRED, info)  # meanwhile
        is_indexed()
        limit = self._runtime.breaker(envelope.breaker).policy.max_deferred if limited else None
        queue = self.queues.deferred(envelope.breaker)
        try:
            mine = self.queues.put(
                request.message, queue, envelope,
                owned=not request.acknowledged, limit=limit, first=keeps_place(request.envelope, envelope),
            )  # fmt: skip
        except DeferredQueueFullError:
            self.forget(envelope.breaker, [request.id])
            raise
        request.acknowledged = True
        try:
            if mine:
                self._report(request, envelope, info)
            else:  # the broker has restored it: its other copy decides
                self.forget(envelope.breaker, [request.id])
        except Exception:  # must not look like a deferral that failed: the message would be put once more
            what = "Task %s[%s] is deferred, but not everything about it is reported"
            logger.exception(what, request.name, request.id, extra=request.log_fields)

    def _report(self, request: GatedRequest, envelope: Envelope, info: dict[str, Any]) -> None:
        """Report a task that has been deferred; one that is new runs instead of earlier ones with its key."""
        again = request.envelope.since > 0
        if envelope.coalesced_as and not again:
            self._index_writer.write(lambda: self._runtime.fleet.ledger.claim(envelope.coalesced_as, request.id))
        self._runtime.fleet.reporter.tally(envelope.breaker, counts.DEFERRED_AGAIN if again else counts.DEFERRED)
        request.send_event(TASK_DEFERRED, **info)
        signals.notify(signals.task_deferred, request.app, task_id=request.id, task=request.name, **info)
        if self._lines.admits(parent_of(envelope.breaker) or envelope.breaker):
            fields = {**request.log_fields, **info, "event": TASK_DEFERRED}
            logger.info("Task %s[%s] deferred: %s", request.name, request.id, envelope.reason, extra=fields)

    def log_suppressed(self, *, early: bool = False) -> None:
        """Log how many tasks were deferred without a line of their own; of past intervals, or all ``early``."""
        for breaker, count in self._lines.take_suppressed(early=early).items():
            logger.info("%d more tasks deferred for breaker %s", count, breaker, extra={"breaker": breaker})

    def takes(self, message: Any) -> bool:
        """Whether Celery can look up the task of a message that has arrived; what it cannot is dead-lettered."""
        flaw = flaw_in_task(message)
        if flaw is None:
            return True
        origin = (message.delivery_info or {}).get("routing_key") or ""
        logger.error("a message on %s is dead-lettered: %s", origin, flaw)
        envelope = Envelope(breaker=UNDECODABLE, origin=origin).dead_letter(self._runtime.fleet.view.server_now(), flaw)
        try:
            self.queues.put(message, self.queues.dead(UNDECODABLE), envelope, owned=True)
        except self.errors as exc:  # the broker delivers it again
            logger.warning("it could not be moved: %s", type(exc).__name__)
        return False

    def has_room(self, breaker: str) -> bool:
        """Whether one more task of a breaker may be deferred."""
        limit = self._runtime.breaker(breaker).policy.max_deferred
        waiting = 0 if limit is None else self.queues.size(self.queues.deferred(breaker))
        return self._memory.exceeded() is None and (limit is None or waiting < limit)

    def requeue(self, request: GatedRequest, queue: str, envelope: Envelope, *, first: bool = True) -> None:
        """Requeue a request's message, as the next to be taken where the broker can do that, or as the last."""
        self._write_state(request, PENDING)
        request.send_event(TASK_RESUMED, exception="no room to defer", traceback=None)
        header = envelope if envelope.breaker else None
        self.queues.put(request.message, queue, header, owned=not request.acknowledged, first=first)
        request.acknowledged = True

    def attempt(self, request: GatedRequest, step: Step) -> None:
        """Take a step by which a request's message leaves this worker; hold the request if it fails, and try again."""
        if self._broker_away:  # a moment ago: do not wait for it once per task
            self._hold(request, step)
        else:
            self._try(request, step, limited=True)

    def _try(self, request: GatedRequest, step: Step, *, limited: bool) -> None:
        try:
            step(limited=limited)
        except Exception as exc:  # whatever it is, the message must neither be lost nor end the worker
            self._hold(request, step)
            self._broker_away = isinstance(exc, self.errors)
            is_new_bug = not self._broker_away and self._bug is not type(exc)
            if not self._broker_away:
                self._bug, self._retry_at = type(exc), time.monotonic() + RETRY_INTERVAL
            what = "Task %s[%s] cannot be deferred yet: %s"
            fields = request.log_fields
            logger.warning(what, request.name, request.id, type(exc).__name__, exc_info=is_new_bug, extra=fields)

    def _hold(self, request: GatedRequest, step: Step) -> None:
        if len(self._held) == MOST_HELD:
            lost, _ = self._held.popleft()
            what = "Task %s[%s] is no longer held: %d others are"
            logger.error(what, lost.name, lost.id, MOST_HELD, extra=lost.log_fields)
        else:
            request.leave_window()
        self._held.append((request, step))

    def retry_held(self, *, at_once: bool = False) -> None:
        """Try once more what could not be done; stop at the first failure of the broker."""
        with self._retrying:
            self._broker_away = False
            if not at_once and time.monotonic() < self._retry_at:
                return
            for _ in range(len(self._held)):
                request, step = self._held.popleft()
                request.enter_window()
                self._try(request, step, limited=False)  # it was let in before
                if self._broker_away:
                    return
            if not self._held:
                self._bug = None

    def forget(self, breaker: str, task_ids: Sequence[str]) -> None:
        """Take tasks off the index, as far as the store can be reached."""
        with suppress(StoreError):
            self._runtime.fleet.ledger.remove_deferred(breaker, task_ids)

    def _index(self, task_id: str, envelope: Envelope) -> None:
        """Best-effort: the tick, reconciling, finds a message that is missing here."""
        fleet, since = self._runtime.fleet, envelope.since
        now = fleet.view.server_now()
        fleet.ledger.add_deferred(envelope.breaker, task_id, deadline=envelope.ends_at, since=since, now=now)

    def _write_state(self, request: GatedRequest, state: str, info: dict[str, Any] | None = None) -> None:
        if not request.ignore_result:  # a state that no result ever replaces
            store = request.task.backend.store_result
            self._state_writer.write(partial(store, request.id, info, state, request=request.context))

    def write_state_again(self, request: GatedRequest, breaker: str, reason: str) -> None:
        """Write the state of a task once more, if it is deferred."""
        with suppress(StoreError):
            since = self._runtime.fleet.ledger.deferred_since(breaker, request.id)
            if since is not None:
                self._write_state(request, DEFERRED, {"breaker": breaker, "since": since, "reason": reason})

    def close(self) -> None:
        """Give what is held one more chance and close the connection."""
        self.retry_held(at_once=True)
        self.log_suppressed(early=True)
        if self._held:
            logger.error("%d tasks could not be deferred before shutdown", len(self._held))
        self.queues.close()


class _Held(NamedTuple):
    """A task that cannot be deferred; ``beside``: it takes no place in the prefetch window."""

    request: GatedRequest
    envelope: Envelope
    queue: str
    again: Step
    beside: bool

    def may_run(self, now: float) -> bool:
        """Whether the task's breakers would admit it by now; a dead one never runs again."""
        if self.envelope.died_at or self.envelope.not_before > now:
            return False
        return self.request.pipeline.refusing(self.request) is None


class Denials:
    """The queues that the broker refuses one worker, and the requests held for that reason."""

    def __init__(self, runtime: Runtime, deferral: Deferral) -> None:
        self._runtime = runtime
        self._deferral = deferral
        self.reasons: dict[str, str] = {}  # by queue, the broker's error
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

    def hold(self, request: GatedRequest, envelope: Envelope, queue: str, again: Step) -> None:
        """Keep a task that cannot be put into a queue, without a place in the prefetch window."""
        self._held.append(_Held(request, envelope, queue, again, request.leave_window()))

    def look(self) -> None:
        """Check rights, and let those held go that may; called by the maintenance thread, does little each time."""
        if time.monotonic() >= self._check_at:
            self._check()
            self._check_at = time.monotonic() + CHECK_INTERVAL
        going: list[_Held] = []
        now = self._runtime.fleet.view.server_now()
        for _ in range(min(len(self._held), _AT_ONCE)):
            held = self._held.popleft()
            if held.queue not in self.reasons:
                held.request.enter_window()
                self._deferral.attempt(held.request, held.again)
            elif held.may_run(now) or (not held.beside and not held.envelope.died_at):
                going.append(held)
            else:
                self._held.append(held)
        if going:
            going[0].request.pipeline.consumer.call_soon(self._return, going)

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
            request, envelope = held.request, held.envelope
            has_failed = envelope.attempted_at > request.envelope.attempted_at
            header = envelope if has_failed else request.envelope
            try:
                self._deferral.requeue(request, envelope.origin, header, first=held.beside)
            except self._deferral.errors as error:
                what = "Task %s[%s] cannot be requeued yet: %s"
                logger.debug(what, request.name, request.id, error, extra=request.log_fields)
                self._held.append(held)
            else:
                held.request.enter_window()
