"""Running the body of a guarded task, and what a refusal and a dependency failure lead to.

A run that came through the gate may end with the message put aside. One that did not, eager or by a
direct call, has no message: where no fallback answers, the error reaches the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from celery import Task
from celery.exceptions import MaxRetriesExceededError, Retry

from resilient_tasks.call import Call
from resilient_tasks.core.classification import Verdict, attributed_to, refusal_in
from resilient_tasks.core.model import Outcome, State
from resilient_tasks.core.outage import FAILED
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.fallback import write_provenance
from resilient_tasks.guard import call_guarded
from resilient_tasks.monitor import tracing
from resilient_tasks.scope import current_scope
from resilient_tasks.worker.options import DEFER
from resilient_tasks.worker.quick_attempts import bounded, time_limit
from resilient_tasks.worker.run import Run, TaskDeferred
from resilient_tasks.worker.runtime import runtime_of

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.task import ResilientTask

_REFUSING = (State.OPEN, State.FORCED_OPEN)
_ADMITTING_TASKS = (AT_CAPACITY, State.HALF_OPEN)  # a breaker that has refused a guard may admit its task again at once
_BODY = "_resilient_tasks_body"  # of a request: the body that runs for it


def run_guarded(task: ResilientTask, *args: Any, **kwargs: Any) -> Any:
    """Run the body of a guarded task: its ``__call__``.

    Raises:
        BreakerOpenError: the breaker refused and nothing else answers.
        TaskDeferred: the message must be put aside; only from a worker's pool.
        ConfigurationError: nobody defines the task's breaker.
    """
    run = current_scope()
    if isinstance(run, Run) and run.begin(task.request.id):
        return _GatedBody(task, args, kwargs, run).run()
    return _UngatedBody(task, args, kwargs).run()


class DeferredRetry(Retry):  # type: ignore[misc]  # Celery is untyped
    """Ends a run that would have retried while its breaker is open: a ``Retry`` of which no message is published.

    Args:
        exc: the failure; it counts.
        refusal: what the next run would meet with.
    """

    def __init__(self, exc: BaseException, refusal: BreakerOpenError) -> None:
        super().__init__(exc=exc)
        self._refused = refusal.args  # its parts: an exception in an attribute would be part of the failure

    @property
    def refusal(self) -> BreakerOpenError:
        """The refusal."""
        return BreakerOpenError(*self._refused)


def defer_retry(task: Any, exc: BaseException | None, *, same_message: bool) -> None:
    """Have a run that asks for a retry put aside instead, if a breaker that it needs is open.

    Args:
        task: that asks for it.
        exc: why; None without a failure.
        same_message: whether the retry would be the same message again; a changed one is Celery's to send, unless
            no retry is left.

    Raises:
        DeferredRetry: a breaker is open.
    """
    body = getattr(task.request, _BODY, None)
    if body is None or exc is None or not same_message or task.options.on_open != DEFER:
        return
    refusal = body.refusal_behind(exc)
    if refusal is not None:
        raise DeferredRetry(exc, refusal)


class _Body:
    """One run of a body, with its breakers and fallbacks around it."""

    def __init__(self, task: Any, args: Any, kwargs: Any) -> None:
        self.task, self.args, self.kwargs = task, args, kwargs
        self.options = task.options
        self.runtime = runtime_of(task.app)
        self.breakers = self._breakers()
        self._verdicts: dict[str, Verdict] = {}  # on the exception that has ended the run, by breaker

    def _breakers(self) -> list[Dependency]:
        """Return the breakers that answer for this call."""
        return self.runtime.breakers_of(self.task, self.args, self.kwargs)

    def run(self) -> Any:
        """Run it and answer for it."""
        try:
            value = self.attempts()
        except DeferredRetry as retry:
            refusal = retry.refusal
            return self.answer(refusal.breaker, partial(self.refused, refusal, refusal))
        except Retry:
            raise  # Celery has sent the task off again: this run has no answer of its own
        except Exception as exc:
            found = refusal_in(exc)
            if found is not None:
                return self.answer(found.breaker, partial(self.refused, found, exc))
            culprit = self.culprit(exc)
            if culprit is None:
                raise
            return self.answer(culprit.name, partial(self.failed, exc, culprit))
        if self.options.fallback:
            self.options.fallback.remember(self.call, value, self.runtime.fleet.store)
        return value

    @property
    def call(self) -> Call:
        """What a fallback answers for."""
        return Call(self.task.name, self.task.run, self.args, self.kwargs, self.task.request.id or "")

    def judge(self, breaker: Dependency, exc: BaseException) -> Verdict:
        """Tell what the exception that has ended the run says about a dependency; a user's function is asked once."""
        if breaker.name not in self._verdicts:
            self._verdicts[breaker.name] = breaker.judge(exc)
        return self._verdicts[breaker.name]

    def culprit(self, exc: BaseException) -> Dependency | None:
        """Return the breaker whose dependency has failed the run: that of a guard inside, else the first to say so."""
        inside = attributed_to(exc)
        asked = self.breakers
        if inside is not None:
            asked = [self.runtime.breaker(inside)] if self.runtime.defines(inside) else []
        return next((breaker for breaker in asked if self.judge(breaker, exc).outcome is Outcome.FAILURE), None)

    def attempts(self) -> Any:
        """Make the one attempt, or the quick ones of ``retrying=``."""
        retrying = self.options.retrying
        if retrying is None:
            return self.attempt()
        return bounded(retrying, self.breakers, time_limit(self.task))(self.attempt)

    def attempt(self) -> Any:
        """Call the body once."""
        return call_guarded(self.breakers, self.function, self.args, self.kwargs)

    @property
    def function(self) -> Callable[..., Any]:
        """The ``__call__`` of a user's base class, else what Celery would call."""
        function: Callable[..., Any] = self.task.own_call or self.task.run
        return function

    def answer(self, breaker: str, otherwise: Callable[[], Any]) -> Any:
        """Return what a fallback serves; if none does, what ``otherwise`` makes of it."""
        served = self.options.fallback.answer(self.call, self.runtime.fleet.store)
        if served is None:
            return otherwise()
        self.runtime.count_answer(served, breaker)
        if self.task.request.id:
            ttl = self.runtime.result_ttl
            write_provenance(self.runtime.fleet.store, self.task.request.id, served, breaker, ttl)
        self.serve(served, breaker)
        return served.value

    def serve(self, served: Any, breaker: str) -> None:
        """Take note that a fallback has answered."""

    def refused(self, _refusal: BreakerOpenError, exc: Exception) -> NoReturn:
        """End a run that ``exc`` has ended, which is or wraps a refusal, and no fallback has answered."""
        raise exc

    def failed(self, exc: Exception, _culprit: Dependency) -> NoReturn:
        """End a run that has failed through a dependency, and no fallback has answered."""
        raise exc


class _UngatedBody(_Body):
    """A run that passed no gate: eager, or a direct call."""

    @property
    def function(self) -> Callable[..., Any]:
        """A direct call gets a request of its own, as Celery's own ``__call__`` gives it."""
        if self.task.own_call is None and not self.task.request.is_eager:
            return partial(Task.__call__, self.task)
        return super().function


class _GatedBody(_Body):
    """A run that came through the gate and reports to it."""

    def __init__(self, task: Any, args: Any, kwargs: Any, run: Run) -> None:
        self.gated = run
        super().__init__(task, args, kwargs)
        setattr(task.request, _BODY, self)

    def _breakers(self) -> list[Dependency]:
        passes = self.gated.admission.passes
        self.guards = [self.runtime.breaker(admitted.breaker) for admitted in passes]
        answerable = [guard for guard, admitted in zip(self.guards, passes, strict=True) if not admitted.for_child]
        return answerable or super()._breakers()

    def attempts(self) -> Any:
        """Attempt it if it is still admitted, and judge the run as a whole."""
        tracing.record_run({each.name: each.state for each in self.breakers}, self.gated.admission.trace)
        refusal = self.gated.admission.refusal or self._refusal_since()
        if refusal is not None:
            raise refusal
        started = perf_counter()
        try:
            value = super().attempts()
        except BaseException as exc:
            self.gated.verdicts = [self.judge(guard, exc) for guard in self.guards]
            raise
        seconds = perf_counter() - started
        self.gated.verdicts = [guard.judge_success(seconds, value) for guard in self.guards]
        return value

    def attempt(self) -> Any:
        """Call the body; quick attempts are outcomes of their own, but for those of a trial, which has one."""
        if self.options.retrying is None or any(admitted.trial for admitted in self.gated.admission.passes):
            return self.function(*self.args, **self.kwargs)
        return super().attempt()

    def serve(self, served: Any, breaker: str) -> None:
        """Have the main process tell of it."""
        self.gated.served, self.gated.served_for = served, breaker

    def refused(self, refusal: BreakerOpenError, exc: Exception) -> NoReturn:
        """Defer the task until the breaker that refused admits, if that is one of this app."""
        if self.options.on_open != DEFER or not self.runtime.defines(refusal.breaker):
            self.runtime.fleet.reporter.tally(refusal.breaker, FAILED)
            raise exc
        trace = tracing.record_deferral(refusal.breaker, str(refusal))
        attempts, is_inside = self.gated.admission.attempts, refusal.state in _ADMITTING_TASKS
        raise TaskDeferred(refusal.breaker, str(refusal), attempts, trace=trace, backs_off=is_inside) from exc

    def failed(self, exc: Exception, culprit: Dependency) -> NoReturn:
        """Defer the task, unless it has used up its attempts, or its retries before the breaker opened."""
        if self._has_retried(exc) and not self._is_open(culprit):
            raise exc
        name, cause = culprit.name, self.judge(culprit, exc).cause
        attempts = self.gated.admission.attempts_after_failure(name)
        defers = self.options.on_failure == DEFER
        if defers and attempts < self.options.max_attempts:
            reason = f"the task failed: {cause}"
            raise TaskDeferred(name, reason, attempts, cause, tracing.record_deferral(name, reason)) from exc
        if defers:
            self.gated.exhausted_by, self.gated.exhausted_for = cause, name
        self.runtime.fleet.reporter.tally(name, FAILED)
        raise exc

    def refusal_behind(self, exc: BaseException) -> BreakerOpenError | None:
        """Return the refusal that has led to an exception, or would meet another run at once; None if there is none."""
        refusal = refusal_in(exc)
        if refusal is not None and self.runtime.defines(refusal.breaker):
            return refusal
        culprit = self.culprit(exc)
        self._verdicts.clear()  # another exception may end the run
        return culprit.refuse() if culprit is not None and self._is_open(culprit) else None

    def _is_open(self, culprit: Dependency) -> bool:
        """Whether a breaker has opened since it admitted the run, or has admitted it as a trial."""
        admitted = self.gated.admission.pass_of(culprit.name)
        return (admitted is not None and admitted.trial) or culprit.state in (*_REFUSING, State.HALF_OPEN)

    def _refusal_since(self) -> BreakerOpenError | None:
        """Return the refusal of a breaker that has opened since the gate let this run through."""
        for guard, admitted in zip(self.guards, self.gated.admission.passes, strict=True):
            if not admitted.trial and guard.state in _REFUSING:
                return guard.refuse()
        return None

    def _has_retried(self, exc: Exception) -> bool:
        """Whether Celery's own retrying has had its say about this failure."""
        automatic = tuple(getattr(self.task, "autoretry_for", None) or ())
        return bool(self.task.request.retries > 0 or isinstance(exc, (MaxRetriesExceededError, *automatic)))
