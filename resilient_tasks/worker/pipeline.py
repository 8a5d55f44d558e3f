"""The life of a delivery: one message of a guarded task, from its arrival at a worker to its end.

::

    on_arrival ─┬─ refused ──────────────────────────────────────────► defer
                └─ Celery's strategy ─► on_submit ─┬─ refused ───────► defer
                                                   └─ on_start, run ─┬─ on_result ──► Celery writes and acknowledges
                                                      (execution.py) ├─ on_deferred ► defer
                                                                     └─ on_death ───► defer, dead_letter, or Celery
    maintenance.py: deferred queue ─► origin queue ─► on_arrival
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

from celery import Celery
from celery.exceptions import InvalidTaskError, TaskRevokedError, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker.strategy import default

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome
from resilient_tasks.core.outage import REDELIVERED
from resilient_tasks.dependency import Dependency, with_parents
from resilient_tasks.errors import BreakerOpenError, DeferredQueueFullError
from resilient_tasks.monitor import tracing
from resilient_tasks.policy import BLOCK
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.admission import Gate
from resilient_tasks.worker.compensation import Compensation, Holding, Overflow
from resilient_tasks.worker.context import Runtime, runtime_of
from resilient_tasks.worker.deferral import Deferral
from resilient_tasks.worker.definitions import DEFER
from resilient_tasks.worker.envelope import Envelope, check_task
from resilient_tasks.worker.execution import Admission, Deferred, Report
from resilient_tasks.worker.kombu_internals import give_up_turns
from resilient_tasks.worker.maintenance import Maintenance
from resilient_tasks.worker.request import GatedRequest, coalesced_as

logger = logging.getLogger("resilient_tasks")

#: Seconds until a message is tried again that could not be handled.
RETRY_INTERVAL = 1.0


class Denial(NamedTuple):
    """Why a task does not enter the pool."""

    breaker: Dependency
    is_late: bool = False  # it admits, but its late calls hold its share of this worker

    def defers(self, request: GatedRequest) -> bool:
        return self.is_late or request.defers_when_refused()


class Pipeline:
    """The worker's main process, with all that exists only there; made before the pool forks."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.consumer: Any = None  # the worker's, as soon as it has connected
        self.pid = os.getpid()  # pool processes inherit the object and are not it
        self.takes_ticks = False  # from the control queue
        self.gate = Gate(runtime)
        self.compensation = Compensation(runtime)
        self.holding = Holding(self.compensation, self._defer_refused)
        self.deferral = Deferral(runtime)
        self.overflow = Overflow(self.deferral, self._is_stuck)
        self.maintenance = Maintenance(runtime, self.gate, self.deferral, self.overflow, self.holding)

    # --- the life of a delivery -------------------------------------------------------------------

    def on_arrival(self, task: Any, message: Any, to_request: Callable[[], GatedRequest]) -> bool:
        """Defer a message that a breaker refuses; False if Celery's own strategy is to handle it."""
        envelope = Envelope.read(message.headers)
        if envelope.resumed and self.runtime.defines(envelope.breaker):  # others may write envelopes, too
            self.gate.took_up(envelope)
        breakers = self._breakers(task, message)
        denial = breakers and self._denial(breakers, with_parents(breakers), envelope, message.headers["id"])
        if not denial:
            return False
        request = to_request()
        if request.eta or not denial.defers(request):
            return False
        if not request.revoked():  # or expired: Celery has settled it then
            _announce(request)
            self._defer_denied(request, denial)
        return True

    def on_submit(self, request: GatedRequest) -> Admission:
        """Decide on a request that is about to enter the pool; TaskRevokedError if it is revoked, deferred or held."""
        if request.deferred or request.revoked():
            raise TaskRevokedError(request.id)
        denial = self._denial(request.breakers, request.guards, request.envelope, request.id)
        if denial is not None and denial.defers(request):
            self._defer_denied(request, denial)
            raise TaskRevokedError(request.id)
        full = self.gate.full(request.breakers) if denial is None else None
        if full is not None and request.defers_when_refused() and self.holding.hold(request, full):
            raise TaskRevokedError(request.id)
        admission = request.admission = (self.gate.grant if denial is None else self.gate.admit)(request)
        if admission.refusal is not None and request.defers_when_refused():
            self._defer_refused(request, admission.refusal)
            raise TaskRevokedError(request.id)
        if request.delivery_info.get("redelivered") and not request.envelope.since:  # a deferred one may keep the mark
            self.runtime.fleet.reporter.tally(request.task.options.breakers[0], REDELIVERED)
        if admission.admitted_by:
            self.compensation.begin(request, request.breakers)
        return admission

    def on_start(self, request: GatedRequest) -> None:
        """Check a run that the pool has accepted; TaskRevokedError if it is deferred all the same."""
        limiting = self.compensation.accept(request)
        if limiting is not None:
            self.discard(request)
            self._defer_denied(request, Denial(limiting, is_late=True))
            raise TaskRevokedError(request.id)

    def on_begun(self, request: GatedRequest) -> None:
        """Hold the permits of a run that has begun."""
        if request.admission is not None:
            self.gate.hold(request, request.admission)

    def on_result(self, request: GatedRequest, report: Report) -> None:
        """Settle a run that has returned; its message is dead-lettered if it was the task's last attempt."""
        self._settle(request, report)
        if report.exhausted_by:
            self.dead_letter(request, report.exhausted_for, report.exhausted_by)

    def on_deferred(self, request: GatedRequest, deferred: Deferred) -> None:
        """Defer a task whose run has asked for it; what it found out has been settled."""
        wait = request.envelope.back_off() if deferred.backs_off else None
        self.defer(request, deferred.breaker, deferred.reason, deferred, wait=wait)

    def on_retried(self, request: GatedRequest) -> None:
        """Write the state DEFERRED again if the retry waits: the pool process writes RETRY after sending it."""
        refusing = self.refusing(request)
        if refusing is not None:
            self.deferral.write_state_again(request, refusing.name, str(refusing.refusal))

    def on_death(self, request: GatedRequest, exc: BaseException) -> bool:
        """Settle a run that the pool has ended: a failure, unless it was killed; True if its task is deferred."""
        deferred = _deferred_by_time_limit(request, exc)
        killed = isinstance(exc, Terminated) or celery_internals.shutting_down()
        failed = isinstance(exc, (TimeLimitExceeded, WorkerLostError)) and not killed
        self._settle_all(request, Verdict(Outcome.FAILURE, type(exc).__name__) if failed else Verdict(Outcome.IGNORED))
        if deferred is None:
            return False
        if deferred.attempts < request.task.options.max_attempts:
            self.defer(request, deferred.breaker, deferred.reason, deferred)
            return True
        self.dead_letter(request, deferred.breaker, deferred.cause)
        return False

    # --- settling ---------------------------------------------------------------------------------

    def _settle(self, request: GatedRequest, report: Report) -> None:
        admission, request.admission = request.admission, None
        if admission is not None:
            self.compensation.end(request)
            self.gate.settle(request, admission, report)
            if self.holding.held:
                for breaker in request.guards:
                    self.holding.release(breaker.name)

    def _settle_all(self, request: GatedRequest, verdict: Verdict) -> None:
        """Settle a run about which there is one verdict, the same for every breaker."""
        if request.admission is not None:
            self._settle(request, Report.of_all(verdict, request.admission.admitted_by))

    def discard(self, request: GatedRequest) -> None:
        """Settle a run that has never begun; the broker delivers its message again."""
        self._settle_all(request, Verdict(Outcome.IGNORED))

    # --- out of the worker ------------------------------------------------------------------------

    def _defer_refused(self, request: GatedRequest, refusal: BreakerOpenError) -> None:
        self.defer(request, refusal.breaker, str(refusal))

    def _defer_denied(self, request: GatedRequest, denial: Denial) -> None:
        if denial.is_late:
            wait = self.compensation.wait(denial.breaker)
            self.defer(request, denial.breaker.name, "its calls are late", wait=wait)
        else:
            self._defer_refused(request, denial.breaker.refuse())

    def defer(
        self, request: GatedRequest, breaker: str, reason: str, failed: Deferred | None = None, *,
        wait: float | None = None,
    ) -> None:  # fmt: skip
        """Defer a message until a breaker admits, ``wait`` seconds at least; the verdict on the request is final."""
        request.withdraw()
        envelope = cache(partial(self._next_envelope, request, breaker, reason, failed, wait))  # one for all tries
        self.deferral.attempt(request, partial(self._try_to_defer, request, envelope, has_failed=failed is not None))

    def _try_to_defer(
        self, request: GatedRequest, make: Callable[[], Envelope], *, has_failed: bool, limited: bool
    ) -> None:
        envelope = make()
        give_up_turns(request.message, envelope.origin)
        try:
            again = partial(self._try_to_defer, request, make, has_failed=has_failed)
            self.deferral.defer_if_permitted(request, envelope, again, limited=limited)
        except DeferredQueueFullError as full:
            if self.runtime.breaker(envelope.breaker).policy.overflow == BLOCK:
                returned = envelope if has_failed else request.envelope
                self.overflow.requeue(request, returned, envelope.origin, envelope.breaker)
            else:
                self.deferral.attempt(request, partial(_deny, request, full))

    def dead_letter(self, request: GatedRequest, breaker: str, cause: str) -> None:
        """Keep the message of a task that is out of attempts; its FAILURE is Celery's to write."""
        request.dead = True
        envelope = cache(partial(self._last_envelope, request, breaker, cause))
        self.deferral.attempt(request, partial(self._try_to_dead_letter, request, envelope))

    def _try_to_dead_letter(self, request: GatedRequest, make: Callable[[], Envelope], *, limited: bool) -> None:
        again = partial(self._try_to_dead_letter, request, make)
        self.deferral.defer_if_permitted(request, make(), again, limited=limited)

    def _next_envelope(
        self, request: GatedRequest, breaker: str, reason: str, failed: Deferred | None, wait: float | None
    ) -> Envelope:
        now, options, policy = self._now(), request.task.options, self.runtime.breaker(breaker).policy
        trace = self._trace(request, breaker, reason) if failed is None else failed.trace
        envelope = replace(
            request.envelope, breaker=breaker, origin=self.origin_of(request), reason=reason,
            expires=request.expires_at(now), trace=request.envelope.trace or trace, reported_by=request.reported_by,
        )  # fmt: skip
        envelope = envelope.begin(now, options.defer_for, coalesced_as(request)).defer(
            now, failed.cause if failed else ""
        )
        if wait is not None:
            return replace(envelope, not_before=now + wait)
        if failed is None or not failed.cause:
            return envelope
        not_before = now + options.delay(policy, failed.attempts)
        return replace(envelope, attempts=failed.attempts, attempted_at=now, not_before=not_before)

    def _last_envelope(self, request: GatedRequest, breaker: str, cause: str) -> Envelope:
        limit, now, origin = request.task.options.max_attempts, self._now(), self.origin_of(request)
        envelope = replace(request.envelope, breaker=breaker, origin=origin, attempts=limit, attempted_at=now)
        return envelope.dead_letter(now, f"out of attempts (max_attempts={limit}): {cause}", cause)

    def _trace(self, request: GatedRequest, breaker: str, reason: str) -> str:
        state = self.runtime.breaker(breaker).state
        return tracing.record_refusal(request.name, request.message.headers, breaker, state, reason)

    def origin_of(self, request: GatedRequest) -> str:
        """Return the queue that a request came from: as its envelope says, if this worker consumes that one."""
        tasks = self.consumer.task_consumer
        if any(request.envelope.origin == queue.name for queue in tasks.queues):
            return request.envelope.origin
        return celery_internals.queue_of(tasks, request.message)

    # --- what is known here -----------------------------------------------------------------------

    def refusing(self, request: GatedRequest) -> Dependency | None:
        """Return the breaker that would refuse a request, by what is known here; None if it might be admitted."""
        return self.gate.refusing(request.guards, request.envelope, request.id)

    def _denial(
        self, breakers: Sequence[Dependency], guards: Sequence[Dependency], envelope: Envelope, task_id: str
    ) -> Denial | None:
        """Return why a task does not enter the pool, by what is known here; None if it may."""
        if self.compensation.suspects and self.gate.refusing(guards, envelope, task_id) is None:
            limiting = self.compensation.limiting(breakers)
            if limiting is not None:
                return Denial(limiting, is_late=True)
        refusing = self.gate.refusing(guards, envelope, task_id, in_line=True)
        return None if refusing is None else Denial(refusing)

    def _breakers(self, task: Any, message: Any) -> list[Dependency]:
        payload = message.payload
        if isinstance(payload, dict):  # protocol 1: it is refused when it is submitted
            return []
        args, kwargs, _ = payload
        return self.runtime.guarding(task, args, kwargs)

    def _is_stuck(self, breaker: str) -> bool:
        """Whether no task of a breaker can run, or be deferred."""
        return not self.runtime.breaker(breaker).accepting and not self.deferral.has_room(breaker)

    def _now(self) -> float:
        return self.runtime.fleet.view.server_now()

    # --- the worker -------------------------------------------------------------------------------

    def attach(self, consumer: Any) -> None:
        """Join the fleet with a consumer that has just connected to the broker, before it takes any task."""
        if self.consumer is consumer:
            return
        self.consumer = consumer
        fleet = self.runtime.fleet
        fleet.view.refresh()  # a worker that joins while a breaker is OPEN obeys at once
        fleet.view.follow()
        self.maintenance.start(consumer)

    def start(self, consumer: Any) -> None:
        """Begin to look after the runs of a consumer that has connected, or has reconnected."""
        self.attach(consumer)
        if celery_internals.discards_unaccepted(consumer.pool):  # it did when the former connection was lost
            for request in self.compensation.unaccepted():
                self.discard(request)
        self.compensation.start(consumer)
        self.holding.start(consumer)
        self.overflow.start(consumer)

    def close(self) -> None:
        """Leave the fleet at shutdown, with everything reported that is still to be reported."""
        self.maintenance.stop()
        self.overflow.close()
        self.deferral.close()
        self.runtime.fleet.close()


def pipeline_of(app: Celery) -> Pipeline:
    """Return the pipeline of a worker's main process."""
    pipeline: Pipeline = runtime_of(app).pipeline
    return pipeline


def strategy(task: Any, app: Celery, consumer: Any) -> Callable[..., Any]:
    """Return the message handler of a guarded task, Celery's ``Strategy``: what is not deferred goes on to its own."""
    pipeline = pipeline_of(app)
    pipeline.attach(consumer)
    go_on = default(task, app, consumer)

    def on_message(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
        check_task(message.headers if body is None else body, message.payload)
        try:
            to_request = partial(_request, task, app, consumer, message, ack, reject)
            if pipeline.on_arrival(task, message, to_request):
                return None
        except InvalidTaskError:
            raise  # Celery logs and rejects the message
        except Exception:  # a bug of ours ends no worker: the message stays with the broker, and is tried again
            logger.exception("a message for %s cannot be handled yet", task.name)
            consumer.qos.increment_eventually()  # as for a task with an ETA: it holds up no other
            consumer.timer.call_after(RETRY_INTERVAL, again, (message, body, ack, reject, callbacks), kwargs)
            return None
        return go_on(message, body, ack, reject, callbacks, **kwargs)

    def again(*args: Any, **kwargs: Any) -> None:
        consumer.qos.decrement_eventually()
        on_message(*args, **kwargs)

    return on_message


def _request(task: Any, app: Celery, consumer: Any, message: Any, ack: Any, reject: Any) -> GatedRequest:
    return GatedRequest(
        message, app=app, task=task, on_ack=ack, on_reject=reject, hostname=consumer.hostname,
        eventer=consumer.event_dispatcher, connection_errors=consumer.connection_errors,
        body=message.body, headers=message.headers, decoded=False, utc=app.uses_utc_timezone(),
    )  # fmt: skip


def _announce(request: GatedRequest) -> None:
    """Send the event that Celery's own strategy sends."""
    request.send_event(
        "task-received",
        name=request.name,
        args=request.argsrepr,
        kwargs=request.kwargsrepr,
        root_id=request.root_id,
        parent_id=request.parent_id,
        retries=request.request_dict.get("retries", 0),
        eta=None,
        expires=request.expires and request.expires.isoformat(),
    )


def _deferred_by_time_limit(request: GatedRequest, exc: BaseException) -> Deferred | None:
    """Return what a run would have raised itself, had the time limit not killed it."""
    admission = request.admission
    if not admission or not admission.admitted_by or not isinstance(exc, TimeLimitExceeded):
        return None
    if request.task.options.on_failure != DEFER:
        return None
    breaker = admission.answerable
    attempts = admission.attempts_after_failure(breaker)
    return Deferred(breaker, "the task exceeded its time limit", attempts, type(exc).__name__)


def _deny(request: GatedRequest, full: DeferredQueueFullError, *, limited: bool) -> None:  # noqa: ARG001 - it is not let in
    request.fail(full)
    request.acknowledge()
