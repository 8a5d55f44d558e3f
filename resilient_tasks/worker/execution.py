"""One run of a guarded task, and what the main process and a pool process say to each other about it.

``Admission`` goes in with the task, ``Report`` comes back with its result. Both cross a pipe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

import tenacity
from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry

from resilient_tasks.core.classification import Verdict, attributed_to, refusal_in
from resilient_tasks.core.model import Outcome, State
from resilient_tasks.core.outage import FAILED
from resilient_tasks.dependency import Admitted, Dependency
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError, ResilienceError
from resilient_tasks.fallback import Call, Served, write_provenance
from resilient_tasks.guard import Scope, call_guarded, current_scope
from resilient_tasks.monitor import tracing
from resilient_tasks.monitor.events import about
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.context import Runtime, runtime_of
from resilient_tasks.worker.definitions import DEFER

logger = logging.getLogger("resilient_tasks")

#: What Celery raises over forged callbacks and groups; the run would never end for the pool, and keep its slot.
INVALID_CALLBACKS = (AttributeError, LookupError, TypeError, ValueError)
#: Seconds between two looks at the breakers during a wait.
_POLL_INTERVAL = 0.1

_CONTROL_FLOW = (Ignore, Reject, Retry, ResilienceError)
_REFUSING = (State.OPEN, State.FORCED_OPEN)
_ADMITTING_TASKS = (AT_CAPACITY, State.HALF_OPEN)  # a breaker that has refused a guard may admit its task again at once
_BODY = "_resilient_tasks_body"  # of a request: the body that runs for it


class Admission(NamedTuple):
    """The gate's answer to one run."""

    admitted_by: tuple[Admitted, ...] = ()  # the task's breakers in the task's order; none when one has refused
    refusal: BreakerOpenError | None = None  # of the first breaker that refused
    attempts: int = 0  # dependency failures of this task that counted so far
    trace: str = ""  # ``traceparent`` of what the task did before it was deferred, where calls are traced

    def admitted_of(self, breaker: str) -> Admitted | None:
        return next((each for each in self.admitted_by if each.breaker == breaker), None)

    @property
    def answerable(self) -> str:
        """The first breaker for which an outcome of the run counts, whatever it was waiting for."""
        return next(each.breaker for each in self.admitted_by if not each.for_child)

    def attempts_after_failure(self, breaker: str) -> int:
        """Return the attempts that count if this run fails, and the failure is attributed to ``breaker``."""
        admitted = self.admitted_of(breaker) or next(iter(self.admitted_by), None)
        return self.attempts + (admitted is not None and admitted.counts)


class Deferred(NamedTuple):
    """Why the message of a task must be deferred."""

    breaker: str
    reason: str
    attempts: int = 0
    cause: str = ""  # what the failure of the task itself was; "" if it was refused
    trace: str = ""
    backs_off: bool = False  # the breaker admits the task and refuses what its body does: each time it waits longer


class Report(NamedTuple):
    """What a run found out about its dependencies."""

    #: One for each breaker of its admission; None when the body did not run, or guards inside it have reported already.
    verdicts: tuple[Verdict | None, ...] = ()
    source: str = ""  # the fallback that answered
    age: float | None = None  # of a cached answer, seconds
    served_for: str = ""  # the breaker whose refusal or failure the fallback answered
    exhausted_by: str = ""  # the failure that has used up the task's ``max_attempts``
    exhausted_for: str = ""  # the breaker that it is attributed to
    deferred: Deferred | None = None

    @classmethod
    def of_all(cls, verdict: Verdict, admitted_by: Sequence[Admitted]) -> Report:
        return cls((verdict,) * len(admitted_by))


#: What nearly every run reports; None stands for it on the way out of the pool: pickling it costs more than the rest.
WENT_WELL = Report((Verdict(Outcome.SUCCESS),))


class TaskDeferred(BaseException):
    """Ends the run of a task in the pool whose message must be deferred.

    No ``Exception``: Celery's tracer cleans up and lets it pass, without a result or callbacks. An exception would have
    written FAILURE; of an ``Ignore`` Celery formats the traceback twice and pickles it, more than half of this
    process's time for a task that fails.
    """


class DeferredRetry(Retry):  # type: ignore[misc]  # Celery is untyped
    """Ends a run that would have retried while its breaker is open: a ``Retry`` of which no message is published."""

    def __init__(self, exc: BaseException, refusal: BreakerOpenError) -> None:
        super().__init__(exc=exc)
        self._refused = refusal.args  # its parts: an exception in an attribute would be part of the failure

    @property
    def refusal(self) -> BreakerOpenError:
        """What the next run would meet with."""
        return BreakerOpenError(*self._refused)


def limits_of(task: Any, sent: Sequence[float | None] | None) -> tuple[float | None, float | None]:
    """Return the hard and the soft time limit of a run in seconds: those sent with its message, else its task's."""
    hard, soft = (*(sent or ()), None, None)[:2]
    return hard or task.time_limit, soft or task.soft_time_limit


# --- in the pool ------------------------------------------------------------------------------------------


class Run(Scope):
    """One run of a guarded task in the pool, between its admission and its report."""

    __slots__ = ("admission", "begun", "deferred", "exhausted", "served", "verdicts")

    def __init__(self, admission: Admission, task_id: str) -> None:
        super().__init__(admission.admitted_by, task_id)
        self.admission = admission
        self.begun = False
        self.verdicts: Sequence[Verdict | None] = [None] * len(admission.admitted_by)  # on the task as a whole
        self.served: tuple[str, float | None, str] = ("", None, "")  # by which fallback, how old, for which breaker
        self.exhausted = ("", "")  # the failure that has used up the task's attempts, and its breaker
        self.deferred: Deferred | None = None

    def begin(self, task_id: str | None) -> bool:
        """Claim the run for the task body; False for calls of other tasks, or of itself, inside it."""
        if self.begun or task_id != self.task_id:
            return False
        self.begun = True
        return True

    def report(self) -> Report:
        verdicts: list[Verdict | None] = []
        for admitted, verdict in zip(self.admission.admitted_by, self.verdicts, strict=True):
            if admitted.trial:
                verdicts.append(self.trial_verdicts.get(admitted.breaker, verdict))
            else:
                verdicts.append(None if admitted.breaker in self.reported else verdict)
        return Report(tuple(verdicts), *self.served, *self.exhausted, self.deferred)


def run_admitted(admission: Admission, name: str, task_id: str, *args: Any) -> tuple[int, Any, float, Report | None]:
    """Run a task in the pool with Celery's own tracer, and report on its dependency."""
    run = Run(admission, task_id)
    trace = celery_internals.tracer(celery_internals.current_app())
    with run:
        try:
            failed, value, runtime = trace(name, task_id, *args)
        except TaskDeferred:
            failed, value, runtime = 0, None, 0.0
        except INVALID_CALLBACKS:
            what = "Task %s[%s] has run, and its callbacks are invalid"
            logger.exception(what, name, task_id, extra=about(task_id, name))
            failed, value, runtime = 1, ExceptionInfo(internal=True), 0.0
    report = run.report()
    return failed, value, runtime, None if report == WENT_WELL else report


def bounded(retrying: tenacity.Retrying, breakers: Sequence[Dependency], limit: float | None) -> tenacity.Retrying:
    """Return a task's ``retrying`` within bounds: no attempt after a breaker opened, no wait past the time limit."""

    def all_admit() -> bool:
        return all(guard.cached_state.admits for breaker in breakers for guard in breaker.guards)

    def stop(state: tenacity.RetryCallState) -> bool:
        is_over = limit is not None and tenacity.stop_before_delay(limit)(state)
        return not all_admit() or is_over or bool(retrying.stop(state))

    def retry(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _CONTROL_FLOW) or (error is not None and refusal_in(error) is not None):
            return False  # ``self.retry()`` has sent a message already
        return bool(retrying.retry(state))

    def sleep(seconds: float) -> None:
        end = time.monotonic() + seconds
        while all_admit() and (left := end - time.monotonic()) > 0:  # the next attempt is then refused
            time.sleep(min(left, _POLL_INTERVAL))

    return retrying.copy(
        stop=stop,
        retry=retry,
        sleep=sleep if retrying.sleep is tenacity.nap.sleep else retrying.sleep,
        reraise=True,
    )


def serve(runtime: Runtime, task: Any, call: Call, breaker: str) -> Served | None:
    """Return what a task's fallback answers for a call, counted and with its provenance; None if it has no answer."""
    served: Served | None = task.options.fallback.answer(call, runtime.fleet.store)
    if served is not None:
        runtime.count_answer(served, breaker)
        if call.task_id:
            write_provenance(runtime.fleet.store, call.task_id, served, breaker, runtime.result_ttl)
    return served


def run_guarded(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the body of a guarded task: its ``__call__``. Only in a worker's pool does it raise TaskDeferred."""
    scope = current_scope()
    gated = scope if isinstance(scope, Run) and scope.begin(task.request.id) else None
    return _Body(task, args, kwargs, gated).run()


def defer_retry(task: Any, exc: BaseException | None, *, same_message: bool) -> None:
    """Defer a run that asks for a retry over ``exc`` while its breaker is open; another message is Celery's to send."""
    body = getattr(task.request, _BODY, None)
    if body is None or exc is None or not same_message or task.options.on_open != DEFER:
        return
    refusal = body.refusal_behind(exc)
    if refusal is not None:
        raise DeferredRetry(exc, refusal)


class _Body:
    """One run of a body; ``gated`` if it has passed the gate and reports to it, else it is eager or called directly."""

    def __init__(self, task: Any, args: Any, kwargs: Any, gated: Run | None) -> None:
        self.task, self.args, self.kwargs, self.gated = task, args, kwargs, gated
        self.options, self.runtime = task.options, runtime_of(task.app)
        self.admission = gated.admission if gated is not None else Admission()
        self.function: Callable[..., Any] = task.own_call or task.run
        if gated is not None:
            setattr(task.request, _BODY, self)
        elif task.own_call is None and not task.request.is_eager:
            self.function = partial(Task.__call__, task)  # a direct call gets a request of its own
        admitted_by = self.admission.admitted_by
        self.guards = [self.runtime.breaker(admitted.breaker) for admitted in admitted_by]
        answerable = [guard for guard, admitted in zip(self.guards, admitted_by, strict=True) if not admitted.for_child]
        self.breakers = answerable or self.runtime.breakers_of(task, args, kwargs)
        self._verdicts: dict[str, Verdict] = {}  # on the exception that has ended the run, by breaker

    def run(self) -> Any:
        try:
            value = self._attempts() if self.gated is None else self._gated_attempts(self.gated)
        except Retry as retry:
            if not isinstance(retry, DeferredRetry):
                raise  # Celery has sent the task off again: this run has no answer of its own
            return self._answer(retry.refusal, retry.refusal)
        except Exception as exc:  # noqa: BLE001 - a user's code; it is raised again unless a fallback answers
            return self._answer(exc, refusal_in(exc))
        if self.options.fallback:
            self.options.fallback.remember(self._call, value, self.runtime.fleet.store)
        return value

    @property
    def _call(self) -> Call:
        return Call(self.task.name, self.task.run, self.args, self.kwargs, self.task.request.id or "")

    def _answer(self, exc: Exception, refusal: BreakerOpenError | None) -> Any:
        """Answer for a run that ``exc`` has ended: by a fallback or a deferral, else raise it."""
        failing = self._failing_breaker(exc) if refusal is None else None
        if refusal is None and failing is None:
            raise exc
        breaker = refusal.breaker if refusal is not None else failing.name if failing is not None else ""
        served = serve(self.runtime, self.task, self._call, breaker) if self.options.fallback else None
        if served is not None:
            if self.gated is not None:
                self.gated.served = served.source, served.age, breaker
            return served.value
        if self.gated is not None and refusal is not None:
            self._end_refused(self.gated, refusal, exc)
        if self.gated is not None and failing is not None:
            self._end_failed(self.gated, exc, failing)
        raise exc

    def _gated_attempts(self, gated: Run) -> Any:
        """Attempt it if it is still admitted, and judge the run as a whole."""
        tracing.record_run(lambda: {each.name: each.state for each in self.breakers}, self.admission.trace)
        refusal = self.admission.refusal or self._refusal_since()
        if refusal is not None:
            raise refusal
        started = perf_counter()
        try:
            value = self._attempts()
        except BaseException as exc:
            gated.verdicts = [self._judge(guard, exc) for guard in self.guards]
            raise
        seconds = perf_counter() - started
        gated.verdicts = [guard.judge_success(seconds, value) for guard in self.guards]
        return value

    def _attempts(self) -> Any:
        """Call the body, once or as ``retrying=`` says; each such attempt is an outcome, but a trial has only one."""
        retrying, admitted_by = self.options.retrying, self.admission.admitted_by
        if self.gated is not None and (retrying is None or any(admitted.trial for admitted in admitted_by)):
            function, args, kwargs = self.function, self.args, self.kwargs
        else:
            function, args, kwargs = call_guarded, (self.breakers, self.function, self.args, self.kwargs), {}
        if retrying is None:
            return function(*args, **kwargs)
        limits = limits_of(self.task, self.task.request.timelimit)
        limit = min((float(limit) for limit in limits if limit), default=None)
        return bounded(retrying, self.breakers, limit)(function, *args, **kwargs)

    def _judge(self, breaker: Dependency, exc: BaseException) -> Verdict:
        """Return what the exception that has ended the run means for a dependency; a user's function is asked once."""
        if breaker.name not in self._verdicts:
            self._verdicts[breaker.name] = breaker.judge(exc)
        return self._verdicts[breaker.name]

    def _failing_breaker(self, exc: BaseException) -> Dependency | None:
        """Return the breaker whose dependency has failed the run: that of a guard inside, else the first that did."""
        inside = attributed_to(exc)
        asked = self.breakers
        if inside is not None:
            asked = [self.runtime.breaker(inside)] if self.runtime.defines(inside) else []
        return next((breaker for breaker in asked if self._judge(breaker, exc).outcome is Outcome.FAILURE), None)

    def _end_refused(self, gated: Run, refusal: BreakerOpenError, exc: Exception) -> NoReturn:
        """Have the task deferred until the breaker that refused admits, if that is one of this app."""
        if self.options.on_open != DEFER or not self.runtime.defines(refusal.breaker):
            self.runtime.fleet.reporter.tally(refusal.breaker, FAILED)
            raise exc
        trace = tracing.record_deferral(refusal.breaker, str(refusal))
        attempts, is_inside = self.admission.attempts, refusal.state in _ADMITTING_TASKS
        gated.deferred = Deferred(refusal.breaker, str(refusal), attempts, trace=trace, backs_off=is_inside)
        raise TaskDeferred

    def _end_failed(self, gated: Run, exc: Exception, failing: Dependency) -> NoReturn:
        """Have the task deferred, unless it has used up its attempts, or its retries before the breaker opened."""
        if self._has_retried(exc) and not self._is_open(failing):
            raise exc
        name, cause = failing.name, self._judge(failing, exc).cause
        attempts = self.admission.attempts_after_failure(name)
        defers = self.options.on_failure == DEFER
        if defers and attempts < self.options.max_attempts:
            reason = f"the task failed: {cause}"
            gated.deferred = Deferred(name, reason, attempts, cause, tracing.record_deferral(name, reason))
            raise TaskDeferred
        if defers:
            gated.exhausted = cause, name
        self.runtime.fleet.reporter.tally(name, FAILED)
        raise exc

    def refusal_behind(self, exc: BaseException) -> BreakerOpenError | None:
        """Return the refusal that has led to an exception, or would meet another run at once; None if there is none."""
        refusal = refusal_in(exc)
        if refusal is not None and self.runtime.defines(refusal.breaker):
            return refusal
        failing = self._failing_breaker(exc)
        self._verdicts.clear()  # another exception may end the run
        return failing.refuse() if failing is not None and self._is_open(failing) else None

    def _is_open(self, breaker: Dependency) -> bool:
        """Whether a breaker has opened since it admitted the run, or has admitted it as a trial."""
        admitted = self.admission.admitted_of(breaker.name)
        return (admitted is not None and admitted.trial) or breaker.state in (*_REFUSING, State.HALF_OPEN)

    def _refusal_since(self) -> BreakerOpenError | None:
        """Return the refusal of a breaker that has opened since the gate let this run through."""
        for guard, admitted in zip(self.guards, self.admission.admitted_by, strict=True):
            # what this process has never used was read at the gate, milliseconds ago
            if not admitted.trial and guard.has_joined and guard.state in _REFUSING:
                return guard.refuse()
        return None

    def _has_retried(self, exc: Exception) -> bool:
        """Whether Celery's own retrying has ended with this failure."""
        automatic = tuple(getattr(self.task, "autoretry_for", None) or ())
        return bool(self.task.request.retries > 0 or isinstance(exc, (MaxRetriesExceededError, *automatic)))
