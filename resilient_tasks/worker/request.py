"""``GatedRequest``: one delivered message of a guarded task, from arrival to its one verdict.

A request ends in exactly one way: *finished* (Celery's own handling), *deferred*, or *failed*. Several
callbacks compete to say so: ``on_success``, ``on_failure`` and, after the latter, ``on_timeout``.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import ref

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import signals, states
from celery.exceptions import TaskRevokedError, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request
from kombu.utils.encoding import safe_repr

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome
from resilient_tasks.core.outage import REDELIVERED
from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.monitor import tracing
from resilient_tasks.monitor.events import TASK_FALLBACK
from resilient_tasks.monitor.log import about
from resilient_tasks.policy import BLOCK
from resilient_tasks.worker import seams
from resilient_tasks.worker.coalescing import coalesced_as
from resilient_tasks.worker.envelope import HEADER, Ticket
from resilient_tasks.worker.options import DEFER
from resilient_tasks.worker.run import NONSENSE, Admission, Packed, Report, TaskDeferred, limits_of, run_admitted
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.timed import TimedWriter

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.host import Host

logger = logging.getLogger("resilient_tasks")

#: Seconds that this process waits for the hooks of one task that has ended without a run.
HOOKS_TIMEOUT = 1.0

_arrivals = itertools.count()
_hooks = TimedWriter("hooks of a task", HOOKS_TIMEOUT, even_late=True)


class ResultNotWrittenError(Exception):
    """A result backend has raised something; the text names its class."""


def write_result(write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a method of a result backend.

    Raises:
        ResultNotWrittenError: it raised something.
    """
    try:
        write(*args, **kwargs)
    except Exception as exc:
        raise ResultNotWrittenError(type(exc).__name__) from exc


class GatedRequest(Request):  # type: ignore[misc]  # Celery is untyped
    """A request that passes the gate before the pool, and can be put aside at any time until its end.

    Attributes:
        ticket: what the message said about former deferrals.
        admission: the gate's answer, until the outcome of the run is settled.
        deferred: the message has been put aside, or back to its queue.
        held_since: when it was over its worker's own limit first, monotonic; 0: never.
        arrival: grows from one request to the next.
        dead: the message goes to the dead-letter queue, and is acknowledged by nobody but that move.
    """

    ticket = Ticket()
    admission: Admission | None = None
    deferred = False
    dead = False
    held_since = 0.0
    _left: Any = None  # the prefetch window that was widened for it

    def __init__(self, message: Any, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.arrival = next(_arrivals)
        if HEADER in self._request_dict:
            self._take_ticket()

    def _take_ticket(self) -> None:
        """Keep from the task that its message has been deferred."""
        self.ticket = Ticket.take(self._request_dict)
        seams.drop_header_of_amqp(self._request_dict, HEADER)
        if self.ticket.exchange:  # resumed straight to its queue
            self._delivery_info.update(exchange=self.ticket.exchange, routing_key=self.ticket.routing_key)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Put our methods before those of the class that Celery derives for each task.

        ``create_request_cls`` overrides ``execute_using_pool`` and ``on_success`` with faster copies
        that call nobody's ``super()``.
        """
        super().__init_subclass__(**kwargs)
        if "execute_using_pool" in cls.__dict__:
            del cls.execute_using_pool
        if "on_success" in cls.__dict__:
            cls.finish = cls.__dict__["on_success"]
            del cls.on_success

    finish: Callable[..., Any] = Request.on_success

    @cached_property
    def host(self) -> Host:
        """The worker's main process."""
        return runtime_of(self.app).host

    @cached_property
    def guards(self) -> list[Dependency]:
        """The breakers that must admit the run; none if its key makes no sense, as the run itself will say."""
        return runtime_of(self.app).guards_of(self.task, self.args, self.kwargs)

    @property
    def context(self) -> Any:
        """The task's request context, for result backends."""
        return self._context

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about it says for machines."""
        return about(self.id, self.name, self.task.options.breakers[0])

    @cached_property
    def holder(self) -> str:
        """Who holds the permit of this run. Not the task's id: a broker may deliver one task to two workers."""
        return f"{self.id}:{uuid4().hex}"

    def defers_when_refused(self) -> bool:
        """Whether a refusal needs no pool slot: there is no fallback to run and no error to raise."""
        return self.task.options.on_open == DEFER and not self.task.options.fallback

    @property
    def awaits_pool(self) -> bool:
        """Whether it is yet to be submitted to the pool."""
        return self.admission is None and not self.deferred

    @property
    def is_refused(self) -> bool:
        """Whether the gate would refuse it at once, and no fallback had to run."""
        return self.defers_when_refused() and self.refusing is not None

    @property
    def refusing(self) -> Dependency | None:
        """The breaker that would refuse it, by what is known here; None if it might be admitted."""
        return self.host.gate.refusing(self.guards, self.ticket, self.id)

    # --- into the pool ----------------------------------------------------------------------------

    def execute_using_pool(self, pool: Any, **_: Any) -> Any:
        """Pass the gate and submit the task to the pool.

        Raises:
            TaskRevokedError: the task was revoked, or deferred: Celery then frees the pool slot.
        """
        if self.deferred or self.revoked():
            raise TaskRevokedError(self.id)
        limiting = self.host.compensation.limiting(self.guards)
        full = self.host.gate.full(self.guards)
        if (limiting or full) and self.refusing is None:
            if limiting is not None:
                seams.task_ready(self)
                self.make_way(limiting)
                raise TaskRevokedError(self.id)
            if full is not None and self.defers_when_refused() and self.host.holding.hold(self, full):
                raise TaskRevokedError(self.id)
        admission = self.admission = self.host.gate.admit(self)
        refusal = admission.refusal
        if refusal is not None and self.defers_when_refused():
            seams.task_ready(self)
            self.put_aside(refusal.breaker, str(refusal))
            raise TaskRevokedError(self.id)
        return self._submit(pool, admission)

    def _submit(self, pool: Any, admission: Admission) -> Any:
        if self.delivery_info.get("redelivered") and not self.ticket.since:  # a deferred message may keep the mark
            runtime_of(self.app).fleet.reporter.tally(self.task.options.breakers[0], REDELIVERED)
        if admission.passes:
            self.host.compensation.begin(self, self._answering(admission))
        hard, soft = limits_of(self.task, self.time_limits)
        message = self.type, self.id, self.request_dict, self.body, self.content_type, self.content_encoding
        result = pool.apply_async(
            run_admitted,
            args=(admission.pack(), *message),
            accept_callback=self.on_accepted,
            timeout_callback=self.on_timeout,
            callback=self.on_success,
            error_callback=self.on_failure,
            soft_timeout=soft,
            timeout=hard,
            correlation_id=self.id,
        )
        self._apply_result = ref(result) if result is not None else None
        return result

    def _answering(self, admission: Admission) -> Sequence[Dependency]:
        """Return the breakers that answer for the run: not the parent of one of its children."""
        if len(self.guards) == 1:
            return self.guards
        return [breaker for breaker, one in zip(self.guards, admission.passes, strict=True) if not one.for_child]

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Handle the start of the run; the time of a trial counts from here.

        Raises:
            TaskRevokedError: it was deferred instead, because its breaker became suspect while the run was queued.
        """
        limiting = self.host.compensation.accept(self)
        if limiting is not None:
            self.discard()
            seams.task_ready(self)
            self.make_way(limiting)
            raise TaskRevokedError(self.id)
        super().on_accepted(pid, time_accepted)
        if self.admission is not None:
            self.host.gate.hold(self, self.admission)

    # --- out of the pool --------------------------------------------------------------------------

    def on_success(self, failed__retval__runtime: tuple[int, Any, float, Packed], **kwargs: Any) -> Any:
        """Handle what the pool returned: a value, or an exception that Celery has dealt with there."""
        failed, value, runtime, packed = failed__retval__runtime
        report = Report.unpack(packed)
        self._settle(report)
        if report.source:
            self.send_event(TASK_FALLBACK, breaker=report.served_for, source=report.source, age=report.age)
        if report.exhausted_by:
            self._dead_letter(report.exhausted_for, report.exhausted_by)
        return self.finish((failed, value, runtime), **kwargs)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:  # noqa: FBT001, FBT002 - Celery's signature
        """Handle an exception: defer, or leave it to Celery."""
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        if isinstance(exc, TaskDeferred):
            seams.task_ready(self)
            return self.put_aside(exc.breaker, exc.reason, exc, wait=self.ticket.back_off() if exc.backs_off else None)
        if not return_ok:
            deferred = self._deferred_by_time_out(exc)
            self._settle_death(exc)
            if deferred is not None and deferred.attempts < self.task.options.max_attempts:
                seams.task_ready(self)
                return self.put_aside(deferred.breaker, deferred.reason, deferred)
            if deferred is not None:
                self._dead_letter(deferred.breaker, deferred.cause)
        try:
            return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        except NONSENSE:
            what = "Task %s[%s] has failed, and its callbacks make no sense"
            logger.exception(what, self.name, self.id, extra=self.log_fields)
            self.acknowledge()

    def on_timeout(self, soft: bool, timeout: float) -> None:  # noqa: FBT001 - Celery's signature
        """Handle a time limit; a hard one has been through :meth:`on_failure` already."""
        if soft or not self.deferred:
            super().on_timeout(soft, timeout)

    def _settle(self, report: Report) -> None:
        admission, self.admission = self.admission, None
        if admission is not None:
            self.host.compensation.end(self)
            self.host.gate.settle(self, admission, report)
            for breaker in self.guards:
                self.host.holding.release(breaker.name)

    def discard(self) -> None:
        """Settle a run that has never begun; the broker delivers its message again."""
        self._settle_all(Verdict(Outcome.IGNORED))

    def _settle_death(self, exc: BaseException) -> None:
        """A child killed by a time limit, or lost, has failed; one killed by revoke or shutdown says nothing."""
        killed = isinstance(exc, Terminated) or seams.shutting_down()
        failed = isinstance(exc, (TimeLimitExceeded, WorkerLostError)) and not killed
        verdict = Verdict(Outcome.FAILURE, type(exc).__name__) if failed else Verdict(Outcome.IGNORED)
        self._settle_all(verdict)

    def _settle_all(self, verdict: Verdict) -> None:
        """Settle a run about which there is one verdict, the same for every breaker."""
        if self.admission is not None:
            self._settle(Report.of_all(verdict, self.admission.passes))

    def _deferred_by_time_out(self, exc: BaseException) -> TaskDeferred | None:
        """Return what a run with attempts left would have raised itself, had the time limit not killed it."""
        admission = self.admission
        if not admission or not admission.passes or not isinstance(exc, TimeLimitExceeded):
            return None
        if self.task.options.on_failure != DEFER:
            return None
        culprit = admission.answerable
        attempts = admission.attempts_after_failure(culprit)
        return TaskDeferred(culprit, "the task exceeded its time limit", attempts, type(exc).__name__)

    # --- aside ------------------------------------------------------------------------------------

    def make_way(self, suspect: Dependency) -> None:
        """Defer the message, because late calls of its breaker hold that breaker's share of this worker."""
        self.put_aside(suspect.name, "its calls are late", wait=self.host.compensation.wait(suspect))

    def put_aside(
        self, breaker: str, reason: str, failed: TaskDeferred | None = None, *, wait: float | None = None
    ) -> None:
        """Defer the message until a breaker admits, ``wait`` seconds at least; the verdict on this request is final."""
        self.deferred = True
        ticket = cache(partial(self._next_ticket, breaker, reason, failed, wait))  # one, however often it is tried
        self.host.deferral.attempt(self, partial(self._defer, ticket, has_failed=failed is not None))

    def _defer(self, make: Callable[[], Ticket], *, has_failed: bool, limited: bool) -> None:
        ticket = make()
        try:
            again = partial(self._defer, make, has_failed=has_failed)
            self.host.deferral.defer_if_permitted(self, ticket, again, limited=limited)
        except DeferredQueueFullError as full:
            if runtime_of(self.app).breaker(ticket.breaker).policy.overflow == BLOCK:
                returned = ticket if has_failed else self.ticket
                self.host.overflow.put_back(self, returned, ticket.origin, ticket.breaker)
            else:
                self.host.deferral.attempt(self, partial(self._turn_away, full))

    def withdraw(self) -> None:
        """Let the pool have nothing to do with it any more: its message goes back to its queue."""
        self.deferred = True
        seams.task_ready(self)

    def leave_window(self) -> bool:
        """Let a message that is held take no place in the prefetch window, as Celery does for one with an ETA.

        Returns:
            False if the broker's window cannot be widened.
        """
        if self.acknowledged:
            return True
        consumer = self.host.consumer
        window, before = consumer.qos, consumer.qos.value
        is_fixed = getattr(consumer, "qos_global", True) is False and not seams.is_emulated(
            consumer.task_consumer.channel
        )
        if before and (is_fixed or window.increment_eventually() <= before):
            return False
        self._left = window
        return True

    def enter_window(self) -> None:
        """Undo :meth:`leave_window`, unless a new connection has brought a new window."""
        window, self._left = self._left, None
        if window is not None and window is self.host.consumer.qos:
            window.decrement_eventually()

    def _turn_away(self, full: DeferredQueueFullError, *, limited: bool) -> None:  # noqa: ARG002 - it is not let in
        self.fail(full)
        self.acknowledge()

    def fail(self, error: Exception) -> None:
        """Give a task that never ran its FAILURE, with all that Celery does about a hard time limit.

        Raises:
            ResultNotWrittenError: the result backend refuses; nothing else has been done.
        """
        seams.task_ready(self)
        write_result(
            self.task.backend.mark_as_failure, self.id, error, request=self.context,
            store_result=self.store_errors, call_errbacks=False,
        )  # fmt: skip
        self.send_event("task-failed", exception=safe_repr(error), traceback=None)
        _hooks.write(partial(self._call_hooks, error))

    def revoke(self, reason: str, *, expired: bool) -> None:
        """Give a task that never ran REVOKED, with all that Celery does about a revoke, or its ``expires``.

        Raises:
            ResultNotWrittenError: as above.
        """
        seams.task_ready(self)
        write_result(
            self.task.backend.mark_as_revoked, self.id, reason, request=self.context, store_result=self.store_errors
        )
        self.send_event("task-revoked", terminated=False, signum=None, expired=expired)
        send = partial(signals.task_revoked.send, request=self.context, terminated=False, signum=None, expired=expired)
        _hooks.write(partial(send, sender=self.task))

    def _call_hooks(self, error: Exception) -> None:
        try:
            raise error  # Celery's hooks get an error that was raised
        except type(error):
            einfo = ExceptionInfo()
        call = self.id, self.args, self.kwargs
        if self.context.errbacks:
            self._call_hook(seams.call_errbacks, self.task.backend, self.context, error)
        self._call_hook(self.task.on_failure, error, *call, einfo)
        self._call_hook(self.task.after_return, states.FAILURE, error, *call, None)
        send = partial(signals.task_failure.send, task_id=self.id, exception=error, args=self.args, kwargs=self.kwargs)
        self._call_hook(send, sender=self.task, traceback=error.__traceback__, einfo=einfo)

    def _call_hook(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:  # a user's code, which harms no other task
            what = "Task %s[%s] has failed, and its %s as well"
            logger.exception(what, self.name, self.id, getattr(hook, "__name__", "signal"), extra=self.log_fields)

    def _dead_letter(self, breaker: str, cause: str) -> None:
        """Keep the message of a task that is out of attempts; its FAILURE is Celery's to write."""
        self.dead = True
        ticket = cache(partial(self._last_ticket, breaker, cause))
        self.host.deferral.attempt(self, partial(self._move_to_dead_letters, ticket))

    def _move_to_dead_letters(self, make: Callable[[], Ticket], *, limited: bool) -> None:
        self.host.deferral.defer_if_permitted(self, make(), partial(self._move_to_dead_letters, make), limited=limited)

    def _last_ticket(self, breaker: str, cause: str) -> Ticket:
        limit, now = self.task.options.max_attempts, self.host.now()
        ticket = replace(
            self.ticket, breaker=breaker, origin=self.host.origin_of(self), attempts=limit, attempted_at=now
        )
        return ticket.die(now, f"out of attempts (max_attempts={limit}): {cause}", cause)

    def acknowledge(self) -> None:
        """Acknowledge the message, unless it goes to the dead-letter queue."""
        if not self.dead:
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - Celery's signature
        """Reject the message, unless it goes to the dead-letter queue."""
        if not self.dead:
            super().reject(requeue)

    def _next_ticket(self, breaker: str, reason: str, failed: TaskDeferred | None, wait: float | None) -> Ticket:
        now = self.host.now()
        options = self.task.options
        trace = self._trace(breaker, reason) if failed is None else failed.trace
        ticket = replace(
            self.ticket, breaker=breaker, origin=self.host.origin_of(self), reason=reason,
            expires=self.expires_at(now), trace=self.ticket.trace or trace, teller=self._teller,
        )  # fmt: skip
        ticket = ticket.begin(now, options.defer_for, coalesced_as(self)).defer(now, failed.cause if failed else "")
        if wait is not None:
            return replace(ticket, not_before=now + wait)
        if failed is None or not failed.cause:
            return ticket
        delay = options.delay(runtime_of(self.app).breaker(breaker).policy, failed.attempts)
        return replace(ticket, attempts=failed.attempts, attempted_at=now, not_before=now + delay)

    @property
    def _teller(self) -> str:
        return self.hostname if self._eventer and self._eventer.enabled and self.task.send_events else ""

    def _trace(self, breaker: str, reason: str) -> str:
        refusing = runtime_of(self.app).breaker(breaker)
        return tracing.record_refusal(self.name, self.message.headers, breaker, refusing.state, reason)

    def expires_at(self, now: float) -> float:
        """Return the end of ``expires``, which is wall-clock time, on the store's clock; 0 if there is none."""
        if not self.expires:
            return 0.0
        wall = datetime.now(timezone.utc if self.expires.tzinfo else None)
        return now + max(float((self.expires - wall).total_seconds()), 0.0)
